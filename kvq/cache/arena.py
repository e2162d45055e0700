"""Paged storage: slabs of page records that grow without copying what is there, read through page tables."""

from bisect import bisect_right
from functools import lru_cache

import numpy as np
import torch

from kvq.codecs import Codec, Encoded, PackedKV
from kvq.codecs.packed import pack_pages
from kvq.pages import bits as bits_ops
from kvq.pages.layout import PLANE_FORMATS, PageLayout, Section, SideLayout

# Unused pages are at most the larger of these: two pages, or one 64th of the arena.
MIN_SLAB_PAGES = 2
SLAB_SHARE = 64

# Records of pages: those of the heads, and the shared ones.
Views = tuple[torch.Tensor, torch.Tensor]


class Arena:
    """Page records of one head group, in slabs: ``[pages, kv_heads, record_bytes]`` uint8, and ``[pages, 1,
    shared_bytes]`` beside it where the layout has sections that all heads share.

    A page id counts over all slabs. Pages are zero when taken, so metadata of tokens not yet written stays finite.
    """

    def __init__(self, layout: PageLayout, kv_heads: int, device: torch.device):
        self.layout = layout
        self.kv_heads = kv_heads
        self.device = device
        self.slabs: list[torch.Tensor] = []
        self.shared: list[torch.Tensor] = []
        self.starts: list[int] = []
        self.pages = 0
        self.free: list[int] = []
        self._addresses = np.empty(0, np.int64)

    def __getstate__(self) -> dict:
        # Copies and pickles have memory of their own.
        return self.__dict__ | {"_addresses": np.empty(0, np.int64)}

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` zeroed pages, neighbours wherever possible."""
        if len(self.free) < count:
            size = max(MIN_SLAB_PAGES, self.pages // SLAB_SHARE, count - len(self.free))
            shape = (size, self.kv_heads, self.layout.record_bytes)
            self.slabs.append(torch.zeros(shape, dtype=torch.uint8, device=self.device))
            shape = (size, 1, self.layout.shared_bytes)
            self.shared.append(torch.zeros(shape, dtype=torch.uint8, device=self.device))
            self.starts.append(self.pages)
            self.free += range(self.pages, self.pages + size)
            self.pages += size
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def release(self, ids: set[int]) -> None:
        """Give pages back, zeroed."""
        for page in ids:
            for view in self._view([page]):
                view.zero_()
        self.free = sorted([*self.free, *ids])

    def copy_page(self, source: int, target: int) -> None:
        """Copy everything of one page to another."""
        for old, new in zip(self._view([source]), self._view([target])):
            new.copy_(old)

    def _view(self, ids: list[int]) -> Views | None:
        """The records as views, if the pages are neighbours in one slab."""
        index = bisect_right(self.starts, ids[0]) - 1
        first = ids[0] - self.starts[index]
        if ids[-1] - ids[0] != len(ids) - 1 or first + len(ids) > len(self.slabs[index]):
            return None
        if ids != list(range(ids[0], ids[0] + len(ids))):
            return None
        where = slice(first, first + len(ids))
        return self.slabs[index][where], self.shared[index][where]

    def _spans(self, ids: list[int]):
        """Split ids into runs that are views: yields (position of the run, views)."""
        start = 0
        while start < len(ids):
            index = bisect_right(self.starts, ids[start]) - 1
            limit = self.starts[index] + len(self.slabs[index])
            stop = start + 1
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1 and ids[stop] < limit:
                stop += 1
            yield slice(start, stop), self._view(ids[start:stop])
            start = stop

    def words(self, views: Views, side: str) -> torch.Tensor:
        """The words of pages, [pages, kv_heads, ...] shaped as the side's layout says (int16, or uint8 for e4m3)."""
        layout = self.layout.side(side)
        start = self.layout.offsets[f"{side}_words"]
        section = views[0][..., start : start + layout.words_bytes]
        section = section.view(torch.int16) if layout.format in PLANE_FORMATS else section
        return section.unflatten(-1, layout.words_shape)

    def section(self, views: Views, side: str, section: Section) -> torch.Tensor:
        """A section of pages, [pages, kv_heads, rows, *shape]; kv_heads is 1 where it is shared."""
        offsets = self.layout.shared_offsets if section.shared else self.layout.offsets
        start, size = offsets[f"{side}_{section.name}"], section.page_bytes(self.layout.page_tokens)
        raw = views[section.shared][..., start : start + size]
        return raw.view(getattr(torch, section.dtype)).unflatten(-1, section.page_shape(self.layout.page_tokens))

    def addresses(self, ids: list[int]) -> np.ndarray:
        """Where the heads' records of pages start in memory, int64."""
        if len(self._addresses) < self.pages:
            record = self.kv_heads * self.layout.record_bytes
            self._addresses = np.concatenate(
                [slab.data_ptr() + record * np.arange(len(slab), dtype=np.int64) for slab in self.slabs]
            )
        return self._addresses[ids]

    def packed(self, tables: list[list[int]], side: str, codec: Codec) -> PackedKV:
        """The pages of several rows as one PackedKV with words [rows, kv_heads, pages, ...].

        ``tables`` holds one list of page ids per row, all of one length.
        """
        # Rows that grow together own interleaved pages, so page-major order is often one view. Where it is not, only
        # this side's sections are gathered.
        ids = [page for pages in zip(*tables) for page in pages]
        views = [view for _, view in self._spans(ids)]
        layout = self.layout.side(side)

        def gathered(parts: list[torch.Tensor]) -> torch.Tensor:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            whole = whole.unflatten(0, (-1, len(tables)))
            return whole.permute(1, 2, 0, *range(3, whole.ndim))

        sections = {}
        for section in layout.sections:
            numbers = gathered([self.section(view, side, section) for view in views])
            sections[section.name] = numbers.squeeze(1) if section.shared else numbers
        words = gathered([self.words(view, side) for view in views])
        return PackedKV(words=words, sections=sections, codec=codec, layout=layout)

    def write_pages(self, ids: list[int], side: str, encoded: Encoded) -> None:
        """Write one side of whole pages. ``encoded`` has [rows, kv_heads, tokens, ...] for the rows' pages in turn."""
        layout = self.layout.side(side)
        words = pack_pages(encoded.codes, layout).transpose(1, 2).flatten(0, 1)
        sections = {section: self._by_page(encoded, section) for section in layout.sections}
        for where, view in self._spans(ids):
            self.words(view, side).copy_(words[where])
            for section, numbers in sections.items():
                self.section(view, side, section).copy_(numbers[where])

    def _by_page(self, encoded: Encoded, section: Section) -> torch.Tensor:
        """[rows, kv_heads, section rows, *shape] to [rows * pages, kv_heads, section rows of a page, *shape]."""
        numbers = encoded.sections[section.name]
        numbers = numbers.unsqueeze(1) if section.shared else numbers
        pages = numbers.unflatten(2, (-1, self.layout.page_tokens // section.tokens))
        return pages.transpose(1, 2).flatten(0, 1)

    def write_tokens(self, page: int, side: str, start: int, encoded: Encoded) -> None:
        """Write tokens [start, start + t) of one page of one row, keeping the tokens before ``start``.

        ``encoded`` has no row dimension. Tokens are written in order, so what the page holds after them is not kept.
        """
        layout, views = self.layout.side(side), self._view([page])
        count = encoded.codes.shape[-2]
        words = self.words(views, side)[0]
        if layout.format not in PLANE_FORMATS:
            words[:, start : start + count] = encoded.codes
        else:
            _merge_words(words, layout, start, encoded.codes)
        for section in layout.sections:
            where = slice(start // section.tokens, (start + count) // section.tokens)
            self.section(views, side, section)[0][:, where] = encoded.sections[section.name]

    @property
    def nbytes(self) -> int:
        """Allocated bytes, free pages included."""
        return sum(slab.nbytes for slab in (*self.slabs, *self.shared))

    def to(self, device: torch.device) -> None:
        """Move the slabs (offloading)."""
        self.device = device
        self._addresses = np.empty(0, np.int64)
        self.slabs = [slab.to(device) for slab in self.slabs]
        self.shared = [slab.to(device) for slab in self.shared]


def _merge_words(words: torch.Tensor, layout: SideLayout, start: int, codes: torch.Tensor) -> None:
    """Merge codes [kv_heads, t, head_dim] of tokens from ``start`` into words [kv_heads, rows, words, width]."""
    heads, count = codes.shape[:2]
    if count == 1:
        # One token touches one row of containers.
        part, row = divmod(start, layout.rows)
        frame = codes.new_zeros(heads, layout.parts, 1, layout.head_dim)
        frame[:, part, 0] = codes[:, 0]
        target, keep = words[:, row : row + 1], _keep_mask(layout, part, 1, words.device)
    else:
        frame = codes.new_zeros(heads, layout.page_tokens, layout.head_dim)
        frame[:, start : start + count] = codes
        frame = frame.view(heads, layout.parts, layout.rows, layout.head_dim)
        target, keep = words, _keep_mask(layout, start, layout.rows, words.device)
    packed = bits_ops.pack_rows(frame, layout)
    target.copy_(packed if keep is None else (target & keep) | packed)


@lru_cache(maxsize=1024)
def _keep_mask(layout: SideLayout, before: int, rows: int, device: torch.device) -> torch.Tensor | None:
    """Word mask of the first ``before`` tokens (of the first ``before`` parts for a single row); None for none."""
    if before == 0:
        return None
    frame = torch.zeros(layout.parts * rows, layout.head_dim, dtype=torch.uint8, device=device)
    frame[:before] = (1 << layout.bits) - 1
    return bits_ops.pack_rows(frame.view(layout.parts, rows, layout.head_dim), layout)
