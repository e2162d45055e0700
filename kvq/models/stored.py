"""Tensors of safetensors files, read one at a time from where they lie; and files whose bytes are fixed."""

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save

from kvq.errors import CheckpointError
from kvq.models.names import TensorNames
from kvq.models.resolve import check_weights, read_header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies.

    start         first byte in ``file``, of ``nbytes``.
    dtype         None for what is no floating-point number of 16 bits or more; ``dtype_name`` is the file's own word.
    """

    name: str
    file: Path
    start: int
    nbytes: int
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype | None:
        return _DTYPES.get(self.dtype_name)

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
    header.pop("__metadata__", None)
    with open(file, "rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        yield StoredTensor(
            name=name, file=file, start=start + begin, nbytes=end - begin, shape=tuple(entry["shape"]),
            dtype_name=entry["dtype"],
        )  # fmt: skip


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name."""
    return {tensor.name: tensor for file in check_weights(folder) for tensor in stored_tensors(file)}


class Weights:
    """Tensors of the checkpoint in ``folder`` by the names of the text model, read when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        return tensors_of(self.folder)

    @cached_property
    def _names(self) -> TensorNames:
        return TensorNames(self._tensors)

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor in float32, None if the checkpoint has none of this name or does not hold it as numbers.

        Raises CheckpointError if its file cannot be read.
        """
        found = self._names.find(name)
        # Quantized weights are read by what made them.
        if found is None or self._tensors[found].dtype is None:
            return None
        try:
            return self._tensors[found].read().float()
        except OSError:
            raise CheckpointError(
                f"tensor {found!r} of {self.folder.name!r} cannot be read: copy or download the model again."
            ) from None


def serialized(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Pieces of a safetensors file with its metadata in a fixed order; the library's own order changes from run to run.

    Tensors are laid out as the library does: by falling size of their items, then by name.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    # An empty model of the layout, so that types are named by the library and no data is held twice.
    plain = save({name: torch.empty(0, dtype=tensors[name].dtype) for name in order})
    types = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": types[name]["dtype"], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data to begin at a multiple of 8 bytes.
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name in order:
        yield tensor_bytes(tensors[name])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    # Through bytes, because numpy has no bfloat16.
    return memoryview(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
