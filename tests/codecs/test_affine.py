"""The affine codec against loops over the published formula, and its laws."""

import pytest
import torch

from kvq.codecs import AffineCodec
from kvq.errors import DataError


def codec(bits=2, axis="token", group=32, head_dim=64):
    return AffineCodec(bits=bits, axis=axis, group=group, head_dim=head_dim)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference_group(numbers: list[float], bits: int) -> list[float]:
    """One group by the paper's definition: fp16 scale and minimum, then round((x - min) / scale), half to even."""
    low, high = min(numbers), max(numbers)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().double().item()
    minimum = torch.tensor(low).half().double().item()
    if scale == 0:
        return [minimum] * len(numbers)
    codes = [min(max(round((x - minimum) / scale), 0), 2**bits - 1) for x in numbers]
    return [c * scale + minimum for c in codes]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_decode_of_encode_equals_loops_over_the_definition(bits, axis):
    c = codec(bits, axis, group=16, head_dim=48)
    x = normal(48, 48) * 3 + 0.7
    decoded = c.decode(c.encode(x), torch.float64)
    expected = torch.empty_like(x)
    for i in range(0, 48, 16):
        for j in range(48):
            where = (j, slice(i, i + 16)) if axis == "token" else (slice(i, i + 16), j)
            expected[where] = torch.tensor(reference_group(x[where].tolist(), bits), dtype=torch.float64)
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize(("group", "mse"), [(32, 0.1545), (128, 0.2504)])
def test_two_bit_error_on_gaussian_numbers_is_the_known_one(group, mse):
    """Mean squared error of asymmetric min-max rounding on N(0, 1), from 400,000 groups of the plain formula."""
    c = codec(2, "token", group, head_dim=128)
    x = normal(4096, 128)
    error = (c.decode(c.encode(x), torch.float64) - x).square().mean().item()
    assert error == pytest.approx(mse, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_at_most_half_a_step_where_nothing_is_clipped(bits):
    c = codec(bits, group=64)
    x = normal(257, 64)
    encoded = c.encode(x)
    scale, minimum = encoded.sections["meta"].double().unbind(-1)
    # fp16 rounding of scale and minimum moves the ends of the grid; only numbers inside it are covered by the law.
    inside = (x >= minimum) & (x <= minimum + scale * (2**bits - 1))
    error = (c.decode(encoded, torch.float64) - x).abs()
    assert (error <= scale / 2 + 1e-12)[inside].all()
    assert inside.double().mean() > 0.9


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("constant", [0.0, 1.5, -3.25])
def test_a_constant_block_decodes_to_its_constant(axis, constant):
    c = codec(2, axis)
    x = torch.full((64, 64), constant, dtype=torch.float64)
    encoded = c.encode(x)
    assert torch.equal(c.decode(encoded, torch.float64), x)
    assert not encoded.codes.any()


def test_one_outlier_keeps_its_value_and_no_code_leaves_the_range():
    c = codec(2, group=32)
    x = torch.zeros(1, 64)
    x[0, 5] = 900.0
    encoded = c.encode(x)
    assert encoded.codes.max() == 3
    assert c.decode(encoded, torch.float32)[0, 5] == 900.0


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_rows_and_heads_quantized_alone_give_the_same_codes_as_together(axis):
    c = codec(3, axis)
    x = normal(2, 3, 96, 64)
    together = c.encode(x)
    for b in range(2):
        for h in range(3):
            alone = c.encode(x[b, h])
            assert torch.equal(alone.codes, together.codes[b, h])
            assert torch.equal(alone.sections["meta"], together.sections["meta"][b, h])


def test_quantizing_decoded_numbers_again_changes_nothing_but_quantizing_others_does():
    c = codec(4, group=64)
    x = normal(33, 64).float()
    once = c.decode(c.encode(x), torch.float32)
    codes = c.encode(once).codes
    assert torch.equal(codes, c.encode(x).codes)
    assert not torch.equal(codes, c.encode(x + 0.3 * normal(33, 64, seed=1).float()).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_numbers_that_cannot_be_stored_are_refused(bad):
    x = normal(1, 64)
    x[0, 3] = bad
    with pytest.raises(DataError, match="cannot be quantized"):
        codec().encode(x)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_clip_narrows_the_range_about_its_middle(axis):
    """Codes span clip * (max - min), and what lies outside goes to the nearer end."""
    c = AffineCodec(bits=2, axis=axis, group=32, head_dim=64, clip=0.8)
    x = normal(64, 64)
    encoded = c.encode(x)
    grouped = x.view(64, 2, 32) if axis == "token" else x.view(2, 32, 64)
    dim = 2 if axis == "token" else 1
    low, high = grouped.amin(dim), grouped.amax(dim)
    scale, minimum = encoded.sections["meta"].double().unbind(-1)
    assert torch.allclose(scale, 0.8 * (high - low) / 3, rtol=1e-3)
    assert torch.allclose(minimum, low + 0.1 * (high - low), rtol=1e-3, atol=1e-3)
    assert not torch.equal(encoded.codes, codec(2, axis, 32).encode(x).codes)


def test_zeroquant_is_deepspeeds_symmetric_formula_over_a_whole_token():
    """scale = 2 max|x| / 2^b over all heads, code = clamp(round(x / scale), -2^(b-1), 2^(b-1) - 1)."""
    c = AffineCodec(bits=8, axis="token", group=32, head_dim=32, symmetric=True, shared=True)
    x = normal(2, 3, 11, 32) * 4 + 1
    decoded = c.decode(c.encode(x), torch.float64)
    for b in range(2):
        for t in range(11):
            token = x[b, :, t].flatten().tolist()
            scale = torch.tensor(2 * max(map(abs, token)) / 256).half().double().item()
            expected = [min(max(round(v / scale), -128), 127) * scale for v in token]
            assert decoded[b, :, t].flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_flexgen_is_groups_of_64_channels_with_an_inverse_step():
    """FlexGen keeps fp16 15 / (max - min); its rounding and ours differ by at most one part in 2^10 of a step."""
    c = AffineCodec(bits=4, axis="token", group=64, head_dim=128)
    x = normal(50, 128) * 2
    decoded = c.decode(c.encode(x), torch.float64).view(50, 2, 64)
    grouped = x.view(50, 2, 64)
    low = grouped.amin(-1, keepdim=True).half().double()
    inverse = (15 / (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True))).half().double()
    expected = ((grouped - low) * inverse).clamp(0, 15).round() / inverse + low
    gap = (decoded - expected).abs() * inverse
    assert (gap > 0.02).double().mean() < 0.01
    assert gap.max() < 1.02


def test_skvq_metadata_is_e4m3_of_clipped_ends():
    """step = clip (max - min) / 3 and offset, both rounded to E4M3 before encoding; clipping keeps the middle."""
    c = AffineCodec(bits=2, axis="token", group=16, head_dim=32, meta="e4m3", clip=0.92)
    x = normal(9, 32)
    encoded = c.encode(x)
    step, offset = encoded.sections["meta"].view(torch.float8_e4m3fn).double().unbind(-1)
    grouped = x.view(9, 2, 16)
    low, high = grouped.amin(-1), grouped.amax(-1)
    assert torch.equal(step, (0.92 * (high - low) / 3).to(torch.float8_e4m3fn).double())
    codes = ((grouped - offset.unsqueeze(-1)) / step.unsqueeze(-1)).round().clamp(0, 3)
    assert torch.equal(encoded.codes.double().view(9, 2, 16), codes)
    assert torch.equal(
        c.decode(encoded, torch.float64).view(9, 2, 16), codes * step.unsqueeze(-1) + offset.unsqueeze(-1)
    )


def test_eight_bit_metadata_stays_near_fp16():
    """Error of 2-bit codes in groups of 32: a few percent more for half of the metadata."""
    x = normal(1, 2, 512, 64) * torch.linspace(0.2, 5, 64, dtype=torch.float64)

    def error(axis, meta):
        c = AffineCodec(bits=2, axis=axis, group=32, head_dim=64, meta=meta)
        return ((c.decode(c.encode(x), torch.float64) - x) / x.std(-2, keepdim=True)).square().mean()

    assert error("token", "zero8") < 1.05 * error("token", "float16")
    assert error("channel", "range8") < 1.05 * error("channel", "float16")
    assert error("token", "e4m3") < 1.05 * error("token", "float16")
    assert error("token", "zero8") != error("token", "float16")
