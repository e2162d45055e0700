"""PackedKV: what is packed is what the codec encoded, and the bytes are the bits."""

import pytest
import torch

from kvq.quantizers import CODECS, AffineCodec, Float8Codec, PackedKV, build_codec
from kvq.specs import CodecSpec

SPECS = {
    "affine": CodecSpec(codec="affine", bits=3, axis="token", group="head"),
    "float8": CodecSpec(codec="float8", scale="unit"),
}


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_registered_codec_packs_and_unpacks_its_own_codes(name):
    codec = build_codec(SPECS[name], head_dim=48)
    assert isinstance(codec, CODECS[name])
    x = torch.randn(2, 3, 2 * codec.page_tokens, 48, generator=torch.Generator().manual_seed(0))
    packed = PackedKV.pack(x, codec)
    encoded = codec.encode(x)
    assert torch.equal(packed.codes(), encoded.codes)
    assert torch.equal(packed.dequantize(), codec.decode(encoded, torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_two_bit_codes_take_two_bits(bits):
    codec = AffineCodec(bits=bits, axis="channel", group=32, head_dim=64)
    packed = PackedKV.pack(torch.randn(1, 2, 128, 64), codec)
    numbers = 2 * 128 * 64
    assert packed.words.nbytes * 8 == bits * numbers
    assert packed.nbytes * 8 == (bits + 1) * numbers


def test_fp8_takes_eight_bits_and_no_metadata():
    packed = PackedKV.pack(torch.randn(1, 2, 64, 32), Float8Codec(head_dim=32))
    assert packed.nbytes == 2 * 64 * 32
