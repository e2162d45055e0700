"""Weight files of an export: linked where nothing in them changes, copied and overwritten in part where something does.

A folded tensor keeps its name, shape and dtype, so it takes the very bytes of its original in a copy of the file. One
tensor at a time is in memory, with one head's slice of it in float64.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from kvq.errors import CheckpointError
from kvq.models.resolve import check_weights, read_header
from kvq.models.stored import StoredTensor, stored_tensors
from kvq.transforms.fold import Operation, fold


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
    """Copy a file within the kernel, then overwrite the tensors that change: the others are never read."""
    shutil.copyfile(source, target)
    with open(target, "r+b", buffering=0) as file:
        for tensor in stored_tensors(target):
            if tensor.name in operations:
                file.seek(tensor.start)
                file.write(_folded(tensor, operations[tensor.name]))


def _folded(tensor: StoredTensor, operations: tuple[Operation, ...]) -> memoryview:
    if tensor.dtype is None:
        raise CheckpointError(
            f"tensor {tensor.name!r} has dtype {tensor.dtype_name}, and transforms fold into floating-point weights "
            "only: export the unquantized base model, or add --no-fold."
        )
    folded = fold(tensor.read(), operations).contiguous()
    # Infinite and undefined numbers are the extremes of whatever holds them; looking at each is slow in 16 bits.
    if folded.numel() and not bool(torch.stack(folded.aminmax()).isfinite().all()):
        raise CheckpointError(
            f"folding transforms into {tensor.name!r} gives numbers beyond {tensor.dtype_name}: check the checkpoint, "
            "calibrate again, or add --no-fold."
        )
    return memoryview(folded.view(torch.uint8).flatten().numpy())
