"""Silence for native code that prints: HiGHS 1.12 writes lines of its own debugging whatever its options say."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

STDOUT = 1


@contextlib.contextmanager
def suppress_stdout() -> Iterator[None]:
    """What is written to file descriptor 1 inside is lost; what Python wrote before is not."""
    sys.stdout.flush()
    library = ctypes.CDLL(None)
    library.fflush(None)
    kept = os.dup(STDOUT)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, STDOUT)
        os.close(nowhere)
        yield
    finally:
        # C's own buffer, while it still goes nowhere.
        library.fflush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)
