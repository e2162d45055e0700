"""Laws that every codec keeps, wrapped or not. ``spec`` and ``codec`` run through the table of conftest.py."""

import pytest
import torch
from made_pages import pages_of, stored_bytes

from kvq.errors import DataError
from kvq.pages.layout import SECTION_BYTES


def part(encoded, rows=slice(None), tokens=slice(None), layout=None):
    """Codes and sections of some rows and of a span of tokens."""
    sections = {}
    for section in layout.sections:
        numbers = encoded.sections[section.name][rows]
        start, stop = (edge // section.tokens for edge in (tokens.start, tokens.stop))
        sections[section.name] = numbers.narrow(-1 - len(section.shape), start, stop - start)
    return encoded.codes[rows][..., tokens, :], sections


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name


def test_pages_hold_what_was_encoded(codec, numbers):
    x = numbers(2, 2 * codec.page_tokens)
    pages, encoded = pages_of(x, codec), codec.encode(x)
    assert torch.equal(pages.codes("key"), encoded.codes)
    assert torch.equal(codec.dequantized(pages, "key", torch.float64), codec.decode(encoded, torch.float64))
    assert codec.dequantized(pages, "key", torch.float64).shape == x.shape


def test_sections_are_as_the_layout_says_and_bytes_are_the_bits(codec, numbers):
    layout = codec.layout(codec.page_tokens)
    x = numbers(2, 2 * codec.page_tokens)
    encoded = codec.encode(x)
    assert encoded.codes.dtype == torch.uint8
    assert not encoded.codes.numel() or int(encoded.codes.max()) < 2**layout.bits
    assert encoded.sections.keys() == {section.name for section in layout.sections}
    for section in layout.sections:
        stored = encoded.sections[section.name]
        lead = (2,) if section.shared else (2, x.shape[1])
        assert stored.shape == (*lead, x.shape[2] // section.tokens, *section.shape), section.name
        assert stored.dtype == getattr(torch, section.dtype)
        assert stored.itemsize == SECTION_BYTES[section.dtype]
    bits = layout.bits_per_element(heads=x.shape[1])
    assert stored_bytes(pages_of(x, codec)) * 8 == pytest.approx(bits * x.numel(), abs=0.01)


def test_products_with_pages_are_products_with_what_they_hold(codec, numbers):
    pages = pages_of(numbers(2, 2 * codec.page_tokens), codec)
    decoded = codec.dequantized(pages, "key", torch.float64)
    q, p = numbers(2, 5, seed=1), torch.rand(2, 3, 4, decoded.shape[2], dtype=torch.float64)
    for found, expected in (
        (codec.scores(pages, "key", q), q @ decoded.transpose(-1, -2)),
        (codec.weighted_sum(pages, "key", p), p @ decoded),
    ):
        assert found.shape == expected.shape
        assert (found - expected).abs().amax() < 1e-11 * expected.abs().amax()


def test_products_see_every_section(codec, numbers):
    """Negative control: pages whose section is damaged give other products."""
    pages = pages_of(numbers(1, codec.page_tokens), codec)
    q = numbers(1, 3, seed=1)
    good = codec.scores(pages, "key", q)
    sections = [section.name for section in pages.layout.key.sections]
    assert sections or codec.layout(codec.page_tokens).format in ("e4m3", "book")
    for name in sections:
        stored = pages.pool.all(pages.layout.places["key", name])
        kept = stored.clone()
        stored.copy_(kept.flip(tuple(range(1, stored.ndim))))
        if not torch.equal(kept, stored):
            assert not torch.allclose(codec.scores(pages, "key", q), good, rtol=1e-6), name
        stored.copy_(kept)


def test_rows_and_blocks_alone_are_encoded_as_together(codec, numbers):
    """Neither batch neighbours nor other blocks of tokens show in a single bit."""
    layout, size = codec.layout(codec.page_tokens), codec.block_tokens
    for dtype in (torch.float32, torch.float64):
        x = numbers(3, 6 * size if size > 1 else 70).to(dtype)
        x[2] *= 5
        together = codec.encode(x)
        everything = slice(0, x.shape[2])
        for row in range(3):
            alone = codec.encode(x[row : row + 1])
            assert_same(
                part(together, slice(row, row + 1), everything, layout), part(alone, slice(None), everything, layout)
            )
        for start in range(0, x.shape[2], 2 * size):
            span = slice(start, min(start + 2 * size, x.shape[2]))
            alone = codec.encode(x[:, :, span])
            assert_same(
                part(together, slice(None), span, layout), part(alone, slice(None), slice(0, span.stop - start), layout)
            )


def test_zeros_are_stored_as_zeros(spec, codec):
    """Static ranges (KVQuant keys) have no exact zero, and come as near as a step."""
    x = torch.zeros(1, 3, codec.page_tokens, 32, dtype=torch.float64)
    decoded = codec.decode(codec.encode(x), torch.float64)
    bound = 7.0 if spec.has_static_ranges else 0.0
    assert decoded.abs().max() <= bound


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_refused(codec, numbers, bad):
    x = numbers(1, codec.page_tokens)
    x[0, 1, 5, 7] = bad
    with pytest.raises(DataError, match="cannot be quantized"):
        codec.encode(x)


def test_sixteen_bit_numbers_are_stored_as_the_same_numbers_in_32_bits(codec, numbers):
    """One arithmetic: a codec computes in float32 whatever the dtype of what it is given."""
    layout, tokens = codec.layout(codec.page_tokens), slice(0, codec.page_tokens)
    for dtype in (torch.bfloat16, torch.float16):
        x = numbers(1, codec.page_tokens).to(dtype)
        encoded = codec.encode(x)
        assert_same(
            part(encoded, tokens=tokens, layout=layout), part(codec.encode(x.float()), tokens=tokens, layout=layout)
        )
        assert codec.decode(encoded, torch.float32).dtype == torch.float32
