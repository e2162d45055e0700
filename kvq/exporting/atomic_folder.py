"""A folder that appears whole or not at all.

The contents are written into a temporary sibling ``.NAME.kvq-tmp-HOST-PID``, flushed to disk, and renamed once. A
folder that is replaced is moved to ``.NAME.kvq-old-HOST-PID`` first and removed afterwards. What killed processes of
this host leave behind is cleared, or put back, by the next call for the same folder.
"""

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from kvq.atomic import has_ended, owner

# Larger files, in bytes, are copies of weights (those with folded tensors are flushed where they are written). Flushing
# copies doubles the time of an export; should the power fail, the checks at load (size, header, fingerprint) tell that
# they are not whole, and the source still has them.
FLUSH_LIMIT = 16 * 2**20


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` when the block ends, and vanishes if it fails.

    ``target`` must not exist unless ``replace`` is set. Raises OSError as the file system does.
    """
    with scratch_folder(target, "tmp") as work:
        yield work
        flush(work)
        if replace and target.exists():
            _swap(work, target)
        else:
            os.rename(work, target)
        _flush_folder(target.parent)


@contextmanager
def scratch_folder(target: Path, kind: str = "scratch") -> Iterator[Path]:
    """Yield a temporary folder beside ``target``, on the same disk, that vanishes in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _sibling(target, kind)
    work.mkdir()
    try:
        yield work
    finally:
        # After a rename there is nothing left under this name.
        shutil.rmtree(work, ignore_errors=True)


def recover(target: Path) -> None:
    """Clear what dead processes left beside ``target``; a folder they had moved aside is put back."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.kvq-(tmp|old|scratch)-(.+)")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or not has_ended(match[2]):
            continue
        if match[1] == "old" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def flush(folder: Path, limit: float = FLUSH_LIMIT) -> None:
    """Force names and files of up to ``limit`` bytes to disk, so that a rename cannot survive without what it names."""
    found = [os.path.join(path, name) for path, _, files in os.walk(folder) for name in files]
    # Together: a file system commits flushes that wait at the same time in one go.
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(flush_file, [file for file in found if os.path.getsize(file) <= limit]))
    for path, _, _ in os.walk(folder):
        _flush_folder(Path(path))


def flush_file(path: str | Path) -> None:
    """Force a file's contents, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(work: Path, target: Path) -> None:
    aside = _sibling(target, "old")
    os.rename(target, aside)
    try:
        os.rename(work, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.kvq-{kind}-{owner()}")


def _flush_folder(folder: Path) -> None:
    # Some file systems cannot flush a folder; the rename is atomic there all the same.
    with suppress(OSError):
        flush_file(folder)
