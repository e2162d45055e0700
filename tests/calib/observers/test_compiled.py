"""Law: compiled loops see what torch sees, to the bit where nothing is summed, in any layout and on any threads."""

import pytest
import torch

from kvq.calib.observers import Histogram, Massive, Range, compiled
from kvq.kernels.cpp import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
EXACT = {Range: ("min", "max"), Histogram: ("counts",), Massive: ("channel_peak", "magnitudes", "token_peaks")}


@pytest.fixture
def by_torch(monkeypatch):
    def measure(observe, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "unavailable", lambda: "asked for torch")
            return observe(*arguments)

    return measure


def heads(seed: int, dtype=torch.float32, outer: bool = False) -> torch.Tensor:
    """[3, 5, 41, 48], heads inside tokens as projections leave them, or the other way round."""
    x = torch.randn(3, 41, 5, 48, generator=torch.Generator().manual_seed(seed)) * 7
    x[0, 3, 2, 5], x[1, 4, 0, :9] = -3e5, 0.0
    x = x.to(dtype).transpose(1, 2)
    return x.contiguous() if outer else x


def assert_alike(kind, ours, theirs):
    for name in EXACT[kind]:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Range, Histogram])
def test_heads_are_seen_as_torch_sees_them(kind, dtype, outer, threads, by_torch):
    x, before = heads(1, dtype, outer), torch.get_num_threads()
    assert compiled.compiles(x)
    torch.set_num_threads(threads)
    try:
        ours = kind.observe(x)
    finally:
        torch.set_num_threads(before)
    assert_alike(kind, ours, by_torch(kind.observe, x))
    if kind is Range:
        exact = x.double()
        torch.testing.assert_close(ours.sum, exact.sum((0, 2)), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(ours.sum_squares, exact.square().sum((0, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_seen_as_torch_sees_them(dtype, padded, by_torch):
    hidden = (torch.randn(4, 37, 83, generator=torch.Generator().manual_seed(2)) * 30).to(dtype)
    hidden[2, 30, 7] = 9e3
    valid = torch.ones(4, 37, dtype=torch.bool)
    valid[0], valid[1, :11] = False, False
    hidden[1, 4, 3] = float("nan")  # Padding may hold anything; without padding it must show.
    arguments = hidden, torch.arange(37).expand(4, -1), valid if padded else None, torch.arange(4)
    ours = Massive.observe(*arguments)
    assert_alike(Massive, ours, by_torch(Massive.observe, *arguments))
    assert bool(ours.channel_peak.isfinite().all()) == padded


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad):
    x = heads(3).clone()
    x[2, 4, 7, 11] = bad
    found = Range.observe(x)
    assert not bool(found.sum.isfinite().all())
    assert bool(Range.observe(heads(3)).sum.isfinite().all())
    wrong = ~(found.min.isfinite() & found.max.isfinite() & found.sum.isfinite())
    assert wrong.nonzero().tolist() == [[4, 11]]


def test_float64_is_left_to_torch():
    assert not compiled.compiles(heads(4).double())


def test_a_missing_compiler_is_no_error(monkeypatch):
    monkeypatch.setattr(compiled, "unavailable", lambda: "there is no C++ compiler")
    assert not compiled.compiles(heads(5))
