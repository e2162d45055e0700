"""Weight files of an export: linked where nothing in them changes, else copied but for the tensors that change.

A folded tensor keeps its name, shape and dtype, so it takes the very place of its original in the new file. One tensor
at a time is in memory, with one head's slice of it in float64.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from kvq.errors import CheckpointError
from kvq.models.resolve import check_weights, read_header
from kvq.models.stored import StoredTensor, stored_tensors
from kvq.transforms.fold import Operation, fold

# Bytes copied at a time: what a core's cache holds.
_BLOCK = 2**20


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
    """Write the tensors that change, while another thread copies what lies between them."""
    tensors = [tensor for tensor in stored_tensors(source) if tensor.name in operations]
    for tensor in tensors:
        _refuse_integers(tensor)
    with open(target, "xb") as file:
        file.truncate(source.stat().st_size)
    with _threads_but_one(), ThreadPoolExecutor(max_workers=1) as pool, open(target, "r+b", buffering=0) as file:
        rest = pool.submit(_copy_between, source, target, [(tensor.start, tensor.nbytes) for tensor in tensors])
        for tensor in tensors:
            file.seek(tensor.start)
            _write(file, _folded(tensor, operations[tensor.name]))
        rest.result()


@contextlib.contextmanager
def _threads_but_one() -> Iterator[None]:
    """Products leave a core to the copy: sharing one with it, they take twice as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _copy_between(source: Path, target: Path, left_out: list[tuple[int, int]]) -> None:
    """Copy all but some spans (start, bytes), which ascend and do not overlap."""
    block = memoryview(bytearray(_BLOCK))
    begins = [0, *(start + size for start, size in left_out)]
    ends = [*(start for start, _ in left_out), source.stat().st_size]
    with open(source, "rb", buffering=0) as reader, open(target, "r+b", buffering=0) as writer:
        for begin, end in zip(begins, ends):
            reader.seek(begin)
            writer.seek(begin)
            while begin < end:
                count = reader.readinto(block[: min(_BLOCK, end - begin)])
                if not count:
                    raise CheckpointError(f"{source.name!r} became shorter while it was read: copy it again.")
                _write(writer, block[:count])
                begin += count


def _write(file: BinaryIO, content: memoryview) -> None:
    """All of it: the system may take less at a time."""
    while content:
        content = content[file.write(content) :]


def _refuse_integers(tensor: StoredTensor) -> None:
    if tensor.dtype is None:
        raise CheckpointError(
            f"tensor {tensor.name!r} has dtype {tensor.dtype_name}, and transforms fold into floating-point weights "
            "only: export the unquantized base model, or add --no-fold."
        )


def _folded(tensor: StoredTensor, operations: tuple[Operation, ...]) -> memoryview:
    folded = fold(tensor.read(), operations).contiguous()
    # Infinite and undefined numbers are the extremes of whatever holds them; looking at each is slow in 16 bits.
    if folded.numel() and not bool(torch.stack(folded.aminmax()).isfinite().all()):
        raise CheckpointError(
            f"folding transforms into {tensor.name!r} gives numbers beyond {tensor.dtype_name}: check the checkpoint, "
            "calibrate again, or add --no-fold."
        )
    return memoryview(folded.view(torch.uint8).flatten().numpy())
