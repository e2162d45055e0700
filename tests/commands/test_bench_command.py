"""``kvq bench``: what it measures, what it refuses, and that nothing wrong is timed."""

import json
import statistics

import pytest
import torch
from click.testing import CliRunner

from kvq.bench import bench, timing
from kvq.bench.roofline import Shape, exact_bytes, step_bytes
from kvq.bench.samples import layout_of
from kvq.cli import main
from kvq.errors import DataError


@pytest.fixture
def quick(monkeypatch):
    """Little memory and few repeats: what is measured means nothing here. Gives the times of every shape, by side."""
    for sizes in (timing.ROTATED_BYTES, timing.COPY_BYTES):
        monkeypatch.setitem(sizes, "cpu", 1 << 16)
    real, found = timing.time_in_turns, []

    def few(sides, device):
        found.append(real(sides, device, seconds=1e-3, turns=2))
        return found[-1]

    monkeypatch.setattr(timing, "time_in_turns", few)
    return found


def run(*args: str):
    return CliRunner().invoke(main, ["bench", *args])


def test_a_table_and_its_json(quick):
    result = run("--shapes", "1x100,kv=2,g=2,d=32", "--bits", "4,4:2", "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["width"] for row in report["rows"]] == ["4", "4:2"]
    for row in report["rows"]:
        assert row["error"] < 1e-3
        assert row["seconds"] > 0
        assert row["ran"].startswith(("cpp (", "reference ("))
        # Turn by turn: a machine may change its pace between two of them.
        own = zip(quick[0][row["width"]], quick[0][bench.COPY])
        shares = [row["bytes"] * copy / timing.copied_bytes(torch.device("cpu")) / seconds for seconds, copy in own]
        assert row["fraction"] == pytest.approx(statistics.median(shares), rel=1e-9)
    assert set(report["exact"][0]["seconds"]) == {"float32 torch SDPA", "bfloat16 torch SDPA"}


def test_a_width_that_is_wrong_is_not_timed(quick, monkeypatch):
    monkeypatch.setattr(bench, "_check", lambda *args: 0.5)
    result = run("--shapes", "1x100,kv=2,g=2,d=32", "--bits", "4", "--json", "-")
    assert result.exit_code == 2
    assert "error 5.0e-01 is above 1e-03" in result.stderr
    assert json.loads(result.stdout)["rows"][0]["seconds"] is None


def test_the_check_notices_wrong_bytes(monkeypatch):
    shape, layout = Shape.parse("1x100,kv=2,g=2,d=32"), layout_of("4", "4", 32)
    ran = bench.choose("reference", torch.device("cpu"))
    arguments = (shape, layout, torch.device("cpu"), ran, torch.float32)
    assert bench._check(*arguments) < 1e-5
    real = bench._runner
    monkeypatch.setattr(bench, "_runner", lambda *given: _shifted(*real(*given)))
    assert bench._check(*arguments) > 1e-2


def _shifted(call, splits):
    return lambda: call() + 0.1, splits


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--shapes", "big"), "BATCHxTOKENS"),
        (("--shapes", "1x100,d=33"), "multiple of 16"),
        (("--bits", "5"), "width '5' is not readable"),
        (("--impl", "cuda"), "not an implementation"),
        (("--shapes", "4096x1024K"), "GiB are free"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")


def test_bytes_are_those_of_the_layout():
    shape = Shape(batch=2, context=128, kv_heads=3, group=4, head_dim=128)
    # 136 bytes a token and KV head: 2 x 64 of codes and 2 x 4 of scale and minimum.
    assert step_bytes(shape, layout_of("4", "4"), 2) == 2 * 3 * 128 * 136 + 2 * 2 * 12 * 128 * 2
    assert exact_bytes(shape, 2) == 2 * 3 * 128 * 512 + 2 * 2 * 12 * 128 * 2
    split = step_bytes(shape, layout_of("4", "4"), 2, splits=4) - step_bytes(shape, layout_of("4", "4"), 2)
    assert split == 2 * 2 * 12 * 4 * (4 * 128 + 8)
    assert str(Shape.parse("8x32K")) == "8x32K,kv=8,g=4,d=128"
    with pytest.raises(DataError):
        Shape.parse("8 by 32")
