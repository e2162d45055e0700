"""Statistics equal their definitions, join like the union of their tokens, and never see padding."""

import pytest
import torch

from kvq.calib.observers.range import Range
from kvq.calib.observers.tokens import real_tokens

FIELDS = ("min", "max", "sum", "sum_squares", "absmax", "mean", "rms", "std")


def observe(x: torch.Tensor, valid: torch.Tensor | None = None) -> Range:
    return Range.observe(real_tokens(x, valid))


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A channel-dependent offset and scale, so that a swapped axis cannot pass.
    scale = torch.arange(1, shape[-1] + 1, dtype=torch.float32)
    return (torch.randn(*shape, generator=generator) * scale + scale.flip(0) / 2).to(dtype)


def reference(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """From the definitions, in float64. tokens [K, N, D]."""
    x = tokens.double()
    return {
        "min": x.min(1).values,
        "max": x.max(1).values,
        "absmax": x.abs().max(1).values,
        "sum": x.sum(1),
        "sum_squares": (x**2).sum(1),
        "mean": x.mean(1),
        "rms": (x**2).mean(1).sqrt(),
        "std": x.std(1, correction=0),
    }


def assert_is(stats, tokens: torch.Tensor, tolerance: float = 1e-5):
    assert stats.count == tokens.shape[1]
    for name, expected in reference(tokens).items():
        got = getattr(stats, name).double()
        if name in ("min", "max", "absmax"):
            assert torch.equal(got, expected), name
        else:
            if name == "std":
                # A difference of two means of squares is as good as these are.
                got, expected = got**2, expected**2
                assert ((got - expected).abs() <= 3 * tolerance * (tokens.double() ** 2).mean(1)).all(), name
                continue
            # Sums are judged against the sum of magnitudes, which cancellation does not shrink.
            weight = tokens.double().abs().sum(1) if name in ("sum", "mean") else expected
            weight = weight / (tokens.shape[1] if name == "mean" else 1)
            assert ((got - expected).abs() <= tolerance * weight).all(), name


def flat(x: torch.Tensor) -> torch.Tensor:
    """[B, K, T, D] -> [K, B*T, D]."""
    return x.transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (3, 2, 63, 16), (2, 3, 257, 32)])
def test_statistics_are_their_definitions(shape, dtype):
    x = draw(*shape, dtype=dtype)
    # min and max are kept in float32, so float64 data is compared at numbers that float32 holds.
    assert_is(observe(x), flat(x))


def test_layout_in_memory_does_not_matter():
    x = draw(2, 33, 3, 16).transpose(1, 2)
    assert not x.is_contiguous()
    assert_is(observe(x), flat(x))


@pytest.mark.parametrize("cut", [1, 40, 99])
def test_merging_equals_seeing_all_tokens(cut):
    x = draw(1, 2, 100, 16)
    merged = observe(x[:, :, :cut]).merge(observe(x[:, :, cut:]))
    assert_is(merged, flat(x))
    swapped = observe(x[:, :, cut:]).merge(observe(x[:, :, :cut]))
    assert all(torch.equal(getattr(merged, name), getattr(swapped, name)) for name in FIELDS)


def test_nothing_seen_is_neutral():
    x = draw(1, 2, 9, 16)
    nothing = observe(x[:, :, :0])
    assert nothing.count == 0
    assert (nothing.absmax == 0).all()
    assert nothing.rms.isnan().all()
    for merged in (nothing.merge(observe(x)), observe(x).merge(nothing)):
        assert_is(merged, flat(x))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_is_never_seen(poison):
    x, valid = draw(3, 2, 11, 16), torch.ones(3, 11, dtype=torch.bool)
    valid[0, :4] = False
    valid[1, 7:] = False
    valid[2] = False
    expected = torch.cat([x[0, :, 4:], x[1, :, :7]], dim=1)
    poisoned = x.transpose(1, 2).clone()
    poisoned[~valid] = poison
    poisoned = poisoned.transpose(1, 2)
    assert_is(observe(poisoned, valid), expected)
    # Control: without the mask the poison is seen.
    assert not torch.equal(observe(poisoned).max, observe(x, valid).max)


def test_all_padding_is_nothing_seen():
    assert observe(draw(2, 2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)).count == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_noticed_and_survives_merging(bad):
    x = draw(2, 2, 7, 16)
    assert bool(observe(x).sum.isfinite().all())
    x[1, 1, 3, 5] = bad
    assert not bool(observe(x).sum.isfinite().all())
    assert not bool(observe(draw(2, 2, 7, 16)).merge(observe(x)).sum.isfinite().all())


def test_one_large_offset_does_not_lose_the_small_numbers():
    """Sums of many batches are kept in float64: 2**24 + 1 is not 2**24."""
    big, small = torch.full((1, 1, 1, 16), 2.0**24), torch.ones(1, 1, 1, 16)
    stats = observe(big)
    for _ in range(3):
        stats = stats.merge(observe(small))
    assert (stats.sum == 2.0**24 + 3).all()


def test_query_heads_of_a_group_count_as_tokens_of_their_kv_head():
    """With 2 KV heads, query heads 0-2 read KV head 0 and heads 3-5 read KV head 1; padding is left out in all."""
    query, valid = draw(2, 6, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    got = observe(query, valid).grouped(2)
    for head, group in enumerate((query[:, :3], query[:, 3:])):
        real = torch.cat([group[0].flatten(0, 1), group[1, :, :3].flatten(0, 1)])
        assert torch.equal(got.max[head], real.amax(0))
        assert got.count == len(real) == 3 * 5 + 3 * 3


def test_what_is_stored_is_restored():
    stats = observe(draw(1, 2, 9, 16))
    again = Range.restore(stats.tensors(), stats.facts())
    assert all(torch.equal(getattr(stats, name), getattr(again, name)) for name in FIELDS)
    assert again.count == 9
