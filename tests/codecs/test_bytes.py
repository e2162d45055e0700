"""Stored bytes are the bits that a codec says."""

import pytest
import torch
from made_pages import pages_of, stored_bytes

from kvq.codecs import CODECS, AffineCodec, Float8Codec


def test_the_laws_run_through_every_registered_codec(specs):
    assert {spec.codec for spec in specs} | {"exact"} == set(CODECS.shipped())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_two_bit_codes_take_two_bits(bits):
    codec = AffineCodec(bits=bits, axis="channel", group=32, head_dim=64)
    pages = pages_of(torch.randn(1, 2, 128, 64), codec)
    numbers = 2 * 128 * 64
    assert pages.words("key").nbytes * 8 == bits * numbers
    assert stored_bytes(pages) * 8 == (bits + 1) * numbers


def test_fp8_takes_eight_bits_and_no_metadata():
    pages = pages_of(torch.randn(1, 2, 64, 32), Float8Codec(head_dim=32))
    assert stored_bytes(pages) == 2 * 64 * 32
