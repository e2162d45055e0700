"""Packed words against an oracle that sets one bit at a time, straight from the layout's description."""

import pytest
import torch

from kvq.pages.bits import float_tile, pack_rows, unpack_rows
from kvq.pages.layout import FIELDS, SideLayout

LAYOUTS = [(bits, head_dim) for bits in (2, 3, 4, 8) for head_dim in (16, 64, 80, 96, 128, 256)]


def layout_of(bits, head_dim, page_tokens=64):
    return SideLayout(
        format="affine", bits=bits, head_dim=head_dim, page_tokens=page_tokens, axis="token", group=head_dim
    )


def field_bits(bits: int, f: int) -> list[tuple[int, int]]:
    """(word, bit) of each bit of field f, least significant first; written out from the table in the specification."""
    if bits == 8:
        return [(0, 8 * f + i) for i in range(8)]
    if bits == 4:
        return [(0, bit) for bit in ([2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 0, 1])[f]]
    if bits == 2:
        return [(0, 2 * f), (0, 2 * f + 1)]
    if f == 15:
        return [(0, 15), (1, 15), (2, 15)]
    return [(f // 5, 3 * (f % 5) + i) for i in range(3)]


def oracle_pack(codes: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """Pack one page's codes [page_tokens, head_dim] bit by bit."""
    words = torch.zeros(layout.words_shape, dtype=torch.int64)
    for f in range(FIELDS[layout.bits]):
        part, chunk = divmod(f, layout.chunks)
        for row in range(layout.rows):
            for w in range(layout.width):
                code = int(codes[part * layout.rows + row, chunk * layout.width + w])
                for i, (word, bit) in enumerate(field_bits(layout.bits, f)):
                    words[row, word, w] |= (code >> i & 1) << bit
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def random_codes(layout, *lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, layout.page_tokens, layout.head_dim)
    return torch.randint(0, 1 << layout.bits, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("bits", "head_dim"), [(2, 16), (2, 64), (3, 32), (3, 96), (4, 80), (4, 64), (8, 48)])
def test_pack_sets_exactly_the_bits_of_the_specification(bits, head_dim):
    layout = layout_of(bits, head_dim)
    codes = random_codes(layout)
    packed = pack_rows(codes.view(layout.parts, layout.rows, head_dim), layout)
    assert torch.equal(packed, oracle_pack(codes, layout))


def test_every_bit_of_a_container_belongs_to_exactly_one_field():
    for bits, fields in FIELDS.items():
        used = [place for f in range(fields) for place in field_bits(bits, f)]
        words = 3 if bits == 3 else 1
        assert sorted(used) == [(word, bit) for word in range(words) for bit in range(16)]


@pytest.mark.parametrize(("bits", "head_dim"), LAYOUTS)
def test_unpack_inverts_pack_and_stores_no_spare_bit(bits, head_dim):
    layout = layout_of(bits, head_dim)
    codes = random_codes(layout, 2, 3)
    packed = pack_rows(codes.view(2, 3, layout.parts, layout.rows, head_dim), layout)
    assert packed.nbytes * 8 == bits * codes.numel()
    assert packed.shape[2:] == layout.words_shape
    assert torch.equal(unpack_rows(packed, layout).view_as(codes), codes)


@pytest.mark.parametrize(("bits", "head_dim"), LAYOUTS)
def test_float_tile_holds_the_codes_times_its_factors(bits, head_dim):
    layout = layout_of(bits, head_dim)
    codes = random_codes(layout, 2, 3, 5)
    packed = pack_rows(codes.view(2, 3, 5, layout.parts, layout.rows, head_dim), layout)
    tile, factors = float_tile(packed, layout, torch.float64)
    exact = tile / factors.view(layout.parts, 1, 1, head_dim, 1)
    back = exact.unflatten(-1, (5, layout.rows)).permute(1, 2, 4, 0, 5, 3).reshape(codes.shape)
    assert torch.equal(back, codes.double())
    assert all(f == 2 ** round(torch.log2(torch.tensor(f)).item()) for f in factors.flatten().tolist())


def test_a_page_holds_whole_rows_for_every_head_size():
    for bits, head_dim in LAYOUTS:
        layout = layout_of(bits, head_dim)
        assert layout.rows * layout.parts == layout.page_tokens
        assert layout.chunks * layout.width == head_dim
        # A row is made of whole atoms, so that one matrix instruction never straddles two fields.
        assert layout.width % 16 == 0
