"""PackedKV: what is packed is what the codec encoded, and the bytes are the bits."""

import pytest
import torch

from kvq.codecs import CODECS, AffineCodec, Float8Codec, PackedKV


def test_the_laws_run_through_every_registered_codec(specs):
    assert {spec.codec for spec in specs} | {"exact"} == set(CODECS.shipped())


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
