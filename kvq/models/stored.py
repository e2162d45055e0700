"""Tensors of a checkpoint, read one at a time from where they lie in their file."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from kvq.errors import CheckpointError
from kvq.models.resolve import check_weights, read_header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies.

    start         first byte in ``file``.
    dtype         None for what is no floating-point number of 16 bits or more; ``dtype_name`` is the file's own word.
    """

    name: str
    file: Path
    start: int
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype | None:
        return _DTYPES.get(self.dtype_name)

    @property
    def nbytes(self) -> int:
        """Bytes in the file; of a tensor whose dtype is known."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor in memory of its own."""
        content = bytearray(self.nbytes)
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start)
            if stream.readinto(content) != len(content):
                raise CheckpointError(f"{self.file.name!r} became shorter while it was read: copy it again.")
        if not content:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)

    def mapped(self) -> torch.Tensor:
        """The tensor over the file's own pages, of which only those that are looked at are read; not to be written."""
        with open(self.file, "rb") as stream:
            begin = self.start - self.start % mmap.ALLOCATIONGRANULARITY
            length = self.start - begin + self.nbytes
            # Private, since torch takes no memory that cannot be written to: writing would not reach the file.
            pages = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
        pages = memoryview(pages)[self.start - begin :]
        return torch.frombuffer(pages, dtype=self.dtype, count=prod(self.shape)).view(self.shape)


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file, in the order in which they lie there."""
    header = read_header(file)
    with open(file, "rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        yield StoredTensor(
            name=name,
            file=file,
            start=start + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype_name=entry["dtype"],
        )


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name."""
    return {tensor.name: tensor for file in check_weights(folder) for tensor in stored_tensors(file)}
