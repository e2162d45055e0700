"""Files that appear whole or not at all, and whose a temporary file or folder is."""

import contextlib
import glob
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from kvq.errors import CheckpointError

_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def owner() -> str:
    """This process as part of a temporary name, ``HOST-PID``; it has no dots."""
    return f"{_HOST}-{os.getpid()}"


def has_ended(name: str) -> bool:
    """True if the process of an ``owner`` is known to run no more.

    A process number says nothing of another host, which may write to the same disk. Our own number on an old file means
    that it was given out again.
    """
    host, _, number = name.rpartition("-")
    if host != _HOST or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return int(number) == os.getpid()


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file and flush it to disk: after any failure the old file, or none, is there. Raises OSError.

    What processes that were killed while they wrote this file have left is removed.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if has_ended(leftover.name.rsplit(".", 2)[1]):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{owner()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """``write_whole`` of a text (as UTF-8) or of bytes. Raises CheckpointError if it cannot be written."""
    try:
        write_whole(path, [content.encode() if isinstance(content, str) else content])
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be written ({error.strerror}): choose another place.") from None


def check_writable(path: str | Path) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder: give the name of a file.")
    if not path.parent.is_dir():
        raise CheckpointError(f"folder {str(path.parent)!r} does not exist: make it, or choose another place.")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"folder {str(path.parent)!r} cannot be written: choose another place.")
