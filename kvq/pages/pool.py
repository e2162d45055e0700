"""The memory of pages: owned, or borrowed from whoever allocated it.

A page is one contiguous piece: the records of its heads one after the other, then the record that they share. Where
pages lie is known here alone. Kernels get it as a table of numbers: page number n starts ``n * unit`` bytes after
``base``. Torch gets views, of neighbours at once where pages lie side by side.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvq.errors import CacheError
from kvq.pages.layout import PageLayout, Place
from kvq.pages.meta import largest_scales

# Unused pages are at most the larger of these: two pages, or one 64th of the pool.
MIN_SLAB_PAGES = 2
SLAB_SHARE = 64
# Where pages stand among those asked for, and themselves as a view, [pages, page_bytes].
Runs = list[tuple[slice, torch.Tensor]]
# Kernels read up to 16 bytes at once, so pages start at multiples of it.
ALIGNMENT = 16


class Pool:
    """Pages of ``heads`` KV heads, in slabs ``[pages, page_bytes]`` uint8. A page id counts over all slabs.

    ``Pool(layout, heads, device)`` owns its memory and grows without copying what is there. Its pages are zero when
    taken and free when nobody reads them (``readers``). ``Pool.borrow`` takes memory that somebody else manages:
    nothing is allocated, released or cleared there.
    """

    def __init__(self, layout: PageLayout, heads: int, device: torch.device | str = "cpu"):
        self.layout, self.heads, self.device = layout, heads, torch.device(device)
        self.slabs: list[torch.Tensor] = []
        self.starts: list[int] = []
        self.pages = 0
        # By owned page, how many tables name it.
        self.readers = np.zeros(0, np.int32)
        self.owned = True
        self._value_limit: torch.Tensor | None = None
        self._addresses = np.empty(0, np.int64)

    @classmethod
    def borrow(
        cls, memory: torch.Tensor, layout: PageLayout, heads: int, *, stride: int | None = None, offset: int = 0
    ) -> "Pool":
        """A pool in memory of somebody else, such as an engine's cache tensor of one layer.

        memory   of any dtype: [pages, ...], whose first stride is that between pages and whose pages are contiguous; or
                 one dimension, with ``stride`` (bytes between pages) and ``offset`` (bytes before the first).
        Raises CacheError if pages do not fit there or do not start at multiples of 16 bytes.
        """
        pool = cls(layout, heads, memory.device)
        size = pool.page_bytes
        if memory.ndim > 1:
            stride, pages = memory.stride(0) * memory.element_size(), memory.shape[0]
            room = memory[0].numel() * memory.element_size() - offset if pages else size
            if pages and not memory[0].is_contiguous():
                raise CacheError(
                    f"a page of memory {tuple(memory.shape)} with strides {memory.stride()} is not contiguous: lay its "
                    "heads and tokens side by side."
                )
        else:
            total = memory.numel() * memory.element_size() - offset
            stride = stride or size
            pages = max(0, (total - size) // stride + 1)
            room = min(stride, total)
        if room < size or stride < size:
            raise CacheError(f"{room} bytes do not hold a page of {size}: give every page at least that many.")
        start = memory.storage_offset() * memory.element_size() + offset
        # A byte view, whatever the memory's dtype is.
        flat = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory.untyped_storage())
        slab = flat.as_strided((pages, size), (stride, 1), start)
        if stride % ALIGNMENT or slab.data_ptr() % ALIGNMENT:
            raise CacheError(
                f"pages {stride} bytes apart from address {slab.data_ptr()} on do not all start at multiples of "
                f"{ALIGNMENT} bytes, as kernels need: align the memory."
            )
        pool.slabs, pool.starts, pool.pages, pool.owned = [slab], [0], pages, False
        if layout.value.scaled_by_token:
            pool._value_limit = torch.zeros(heads, device=memory.device)
        return pool

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes(self.heads)

    def __getstate__(self) -> dict:
        # Copies and pickles have memory of their own.
        return self.__dict__ | {"_addresses": np.empty(0, np.int64)}

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` zeroed pages of one reader, neighbours wherever possible. Raises CacheError if borrowed."""
        self._refuse_borrowed("allocate")
        free = np.flatnonzero(self.readers == 0)
        if len(free) < count:
            size = max(MIN_SLAB_PAGES, self.pages // SLAB_SHARE, count - len(free))
            self.slabs.append(torch.zeros(size, self.page_bytes, dtype=torch.uint8, device=self.device))
            self.starts.append(self.pages)
            self.readers = np.append(self.readers, np.zeros(size, np.int32))
            free = np.append(free, np.arange(self.pages, self.pages + size))
            self.pages += size
        self.readers[free[:count]] = 1
        return free[:count].tolist()

    def share(self, ids: Sequence[int]) -> None:
        """One reader more for every mention of a page. Raises CacheError in borrowed memory."""
        self._refuse_borrowed("share")
        np.add.at(self.readers, np.array(ids, np.int64), 1)

    def release(self, ids: Sequence[int]) -> None:
        """One reader less for every mention of a page; free, and zeroed, without any. Raises CacheError if borrowed."""
        self._refuse_borrowed("release")
        pages, mentions = np.unique(np.array(ids, np.int64), return_counts=True)
        self.readers[pages] -= mentions.astype(np.int32)
        free = pages[self.readers[pages] == 0]
        slabs = np.searchsorted(self.starts, free, "right") - 1
        for index in np.unique(slabs):
            rows = torch.from_numpy(free[slabs == index] - self.starts[index])
            # Whole words: four times as fast as bytes on the CPU.
            self.slabs[index].view(torch.int64)[rows.to(self.device)] = 0

    def copy_page(self, page: int) -> int:
        """Give one reader of a page a copy of its own, which is returned. Raises CacheError in borrowed memory."""
        (copy,) = self.allocate(1)
        self._run([copy]).copy_(self._run([page]))
        self.release([page])
        return copy

    def _refuse_borrowed(self, what: str) -> None:
        if not self.owned:
            raise CacheError(
                f"cannot {what} pages in borrowed memory: whoever lends it manages its pages; give tables of theirs."
            )

    def _run(self, ids: Sequence[int]) -> torch.Tensor:
        """Neighbouring pages as a view, [pages, page_bytes]."""
        index = bisect_right(self.starts, ids[0]) - 1
        first = ids[0] - self.starts[index] if index >= 0 else -1
        if first < 0 or first + len(ids) > len(self.slabs[index]):
            raise CacheError(f"page {ids[-1]} is not among the {self.pages} of the pool: check the table.")
        return self.slabs[index][first : first + len(ids)]

    def runs(self, ids: Sequence[int]) -> Runs:
        """Cut ids into runs of neighbours, as ``read`` and ``write`` take them."""
        found, start = [], 0
        while start < len(ids):
            index = bisect_right(self.starts, ids[start]) - 1
            limit = self.starts[index] + len(self.slabs[index])
            stop = start + 1
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1 and ids[stop] < limit:
                stop += 1
            found.append((slice(start, stop), self._run(ids[start:stop])))
            start = stop
        return found

    def _view(self, pages: torch.Tensor, place: Place) -> torch.Tensor:
        """One part of pages [n, page_bytes] as a view, [n, heads, *shape]; heads is 1 where they share it."""
        record = self.layout.record_bytes
        heads = pages[:, self.heads * record :] if place.shared else pages[:, : self.heads * record]
        heads = heads.unflatten(1, (1 if place.shared else self.heads, -1))
        part = heads[..., place.start : place.start + place.nbytes]
        return part.view(getattr(torch, place.dtype)).unflatten(-1, place.shape)

    def read(self, runs: Runs, place: Place) -> torch.Tensor:
        """One part of pages, [pages, heads, *shape]: a view where the pages are neighbours, else a copy."""
        views = [self._view(run, place) for _, run in runs]
        return views[0] if len(views) == 1 else torch.cat(views)

    def write(self, runs: Runs, place: Place, numbers: torch.Tensor, first: int = 0) -> None:
        """Set rows of one part of pages from ``first`` on to numbers [pages, heads, rows, ...]."""
        for where, run in runs:
            self._view(run, place).narrow(2, first, numbers.shape[2]).copy_(numbers[where])

    def part(self, page: int, place: Place) -> torch.Tensor:
        """One part of one page as a view, [heads, *shape]."""
        return self._view(self._run([page]), place)[0]

    def all(self, place: Place) -> torch.Tensor:
        """One part of every page as a view, [pages, heads, *shape]; of a pool that has not grown."""
        (slab,) = self.slabs
        return self._view(slab, place)

    def records(self, page: int) -> torch.Tensor:
        """The heads' records of one page as a view, [heads, record_bytes]."""
        return self._run([page])[0, : self.heads * self.layout.record_bytes].view(self.heads, -1)

    def addresses(self, ids: Sequence[int]) -> np.ndarray:
        """Where pages start in memory, int64."""
        if len(self._addresses) < self.pages:
            found = [slab.data_ptr() + slab.stride(0) * np.arange(len(slab), dtype=np.int64) for slab in self.slabs]
            self._addresses = np.concatenate(found)
        return self._addresses[ids]

    @property
    def base(self) -> torch.Tensor:
        """The bytes from which kernels count."""
        return self.slabs[0] if self.slabs else torch.zeros(ALIGNMENT, dtype=torch.uint8, device=self.device)

    @property
    def unit(self) -> int:
        """Bytes that one step of a page number is: of borrowed memory a page, so that the lender's tables are right."""
        return ALIGNMENT if self.owned else self.slabs[0].stride(0)

    def numbers(self, ids: Sequence[int]) -> np.ndarray:
        """Page ids as the numbers that kernels are given, int64. Slabs lie anywhere, so numbers are distances."""
        return (self.addresses(ids) - self.base.data_ptr()) // self.unit

    def table(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Tables of page ids as kernels take them, [rows, longest] int64 on the pool's device."""
        table = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.int64)
        for row, ids in enumerate(rows):
            if ids:
                table[row, : len(ids)] = torch.from_numpy(self.numbers(ids))
        return table.to(self.device)

    @property
    def value_limit(self) -> torch.Tensor:
        """float32 [heads]: an upper bound of every scale of the values, norms included, where they are scaled by token.

        With it, attention weights keep their precision in fp16 however small the scales are. It is found from the pages
        when it is first asked for, and raised by whoever writes values from then on, kernels included. Of borrowed
        memory it is raised from 0: what others wrote there before is theirs to add.
        """
        if self._value_limit is None:
            self._value_limit = torch.zeros(self.heads, device=self.device)
            places = {name: self.layout.places["value", name] for name in self._scale_sections}
            for slab in self.slabs:
                self.raise_limit({name: self._view(slab, place) for name, place in places.items()})
        return self._value_limit

    @property
    def _scale_sections(self) -> list[str]:
        return [section.name for section in self.layout.value.sections if section.name in ("meta", "norm")]

    def raise_limit(self, sections: Mapping[str, torch.Tensor]) -> None:
        """Values with these sections, [n, heads, rows, *shape], were written."""
        if self._value_limit is not None and self.layout.value.scaled_by_token:
            torch.maximum(self._value_limit, largest_scales(sections, self.layout.value), out=self._value_limit)

    def forget_limit(self) -> None:
        """Values were written by address (C++): find the bound again when it is asked for."""
        if self.owned:
            self._value_limit = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated here, free pages included; borrowed ones are somebody else's."""
        return sum(slab.nbytes for slab in self.slabs) if self.owned else 0

    def to(self, device: torch.device) -> None:
        """Move the slabs (offloading). Raises CacheError in borrowed memory."""
        self._refuse_borrowed("move")
        self.device = device
        self._addresses = np.empty(0, np.int64)
        self._value_limit = None
        self.slabs = [slab.to(device) for slab in self.slabs]
