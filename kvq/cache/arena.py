"""Paged storage: slabs of page records that grow without copying what is there, and the tables that map to them."""

import torch

from kvq.kernels import bits as bits_ops
from kvq.kernels.spec import PageLayout, SideLayout
from kvq.quantizers import Codec, PackedKV
from kvq.quantizers.packed import pack_pages

FIRST_SLAB_PAGES = 16


class Arena:
    """Page records of one layer (or head group): ``[pages, kv_heads, record_bytes]`` uint8, in slabs.

    A page id is global over the slabs. Fresh pages are zero, so that metadata of tokens not yet written stays finite.
    """

    def __init__(self, layout: PageLayout, kv_heads: int, device: torch.device):
        self.layout = layout
        self.kv_heads = kv_heads
        self.device = device
        self.slabs: list[torch.Tensor] = []
        self.free: list[int] = []
        self.pages = 0

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` zeroed pages; consecutive ids whenever a new slab can serve them all."""
        if len(self.free) >= count:
            taken, self.free = self.free[:count], self.free[count:]
            return taken
        # The slab doubles the arena, so n pages cost O(log n) allocations and no copy.
        size = max(FIRST_SLAB_PAGES, self.pages, count)
        slab = torch.zeros(size, self.kv_heads, self.layout.record_bytes, dtype=torch.uint8, device=self.device)
        ids = list(range(self.pages, self.pages + size))
        self.slabs.append(slab)
        self.pages += size
        self.free += ids[count:]
        return ids[:count]

    def release(self, ids: set[int]) -> None:
        """Give pages back; they are zeroed when given back, not when taken."""
        for page in ids:
            slab, index = self._locate(page)
            slab[index].zero_()
        self.free = sorted([*self.free, *ids])

    def _locate(self, page: int) -> tuple[torch.Tensor, int]:
        for slab in self.slabs:
            if page < len(slab):
                return slab, page
            page -= len(slab)
        raise AssertionError(f"page {page} beyond the arena")

    def records(self, ids: list[int]) -> torch.Tensor:
        """Records of the pages, [len(ids), kv_heads, record_bytes]; a view if they are neighbours in one slab."""
        slab, index = self._locate(ids[0])
        if index + len(ids) <= len(slab) and ids == list(range(ids[0], ids[0] + len(ids))):
            return slab[index : index + len(ids)]
        parts, start = [], 0
        for slab in self.slabs:
            here = [(i, page - start) for i, page in enumerate(ids) if start <= page < start + len(slab)]
            if here:
                order, local = zip(*here)
                parts.append((order, slab[torch.tensor(local, device=self.device)]))
            start += len(slab)
        out = torch.empty(len(ids), *parts[0][1].shape[1:], dtype=torch.uint8, device=self.device)
        for order, data in parts:
            out[torch.tensor(order, device=self.device)] = data
        return out

    def store(self, ids: list[int], side: str, words: torch.Tensor, meta: torch.Tensor) -> None:
        """Write one side of whole pages. words [len(ids), kv_heads, ...], meta [len(ids), kv_heads, ...]."""
        start = 0
        for slab in self.slabs:
            here = [(i, page - start) for i, page in enumerate(ids) if start <= page < start + len(slab)]
            start += len(slab)
            if not here:
                continue
            order, local = zip(*here)
            if local == tuple(range(local[0], local[0] + len(local))) and order == tuple(
                range(order[0], order[0] + len(order))
            ):
                target, source = slab[local[0] : local[0] + len(local)], slice(order[0], order[0] + len(order))
                self.words(target, side).copy_(words[source])
                self.meta(target, side).copy_(meta[source])
            else:
                target, source = slab[torch.tensor(local, device=self.device)], list(order)
                self.words(target, side).copy_(words[source])
                self.meta(target, side).copy_(meta[source])
                slab[torch.tensor(local, device=self.device)] = target

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
        rows, pages = len(tables), len(tables[0])
        # Rows that grow together own interleaved pages, so page-major order is often one view.
        ids = [table[p] for p in range(pages) for table in tables]
        records = self.records(ids).unflatten(0, (pages, rows))
        words, meta = self.words(records, side), self.meta(records, side)
        order = (1, 2, 0)
        words = words.permute(*order, *range(3, words.ndim))
        meta = meta.permute(*order, *range(3, meta.ndim))
        return PackedKV(words=words, meta=meta, codec=codec, layout=self.layout.side(side))

    @property
    def nbytes(self) -> int:
        """Allocated bytes, free pages included."""
        return sum(slab.nbytes for slab in self.slabs)


def write_tokens(
    arena: Arena, ids: list[int], side: str, start: int, codes: torch.Tensor, meta: torch.Tensor
) -> None:
    """Write tokens [start, start + t) of one page per row, keeping the tokens before ``start``.

    codes [rows, kv_heads, t, head_dim], meta as the codec's encode gives it. Later tokens of the page are undefined
    afterwards: tokens are written in order.
    """
    layout = arena.layout.side(side)
    count = codes.shape[-2]
    records = arena.records(ids)
    shared = records.data_ptr() != arena.records(ids).data_ptr()
    if layout.format == "e4m3":
        arena.words(records, side)[:, :, start : start + count] = codes
    else:
        _merge_words(arena.words(records, side), layout, start, codes)
        per = 1 if layout.axis == "token" else layout.group
        arena.meta(records, side)[:, :, start // per : (start + count) // per] = meta
    if shared:
        arena.store(ids, side, arena.words(records, side), arena.meta(records, side))


def _merge_words(words: torch.Tensor, layout: SideLayout, start: int, codes: torch.Tensor) -> None:
    """Merge codes of tokens [start, start + t) into words [rows, kv_heads, page rows, container words, width]."""
    lead, count = codes.shape[:2], codes.shape[2]
    if count == 1:
        # One token touches one row of containers.
        part, row = divmod(start, layout.rows)
        frame = codes.new_zeros(*lead, layout.parts, 1, layout.head_dim)
        frame[:, :, part, 0] = codes[:, :, 0]
        target = words[:, :, row : row + 1]
        keep = _keep_mask(layout, part, 1, words.device) if part else None
    else:
        frame = codes.new_zeros(*lead, layout.page_tokens, layout.head_dim)
        frame[:, :, start : start + count] = codes
        frame = frame.view(*lead, layout.parts, layout.rows, layout.head_dim)
        target = words
        keep = _keep_mask(layout, start, layout.rows, words.device) if start else None
    packed = bits_ops.pack_rows(frame, layout)
    target.copy_(packed if keep is None else target & keep | packed)


def _keep_mask(layout: SideLayout, before: int, rows: int, device: torch.device) -> torch.Tensor:
    """Word mask of the tokens (or, for one row, the parts) before ``before``."""
    ones = torch.zeros(layout.parts, rows, layout.head_dim, dtype=torch.uint8, device=device)
    full = (1 << layout.bits) - 1
    if rows == 1:
        ones[:before] = full
    else:
        ones.view(-1, layout.head_dim)[:before] = full
    return bits_ops.pack_rows(ones, layout)


__all__ = ["Arena", "pack_pages", "write_tokens"]
