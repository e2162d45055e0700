"""Codebook codecs against loops over the published definitions, in float64."""

import pytest
import torch

from kvq.codecs import AffineCodec, codec_spec
from kvq.codecs.levels import lloyd_max, make_levels

HEAD_DIM, HEADS = 32, 3


def codec_of(artefacts=None, **settings):
    return codec_spec(codec="book", **settings).build(HEAD_DIM, artefacts, HEADS)


def half(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).half().double().item()


def nearest(x: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: abs(level - x))


def round_trip(codec, x):
    return codec.decode(codec.encode(x), torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_in_blocks_is_qlora(numbers, bits):
    """Absolute maximum per block of 16 channels, then the nearest level times it."""
    x = numbers(1, 40)
    levels = make_levels("normal_float", bits, True).tolist()
    found = round_trip(codec_of(bits=bits, levels="normal_float", scale="absmax", axis="token", group=16), x)
    for block, decoded in zip(x.reshape(-1, 16).tolist(), found.reshape(-1, 16).tolist()):
        scale = half(max(map(abs, block)))
        assert decoded == pytest.approx([nearest(v / scale, levels) * scale for v in block], abs=1e-12)


def test_kvquant_values_are_normalised_by_the_range_of_a_token_over_all_heads(numbers):
    """Half range and middle per token (KVQuant, section 3.2), levels between -1 and 1."""
    levels = torch.tensor([-0.9, -0.2, 0.1, 0.8], dtype=torch.float64)
    artefacts = {"levels": levels, "edges": (levels[1:] + levels[:-1]) / 2}
    x = numbers(2, 17)
    found = round_trip(codec_of(artefacts, bits=2, levels="calibrated", scale="range", axis="token", group="token"), x)
    for b in range(2):
        for t in range(17):
            token, decoded = x[b, :, t].flatten().tolist(), found[b, :, t].flatten().tolist()
            scale = half((max(token) - min(token)) / 2)
            offset = half((max(token) + min(token)) / 2)
            expected = [nearest((v - offset) / scale, levels.tolist()) * scale + offset for v in token]
            assert decoded == pytest.approx(expected, abs=1e-12)


def test_kvquant_keys_are_normalised_by_static_ranges_per_channel(numbers):
    levels = torch.tensor([-0.7, -0.1, 0.2, 0.9], dtype=torch.float64)
    edges = (levels[1:] + levels[:-1]) / 2
    static = torch.rand(HEADS, HEAD_DIM, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    x = numbers(1, 9)
    codec = codec_of(
        {"levels": levels, "edges": edges, "range": static}, bits=2, levels="calibrated", scale="calibrated"
    )
    encoded = codec.encode(x)
    assert not encoded.sections
    found = codec.decode(encoded, torch.float64)
    for h in range(HEADS):
        for c in range(HEAD_DIM):
            scale, offset = static[h, c].tolist()
            expected = [nearest((v - offset) / scale, levels.tolist()) * scale + offset for v in x[0, h, :, c].tolist()]
            assert found[0, h, :, c].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("axis", "group"), [("token", 16), ("channel", 32), ("token", "token")])
def test_uniform_levels_are_the_integer_codec(numbers, bits, axis, group):
    """KVQuant with evenly spaced levels equals integer codes, up to how scale and offset are rounded."""
    x = numbers(1, 64)
    book = codec_of(bits=bits, levels="uniform", scale="range", axis=axis, group=group)
    size = HEAD_DIM if group == "token" else group
    affine = AffineCodec(bits=bits, axis=axis, group=size, head_dim=HEAD_DIM, shared=group == "token")
    gap = (round_trip(book, x) - round_trip(affine, x)).abs()
    step = (x.amax() - x.amin()) / (2**bits - 1)
    # A number halfway between two levels may go either way.
    assert (gap > 0.01 * step).double().mean() < 0.01
    assert gap.mean() < 0.004 * step


def test_edges_decide_and_levels_are_what_comes_back(numbers):
    """Q-Norm decodes to other levels than it encodes by."""
    plain = make_levels("uniform", 2, True)
    edges = (plain[1:] + plain[:-1]) / 2
    x = numbers(1, 20)
    settings = {"bits": 2, "levels": "calibrated", "scale": "range", "axis": "token", "group": "head"}
    before = codec_of({"levels": plain, "edges": edges}, **settings).encode(x)
    moved = codec_of({"levels": plain * 0.8 + 0.05, "edges": edges}, **settings)
    assert torch.equal(moved.encode(x).codes, before.codes)
    scale, offset = before.sections["meta"].double().unbind(-1)
    expected = (plain * 0.8 + 0.05)[before.codes.int()] * scale + offset
    assert torch.allclose(moved.decode(before, torch.float64), expected)


def test_moments_bring_normal_numbers_to_the_error_of_lloyd_max():
    x = torch.randn(1, 3, 4000, HEAD_DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7 - 2
    codec = codec_of(bits=2, levels="lloyd_max", scale="moments", axis="channel", group=256)
    x = x[:, :, : 4000 // 256 * 256]
    error = (round_trip(codec, x) - x).square().mean() / 49
    assert error.item() == pytest.approx(0.1175, rel=0.02)


@pytest.mark.parametrize("scale", ["range", "moments"])
@pytest.mark.parametrize("constant", [0.0, 1.5, -3.25])
def test_a_constant_group_decodes_to_its_constant(scale, constant):
    x = torch.full((1, 3, 64, HEAD_DIM), constant, dtype=torch.float64)
    codec = codec_of(bits=3, levels="lloyd_max", scale=scale, axis="channel", group=64)
    assert torch.equal(round_trip(codec, x), x)


def test_lloyd_max_levels_are_stretched_to_a_range_and_not_to_a_variance():
    assert codec_of(bits=3, levels="lloyd_max", scale="absmax", axis="token", group="head").levels.max() == 1
    assert torch.equal(codec_of(bits=3, levels="lloyd_max", scale="unit").levels, lloyd_max(3))
