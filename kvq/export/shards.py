"""Weight files of an export: linked where nothing in them changes, streamed tensor by tensor where something does.

A folded tensor keeps its name, shape and dtype, so a changed file has the header of its source, byte for byte. One
tensor at a time is in memory, with one head's slice of it in float64.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from kvq.errors import CheckpointError
from kvq.models.resolve import check_weights, read_header
from kvq.transforms.fold import Operation, fold

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24


def tensor_names(source: Path) -> list[str]:
    """Names of all tensors of a checkpoint, from the headers."""
    return [name for file in check_weights(source) for name in read_header(file) if name != "__metadata__"]


def place_weights(
    files: Mapping[str, Path], work: Path, operations: Mapping[str, tuple[Operation, ...]]
) -> dict[str, int]:
    """Write weight files, by their name in ``work``; returns how many were ``linked``, ``copied`` and ``folded``."""
    counts = dict.fromkeys(("linked", "copied", "folded"), 0)
    for name, file in files.items():
        # The hub cache holds symbolic links, and a hard link to one of those would not outlive the cache.
        real = file.resolve()
        if operations.keys() & read_header(real).keys():
            _fold_file(real, work / name, operations)
            counts["folded"] += 1
            continue
        try:
            os.link(real, work / name)
            counts["linked"] += 1
        except OSError:
            shutil.copyfile(real, work / name)
            counts["copied"] += 1
    return counts


def _fold_file(source: Path, target: Path, operations: Mapping[str, tuple[Operation, ...]]) -> None:
    entries = {name: entry for name, entry in read_header(source).items() if name != "__metadata__"}
    with open(source, "rb") as read, open(target, "wb") as write:
        head = read.read(8)
        write.write(head + read.read(int.from_bytes(head, "little")))
        start = read.tell()
        position = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if name not in operations:
                continue
            read.seek(start + position)
            _copy(read, write, begin - position)
            write.write(_folded(read.read(end - begin), name, entry, operations[name]))
            position = end
        read.seek(start + position)
        _copy(read, write, os.fstat(read.fileno()).st_size - read.tell())


def _copy(read, write, count: int) -> None:
    """Copy ``count`` bytes from where ``read`` stands."""
    write.flush()
    start, copied = read.tell(), 0
    try:
        # Within the kernel, where it can.
        while copied < count:
            copied += os.sendfile(write.fileno(), read.fileno(), start + copied, count - copied)
        write.seek(0, os.SEEK_END)
    except (OSError, AttributeError):
        write.seek(0, os.SEEK_END)
    read.seek(start + copied)
    while copied < count:
        chunk = read.read(min(count - copied, _CHUNK))
        if not chunk:
            raise OSError("the file became shorter while it was read")
        write.write(chunk)
        copied += len(chunk)


def _folded(content: bytes, name: str, entry: dict, operations: tuple[Operation, ...]) -> memoryview:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"tensor {name!r} has dtype {entry['dtype']}, and transforms fold into floating-point weights only: export "
            "the unquantized base model, or add --no-fold."
        )
    tensor = torch.frombuffer(bytearray(content), dtype=dtype).view(entry["shape"])
    folded = fold(tensor, operations).contiguous()
    if not bool(folded.isfinite().all()):
        raise CheckpointError(
            f"folding transforms into {name!r} gives numbers beyond {entry['dtype']}: check the checkpoint, calibrate "
            "again, or add --no-fold."
        )
    return memoryview(folded.view(torch.uint8).flatten().numpy())
