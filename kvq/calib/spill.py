"""Hidden states of all batches in one file, written and read batch by batch."""

import errno
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from kvq.errors import CheckpointError


class Spill:
    """Tensors [*shape, width] of one dtype, one after another.

    ``create`` reserves the whole file at once, so that a full disk shows before any work, under another name until
    ``finish``. What is written goes through the page cache, which is not this process's memory.
    """

    def __init__(self, path: Path, shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype, file):
        self.path, self.width, self.dtype, self._file = path, width, dtype, file
        self.shapes = list(shapes)
        sizes = [math.prod(shape) * width * dtype.itemsize for shape in self.shapes]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    @classmethod
    def create(cls, path: Path, shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype) -> "Spill":
        """Raises CheckpointError if there is no room."""
        file = open(_unfinished(path), "w+b", buffering=0)  # noqa: SIM115
        spill = cls(path, shapes, width, dtype, file)
        size = spill._starts[-1]
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            spill.abandon()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckpointError(
                f"hidden states take {size / 1e9:,.1f} GB twice in {str(path.parent)!r}, and the disk is full: free "
                "space, use fewer samples, or write the statistics to another disk."
            ) from None
        os.ftruncate(file.fileno(), size)
        return spill

    @classmethod
    def open(cls, path: Path, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> "Spill":
        """Open a finished file; the width follows from its size."""
        numbers = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        width, rest = divmod(path.stat().st_size, numbers)
        if rest or not width:
            raise CheckpointError(f"{path.name!r} is not what this run wrote: remove its folder and calibrate again.")
        return cls(path, shapes, width, dtype, open(path, "rb", buffering=0))

    def write(self, index: int, x: torch.Tensor) -> None:
        data = memoryview(x.to(self.dtype).contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
        start = self._starts[index]
        while data:
            written = os.pwrite(self._file.fileno(), data, start)
            data, start = data[written:], start + written

    def read(self, index: int) -> torch.Tensor:
        """[*shape, width] on the CPU."""
        start, stop = self._starts[index : index + 2]
        buffer = bytearray(stop - start)
        self._file.seek(start)
        view = memoryview(buffer)
        while view:
            got = self._file.readinto(view)
            if not got:
                raise CheckpointError(f"{self.path.name!r} ends early: remove its folder and calibrate again.")
            view = view[got:]
        return torch.frombuffer(buffer, dtype=self.dtype).view(*self.shapes[index], self.width)

    def finish(self) -> None:
        """Flush a created file and give it its name."""
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(_unfinished(self.path), self.path)

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        """Remove a created file that was not finished."""
        self._file.close()
        _unfinished(self.path).unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")
