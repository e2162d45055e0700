"""Files that appear whole or not at all, and whose a temporary file or folder is."""

import contextlib
import glob
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

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
