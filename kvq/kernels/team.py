"""Compiled CPU work on several threads: those of torch itself."""

import contextlib
import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

_JOB = ctypes.POINTER(ctypes.c_int64)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why compiled CPU code cannot run here; None if it can."""
    return None if importlib.util.find_spec("numba") else "numba is not installed: pip install 'kvq-toolkit[cpu]'"


def share(run, job: np.ndarray, threads: int) -> None:
    """Run a job on this thread and, where there is enough to do, on the threads of torch's own pool.

    Those threads wait in a busy loop for some time after each of torch's operations: threads of another pool would have
    to share the cores with them, which costs all that they gain.

    run   a numba cfunc of the int64 ``job``; every thread calls it, and it takes units of work by ``lanes.next_unit``.
    """
    team = _team()
    if threads > 1 and team is not None:
        team(run.address, job.ctypes.data, threads, 0)
    else:
        run.ctypes(job.ctypes.data_as(_JOB))


@lru_cache(maxsize=1)
def _team():
    """``GOMP_parallel`` of the OpenMP library that torch runs on, or None. LLVM's library has GNU's function too."""
    folder = Path(torch.__file__).parent
    for path in (*folder.glob("lib/lib*omp*"), *folder.glob("../torch.libs/lib*omp*")):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(str(path)).GOMP_parallel
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            function.restype = None
            return function
    return None
