"""Tiers: every part of the channels is what KIVI's keys of its width would be, and the bytes are the bits."""

import pytest
import torch
from made_pages import pages_of, stored_bytes

from kvq.codecs import AffineCodec, codec_spec
from kvq.codecs.tiers import TiersCodec
from kvq.errors import RecipeError


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def by_hand(x, bits, group):
    """The definition: minimum and step of every channel over ``group`` tokens, in fp16, rounded to nearest."""
    out, width = torch.zeros_like(x), x.shape[-1] // len(bits)
    for i, b in enumerate(bits):
        for c in range(i * width, (i + 1) * width):
            for t in range(0, x.shape[-2], group):
                part = x[..., t : t + group, c]
                low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
                if b:
                    step, start = ((high - low) / (2**b - 1)).half().double(), low.half().double()
                    out[..., t : t + group, c] = ((part - start) / step).round().clamp(0, 2**b - 1) * step + start
    return out


@pytest.mark.parametrize(("bits", "head_dim"), [((4, 2, 2, 0), 64), ((8, 3), 96), ((0, 2, 4), 48), ((3,), 80)])
def test_decoded_numbers_follow_the_definition(bits, head_dim):
    codec = TiersCodec(bits=bits, group=32, head_dim=head_dim)
    x = numbers(2, 3, 96, head_dim)
    found = codec.decode(codec.encode(x), torch.float64)
    assert torch.allclose(found, by_hand(x, bits, 32), atol=1e-12)
    width = head_dim // len(bits)
    for i, b in enumerate(bits):
        if not b:
            assert not found[..., i * width : (i + 1) * width].any()


def test_one_width_is_affine_by_channel():
    x = numbers(1, 2, 128, 64)
    tiers = TiersCodec(bits=(2, 2, 2, 2), group=32, head_dim=64)
    affine = AffineCodec(bits=2, axis="channel", group=32, head_dim=64)
    assert torch.equal(tiers.decode(tiers.encode(x), torch.float64), affine.decode(affine.encode(x), torch.float64))


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("meta", ["float16", "range8"])
def test_pages_hold_the_bits_and_give_the_numbers_back(page_tokens, meta):
    codec = TiersCodec(bits=(4, 2, 2, 0), group=128, head_dim=64, meta=meta)
    x = numbers(1, 3, 512, 64).float()
    pages = pages_of(x, codec, page_tokens)
    assert torch.equal(codec.dequantized(pages, "key", torch.float32), codec.decode(codec.encode(x), torch.float32))
    pair = {"float16": 32, "range8": 16}[meta]
    extra = {"float16": 0, "range8": 3 * 32}[meta]
    stored = 16 * (4 + 2 + 2) * 128 + 48 * pair + extra
    assert stored_bytes(pages) * 8 == stored * 4 * 3
    assert pages.layout.key.bits_per_element(3) == stored / (128 * 64)


def test_each_tier_meets_its_own_error():
    """Bits go where they are given: the error of a tier falls by four with every bit, and not elsewhere."""
    x = numbers(1, 1, 4096, 64)
    codecs = [TiersCodec(bits=b, group=128, head_dim=64) for b in ((4, 2), (3, 2), (4, 3))]
    off = [(c.decode(c.encode(x), torch.float64) - x).square() for c in codecs]
    errors = [e.unflatten(-1, (2, 32)).mean((0, 1, 2, 4)) for e in off]
    assert 3.5 < errors[1][0] / errors[0][0] < 5.5
    assert torch.equal(errors[1][1], errors[0][1])
    assert 3.5 < errors[0][1] / errors[2][1] < 6


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "are not tiers"),
        ([], "are not tiers"),
        ([4, 5], "no packed width|not a packed width"),
        ([True, 2], "not a packed width"),
        ([0, 0], "nothing would be stored"),
    ],
)
def test_bits_that_are_no_tiers_are_refused(bits, words):
    with pytest.raises(RecipeError, match=words):
        codec_spec(codec="tiers", bits=bits, group=128)


def test_tiers_must_cut_the_head_into_atoms():
    with pytest.raises(RecipeError, match="3 tiers do not cut head_dim=64"):
        codec_spec(codec="tiers", bits=[4, 2, 2], group=128).build(64)


def test_a_spec_survives_plain_data():
    spec = codec_spec(codec="tiers", bits=[4, 2, 2, 0], group=128)
    assert codec_spec(**spec.to_dict()) == spec
    assert spec.to_dict()["bits"] == [4, 2, 2, 0]
    assert len({spec, codec_spec(**spec.to_dict())}) == 1
