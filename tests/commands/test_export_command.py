"""``kvq export``: what is written, and what is refused with nothing written."""

import errno
import json

import pytest

OUT = "out"


@pytest.fixture
def model(tiny_checkpoint):
    return tiny_checkpoint(head_dim=32)


@pytest.fixture
def refuse_export(refuse, tmp_path):
    """``refuse_export(model, *args, says=())``: refused, and neither DIR nor anything beside it appears."""

    def invoke(model, *args, says: tuple[str, ...]):
        before = sorted(tmp_path.iterdir())
        refuse("export", model, *args, "-o", tmp_path / OUT, says=says)
        assert sorted(tmp_path.iterdir()) == before

    return invoke


def test_an_export_is_a_whole_checkpoint(run, model, tmp_path):
    result = run("export", model, "--recipe", "kivi2", "--set", "key.bits=4", "-o", tmp_path / OUT, "--json", "-")
    report = json.loads(result.stdout)
    assert report["recipe"] == "kivi2+key.bits=4"
    assert report["bits_per_element"] == 4.0
    assert {"config.json", "recipe.yaml", "README.md"} <= set(report["files"])
    assert all((tmp_path / OUT / name).is_file() for name in report["files"])


def test_a_dry_run_prints_the_memory_plan_and_writes_nothing(run, model, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = run("export", model, "--recipe", "kivi2", "--dry-run", "-o", tmp_path / OUT, "--json", "-")
    plan = json.loads(result.stdout)["memory"]
    assert [row["tokens"] for row in plan["lengths"]] == [4096, 32768, 131072]
    assert plan["bits_per_element"] == 3.0
    assert "Dry run" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_needs_no_statistics(run, model):
    assert run("export", model, "--recipe", "fp8", "--dry-run").exit_code == 0


def test_fp8_takes_statistics(run, model, stats, tmp_path):
    file = stats(model)
    assert run("export", model, "--recipe", "fp8", "--stats", file, "-o", tmp_path / OUT).exit_code == 0


def test_an_existing_folder_stays_without_force(run, refuse, model, tmp_path):
    args = ("export", model, "--recipe", "kivi2", "-o", tmp_path / OUT)
    assert run(*args).exit_code == 0
    written = (tmp_path / OUT / "recipe.yaml").read_bytes()
    refuse(*args, "--set", "key.bits=4", says=("--force",))
    assert (tmp_path / OUT / "recipe.yaml").read_bytes() == written
    assert run(*args, "--set", "key.bits=4", "--force").exit_code == 0
    assert (tmp_path / OUT / "recipe.yaml").read_bytes() != written


def test_bad_recipes_are_refused(refuse_export, model):
    refuse_export(model, "--recipe", "kivi3", says=("'kivi3'", "Did you mean"))
    refuse_export(model, "--recipe", "kivi2", "--set", "value.group=48", says=("group=48", "head_dim=32"))
    refuse_export(model, "--recipe", "kivi2", "--set", "key.group=48", says=("group=48",))
    refuse_export(model, "--recipe", "kivi2", "--set", "layers.9.key.bits=4", says=("'9'",))
    refuse_export(model, "--recipe", "fp8", says=("--stats",))


def test_statistics_of_another_model_are_refused(refuse_export, model, tiny_checkpoint, tiny_model, stats):
    shape = stats(tiny_checkpoint(name="other-shape", layers=3), "shape.safetensors")
    refuse_export(model, "--recipe", "fp8", "--stats", shape, says=("another shape",))
    weights = stats(tiny_checkpoint(tiny_model(seed=1, head_dim=32), name="other-weights"), "weights.safetensors")
    refuse_export(model, "--recipe", "fp8", "--stats", weights, says=("other weights",))


def test_bad_statistics_files_are_refused(refuse_export, model, stats, tmp_path):
    missing = tmp_path / "none.safetensors"
    refuse_export(model, "--recipe", "fp8", "--stats", missing, says=("does not exist",))
    file = stats(model)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuse_export(model, "--recipe", "fp8", "--stats", file, says=("altered",))
    file.write_bytes(content[:-100])
    refuse_export(model, "--recipe", "fp8", "--stats", file, says=("truncated",))


def test_truncated_weights_are_refused(refuse_export, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refuse_export(model, "--recipe", "kivi2", says=("'model.safetensors'", "truncated"))


def test_a_model_that_is_nowhere_is_refused(refuse_export, tmp_path):
    refuse_export("./nowhere", "--recipe", "kivi2", says=("'./nowhere'", "does not exist"))
    refuse_export("some-owner/some-model", "--recipe", "kivi2", says=("'some-owner/some-model'", "cannot be fetched"))


def test_a_full_disk_leaves_nothing(refuse_export, model, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    refuse_export(model, "--recipe", "kivi2", says=("disk is full",))
