"""Paged storage: slabs of page records that grow without copying what is there, read through page tables."""

from bisect import bisect_right
from functools import lru_cache

import torch

from kvq.kernels import bits as bits_ops
from kvq.kernels.spec import PageLayout, SideLayout
from kvq.quantizers import Codec, PackedKV

# Unused pages are at most the larger of these: two pages, or one 64th of the arena.
MIN_SLAB_PAGES = 2
SLAB_SHARE = 64


class Arena:
    """Page records of one head group: ``[pages, kv_heads, record_bytes]`` uint8, in slabs.

    A page id counts over all slabs. Pages are zero when taken, so metadata of tokens not yet written stays finite.
    """

    def __init__(self, layout: PageLayout, kv_heads: int, device: torch.device):
        self.layout = layout
        self.kv_heads = kv_heads
        self.device = device
        self.slabs: list[torch.Tensor] = []
        self.starts: list[int] = []
        self.pages = 0
        self.free: list[int] = []

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` zeroed pages, neighbours wherever possible."""
        if len(self.free) < count:
            size = max(MIN_SLAB_PAGES, self.pages // SLAB_SHARE, count - len(self.free))
            shape = (size, self.kv_heads, self.layout.record_bytes)
            self.slabs.append(torch.zeros(shape, dtype=torch.uint8, device=self.device))
            self.starts.append(self.pages)
            self.free += range(self.pages, self.pages + size)
            self.pages += size
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def release(self, ids: set[int]) -> None:
        """Give pages back, zeroed."""
        for page in ids:
            self._view([page]).zero_()
        self.free = sorted([*self.free, *ids])

    def _view(self, ids: list[int]) -> torch.Tensor | None:
        """The records as a view, if the pages are neighbours in one slab."""
        index = bisect_right(self.starts, ids[0]) - 1
        first = ids[0] - self.starts[index]
        if ids[-1] - ids[0] != len(ids) - 1 or first + len(ids) > len(self.slabs[index]):
            return None
        if ids != list(range(ids[0], ids[0] + len(ids))):
            return None
        return self.slabs[index][first : first + len(ids)]

    def _spans(self, ids: list[int]):
        """Split ids into runs that are views: yields (position of the run, view)."""
        start = 0
        while start < len(ids):
            index = bisect_right(self.starts, ids[start]) - 1
            limit = self.starts[index] + len(self.slabs[index])
            stop = start + 1
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1 and ids[stop] < limit:
                stop += 1
            yield slice(start, stop), self._view(ids[start:stop])
            start = stop

    def records(self, ids: list[int]) -> torch.Tensor:
        """Records of the pages, [len(ids), kv_heads, record_bytes]; a copy if they are not neighbours."""
        view = self._view(ids)
        return view if view is not None else torch.cat([view for _, view in self._spans(ids)])

    def words(self, records: torch.Tensor, side: str) -> torch.Tensor:
        """The words section of records, shaped as the side's layout says (int16, or uint8 for e4m3)."""
        layout = self.layout.side(side)
        start = self.layout.offsets[f"{side}_words"]
        section = records[..., start : start + layout.words_bytes]
        section = section if layout.format == "e4m3" else section.view(torch.int16)
        return section.unflatten(-1, layout.words_shape)

    def meta(self, records: torch.Tensor, side: str) -> torch.Tensor:
        """The metadata section of records, fp16."""
        layout = self.layout.side(side)
        start = self.layout.offsets[f"{side}_meta"]
        return records[..., start : start + layout.meta_bytes].view(torch.float16).unflatten(-1, layout.meta_shape)

    def packed(self, tables: list[list[int]], side: str, codec: Codec) -> PackedKV:
        """The pages of several rows as one PackedKV with words [rows, kv_heads, pages, ...].

        ``tables`` holds one list of page ids per row, all of one length.
        """
        # Rows that grow together own interleaved pages, so page-major order is often one view. Where it is not, only
        # this side's sections are gathered.
        ids = [page for pages in zip(*tables) for page in pages]
        views = [view for _, view in self._spans(ids)]
        sections = []
        for section in (self.words, self.meta):
            parts = [section(view, side) for view in views]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            whole = whole.unflatten(0, (-1, len(tables)))
            sections.append(whole.permute(1, 2, 0, *range(3, whole.ndim)))
        return PackedKV(words=sections[0], meta=sections[1], codec=codec, layout=self.layout.side(side))

    def write_pages(self, ids: list[int], side: str, words: torch.Tensor, meta: torch.Tensor) -> None:
        """Write one side of whole pages: words and meta [len(ids), kv_heads, ...]."""
        for where, view in self._spans(ids):
            self.words(view, side).copy_(words[where])
            self.meta(view, side).copy_(meta[where])

    def write_tokens(self, page: int, side: str, start: int, codes: torch.Tensor, meta: torch.Tensor) -> None:
        """Write tokens [start, start + t) of one page, keeping the tokens before ``start``.

        codes [kv_heads, t, head_dim] uint8, meta as the codec's encode gives it. Tokens are written in order, so
        what the page holds after them is not kept.
        """
        layout, view, count = self.layout.side(side), self._view([page])[0], codes.shape[-2]
        if layout.format == "e4m3":
            self.words(view, side)[:, start : start + count] = codes
            return
        _merge_words(self.words(view, side), layout, start, codes)
        per = 1 if layout.axis == "token" else layout.group
        self.meta(view, side)[:, start // per : (start + count) // per] = meta

    @property
    def nbytes(self) -> int:
        """Allocated bytes, free pages included."""
        return sum(slab.nbytes for slab in self.slabs)

    def to(self, device: torch.device) -> None:
        """Move the slabs (offloading)."""
        self.device = device
        self.slabs = [slab.to(device) for slab in self.slabs]


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
