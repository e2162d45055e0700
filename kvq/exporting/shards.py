"""Weight files of an export: linked where nothing in them changes, else copied but for the tensors that change.

A folded tensor keeps its name, shape and dtype, so it takes the very place of its original in the new file. One tensor
at a time is in memory, with a head's slice or a block of it in float64.
"""

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

from kvq.errors import CheckpointError
from kvq.exporting.atomic_folder import flush_file
from kvq.models.stored import StoredTensor, stored_tensors, tensor_bytes
from kvq.transforms.fold import Operation, fold

# Bytes copied at a time: what a core's cache holds.
_BLOCK = 2**20


@contextmanager
def placing_weights(
    files: Mapping[str, Path], work: Path, operations: Mapping[str, tuple[Operation, ...]]
) -> Iterator["PlacedWeights"]:
    """Write weight files, by their name in ``work``; complete when the block ends.

    Inside the block another thread copies what does not change, and the block may put tensors that it has folded; the
    others are folded at its end. Files with folded tensors are on the disk then: nothing else holds their contents.

    Raises CheckpointError for tensors that cannot take a fold, and OSError as the file system does.
    """
    placed = PlacedWeights(operations)
    for name, file in files.items():
        # The hub cache holds symbolic links, and a hard link to one of those would not outlive the cache.
        placed.place(file.resolve(), work / name)
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            placed.start(pool)
            yield placed
            placed.finish()
        finally:
            placed.stop()


class PlacedWeights:
    """Weight files while they are written.

    counts   how many are ``linked``, ``copied`` and ``folded``.
    """

    def __init__(self, operations: Mapping[str, tuple[Operation, ...]]):
        self.counts = dict.fromkeys(("linked", "copied", "folded"), 0)
        self._operations = operations
        # Source, target, and the spans that are folded, by file.
        self._copies: list[tuple[Path, Path, list[tuple[int, int]]]] = []
        # Folded tensors that are not written yet, and the files they go to, in the order in which they lie there.
        self._missing: dict[str, tuple[StoredTensor, Path]] = {}
        self._threads = torch.get_num_threads()
        # What has come to its end: copying; putting; the whole block.
        self._copied, self._all_put, self._stopped = threading.Event(), threading.Event(), threading.Event()

    def place(self, source: Path, target: Path) -> None:
        """Link a file if nothing in it changes; else make room for what does."""
        changed = [tensor for tensor in stored_tensors(source) if tensor.name in self._operations]
        if not changed:
            with suppress(OSError):
                os.link(source, target)
                self.counts["linked"] += 1
                return
        for tensor in changed:
            _refuse_integers(tensor)
            self._missing[tensor.name] = tensor, target
        if changed:
            # Not of a file that is copied whole: ext4 writes one that is cut to nothing and filled again to the disk.
            with open(target, "xb") as file:
                file.truncate(source.stat().st_size)
        self._copies.append((source, target, [(tensor.start, tensor.nbytes) for tensor in changed]))
        self.counts["folded" if changed else "copied"] += 1

    def start(self, pool: ThreadPoolExecutor) -> None:
        if self._copies:
            # Products leave a core to the copy: sharing one with it, they take twice as long.
            torch.set_num_threads(max(1, self._threads - 1))
        if not self._missing:
            self._all_put.set()
        self._copying = pool.submit(self._copy)

    def put(self, name: str, folded: torch.Tensor) -> None:
        """Write a folded tensor, which has the shape and dtype of its original; the second time it is let go."""
        if name not in self._missing:
            return
        if self._copied.is_set():
            torch.set_num_threads(self._threads)
        if self._copying.done():
            # What failed there need not wait for the end.
            self._copying.result()
        tensor, target = self._missing[name]
        content = _bytes_of(folded, tensor)
        with open(target, "r+b", buffering=0) as file:
            file.seek(tensor.start)
            _write(file, content)
        del self._missing[name]
        if not self._missing:
            self._all_put.set()

    def finish(self) -> None:
        """Fold and write what was not put, and wait for the rest."""
        for name, (tensor, _) in list(self._missing.items()):
            self.put(name, fold(tensor.read(), self._operations[name]))
        self._copying.result()

    def stop(self) -> None:
        self._stopped.set()
        self._all_put.set()
        torch.set_num_threads(self._threads)

    def _copy(self) -> None:
        for source, target, left_out in self._copies:
            if left_out:
                _copy_between(source, target, left_out, self._stopped)
            elif not self._stopped.is_set():
                shutil.copyfile(source, target)
        self._copied.set()
        # The disk is slower than what the other thread computes, so it begins now.
        self._flush()
        self._all_put.wait()
        self._flush()

    def _flush(self) -> None:
        for _, target, left_out in self._copies:
            if left_out and not self._stopped.is_set():
                flush_file(target)


def _copy_between(source: Path, target: Path, left_out: list[tuple[int, int]], stopped: threading.Event) -> None:
    """Copy all but some spans (start, bytes), which ascend and do not overlap."""
    block = memoryview(bytearray(_BLOCK))
    begins = [0, *(start + size for start, size in left_out)]
    ends = [*(start for start, _ in left_out), source.stat().st_size]
    with open(source, "rb", buffering=0) as reader, open(target, "r+b", buffering=0) as writer:
        for begin, end in zip(begins, ends):
            reader.seek(begin)
            writer.seek(begin)
            while begin < end and not stopped.is_set():
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


def _bytes_of(folded: torch.Tensor, tensor: StoredTensor) -> memoryview:
    # Infinite and undefined numbers are the extremes of whatever holds them; looking at each is slow in 16 bits.
    if folded.numel() and not bool(torch.stack(folded.aminmax()).isfinite().all()):
        raise CheckpointError(
            f"folding transforms into {tensor.name!r} gives numbers beyond {tensor.dtype_name}: check the checkpoint, "
            "calibrate again, or add --no-fold."
        )
    return tensor_bytes(folded)
