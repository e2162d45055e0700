"""Pages of a batch: the one type for what is stored. Torch reads and writes it here, kernels by table.

What lies where is the layout's (``layout.py``), whose memory it is the pool's (``pool.py``). What the numbers mean is a
codec's: ``codec.scores(pages, side, q)`` and the like multiply with pages.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvq.pages.affine import scaled, tiered
from kvq.pages.bits import merge_codes, pack_codes, unpack_codes
from kvq.pages.layout import PLANE_FORMATS, PageLayout, Section, SideLayout
from kvq.pages.meta import from_e4m3
from kvq.pages.pool import Pool, Runs


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a codec gives for x [..., K, T, D].

    codes      uint8 [..., K, T, D]; bytes of e4m3 numbers for that format.
    sections   by name of the layout's sections: [..., K, rows, *shape], without K where the section is shared. A codec
               that wraps another passes its own and the other's on together.
    """

    codes: torch.Tensor
    sections: Mapping[str, torch.Tensor]

    def tokens(self, layout: SideLayout, start: int, stop: int) -> "Encoded":
        """Tokens [start, stop), whole rows of every section."""
        sections = {}
        for section in layout.sections:
            first, last = start // section.tokens, stop // section.tokens
            sections[section.name] = self.sections[section.name].narrow(-1 - len(section.shape), first, last - first)
        return Encoded(codes=self.codes[..., start:stop, :], sections=sections)


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Packed keys and values of B sequences, whose pages are all of one number; made anew when a table changes.

    pool            where they lie.
    ids             page ids of each sequence, in order, on the host; or
    numbers         [B, pages] int32 or int64, the same as kernels take it: steps of ``pool.unit`` bytes. Pools that do
                    not grow (borrowed ones) have page ids for numbers.
    tokens          how many tokens these pages hold of each sequence, if what follows in the last page may be anything;
                    None: it is zero, or not there. Only what torch reads is concerned.
    key_scale, value_scale   static factors of all numbers of a side (e4m3 and float4).
    key_levels, value_levels what the codes of a book name, 2^bits numbers.
    """

    pool: Pool
    ids: Sequence[Sequence[int]] | None = None
    numbers: torch.Tensor | None = None
    tokens: int | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
    key_levels: tuple[float, ...] | None = None
    value_levels: tuple[float, ...] | None = None

    @classmethod
    def of(cls, layout: PageLayout, memory: torch.Tensor, table: torch.Tensor, **settings) -> "Pages":
        """Pages in memory [pages, heads, record_bytes] uint8, by a table of page numbers."""
        return cls(pool=Pool.borrow(memory, layout, memory.shape[1]), numbers=table, **settings)

    @property
    def layout(self) -> PageLayout:
        return self.pool.layout

    @property
    def heads(self) -> int:
        return self.pool.heads

    @cached_property
    def table(self) -> torch.Tensor:
        """[B, pages] int32 or int64, as kernels take it."""
        return self.pool.table(self.rows) if self.numbers is None else self.numbers

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """Page ids of each sequence on the host."""
        if self.ids is not None:
            return self.ids
        assert self.numbers is not None, "pages have a table"
        assert not self.pool.owned, "pages of a pool that grows are known by their ids"
        return self.numbers.tolist()

    def part(self, first: int, last: int, rows: Sequence[int] | None = None) -> "Pages":
        """Pages [first, last) of some sequences, all by default."""
        ids = self.rows
        ids = [ids[row][first:last] for row in (range(len(ids)) if rows is None else rows)]
        return dataclasses.replace(self, ids=ids, numbers=None)

    # Reading.

    @cached_property
    def _runs(self) -> Runs:
        # Sequences that grow together own interleaved pages, so page-major order is often one view.
        return self.pool.runs([page for pages in zip(*self.rows, strict=True) for page in pages])

    def words(self, side: str) -> torch.Tensor:
        """The words of a side, [B, K, P, *words_shape]: int16, uint8 for e4m3, fp16 for dense."""
        return self._read(side, "words", 1, self.layout.side(side).format in ("e4m3", "dense"))

    def section(self, side: str, name: str) -> torch.Tensor:
        """A section of a side, [B, K, P, rows, *shape], without K where heads share it."""
        return self._read(side, name, _named(self.layout.side(side), name).tokens, True)

    def _read(self, side: str, name: str, per_row: int, by_token: bool) -> torch.Tensor:
        place = self.layout.places[side, name]
        found = self.pool.read(self._runs, place).unflatten(0, (-1, len(self.rows)))
        if by_token and self.tokens is not None:
            size = self.layout.page_tokens
            # Blocks are written as a whole, so a row that has begun is there.
            written, last = -(-(self.tokens - (len(found) - 1) * size) // per_row), size // per_row
            if written < last:
                found = found.clone()
                found[-1].narrow(2, written, last - written).zero_()
        found = found.permute(1, 2, 0, *range(3, found.ndim))
        return found.squeeze(1) if place.shared else found

    def codes(self, side: str) -> torch.Tensor:
        """Codes of a side, [B, K, P * page_tokens, head_dim] uint8; fp16 numbers for dense."""
        return unpack_codes(self.words(side), self.layout.side(side))

    def encoded(self, side: str) -> Encoded:
        """What a codec decodes: codes [B, K, P * page_tokens, head_dim] and sections by token."""
        sections = {}
        for section in self.layout.side(side).sections:
            numbers = self.section(side, section.name)
            sections[section.name] = numbers.flatten(-2 - len(section.shape), -1 - len(section.shape))
        return Encoded(codes=self.codes(side), sections=sections)

    # Writing.

    def write(self, side: str, start: int, encoded: Encoded) -> None:
        """Write tokens [start, start + t) of every sequence; ``encoded`` has [B, K, t, ...].

        Tokens are written in order: of a page that is written in part, the tokens before ``start`` stay.
        """
        size, stop = self.layout.page_tokens, start + encoded.codes.shape[-2]
        layout, rows, position = self.layout.side(side), self.rows, start
        while position < stop:
            page, offset = divmod(position, size)
            whole = (stop - position) // size if offset == 0 else 0
            taken = whole * size or min(size - offset, stop - position)
            own = encoded.tokens(layout, position - start, position - start + taken)
            if whole:
                self._write_whole([p for ids in rows for p in ids[page : page + whole]], side, own)
            else:
                self._write_tokens([ids[page] for ids in rows], side, offset, own)
            position += taken
        if side == "value":
            self.pool.raise_limit(encoded.sections)

    def _write_whole(self, ids: list[int], side: str, encoded: Encoded) -> None:
        """Whole pages of the sequences in turn."""
        layout, places, runs = self.layout.side(side), self.layout.places, self.pool.runs(ids)
        self.pool.write(runs, places[side, "words"], pack_codes(encoded.codes, layout).transpose(1, 2).flatten(0, 1))
        for section in layout.sections:
            numbers = encoded.sections[section.name]
            numbers = numbers.unsqueeze(1) if section.shared else numbers
            numbers = numbers.unflatten(2, (-1, self.layout.page_tokens // section.tokens))
            self.pool.write(runs, places[side, section.name], numbers.transpose(1, 2).flatten(0, 1))

    def _write_tokens(self, ids: list[int], side: str, start: int, encoded: Encoded) -> None:
        """Tokens from ``start`` of one page of every sequence."""
        layout, places, runs = self.layout.side(side), self.layout.places, self.pool.runs(ids)
        place = places[side, "words"]
        if layout.format in PLANE_FORMATS:
            words = self.pool.read(runs, place)
            merge_codes(words, layout, start, encoded.codes)
            # Of pages that are no neighbours these are a copy.
            if len(runs) > 1:
                self.pool.write(runs, place, words)
        else:
            self.pool.write(runs, place, encoded.codes, start)
        for section in layout.sections:
            numbers = encoded.sections[section.name]
            numbers = numbers.unsqueeze(1) if section.shared else numbers
            self.pool.write(runs, places[side, section.name], numbers, start // section.tokens)

    def dense(self, side: str, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of a side, dequantized: [B, heads, P * page_tokens, head_dim].

        Of layouts that say, with the static numbers, all that codes mean.
        """
        layout, encoded = self.layout.side(side), self.encoded(side)
        if layout.tiers:
            return tiered(encoded.sections, layout, dtype)
        levels = self.key_levels if side == "key" else self.value_levels
        if layout.format == "e4m3":
            x = from_e4m3(encoded.codes, dtype)
        elif layout.format == "book":
            x = torch.tensor(levels, dtype=dtype, device=encoded.codes.device)[encoded.codes.int()]
        else:
            x = encoded.codes.to(dtype)
        if layout.meta is not None:
            x = scaled(x, encoded.sections, layout, dtype)
        if "norm" in encoded.sections:
            norm = encoded.sections["norm"].to(dtype).unsqueeze(-1)
            x = x * (norm if norm.ndim == x.ndim else norm.unsqueeze(1))
        x = x * (self.key_scale if side == "key" else self.value_scale)
        return x


def _named(layout: SideLayout, name: str) -> Section:
    return next(section for section in layout.sections if section.name == name)
