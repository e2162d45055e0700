"""The C++ kernels of the CPU, built when they are first asked for and kept for this torch, machine and source.

A build takes half a minute of a core and happens once, in torch's folder of extensions (``TORCH_EXTENSIONS_DIR``).
Processes that start together wait for the one that builds, and a library has its final name only when it is whole.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_NAME = "kvq_cpu"
# No fast-math: masks are minus infinity, and bytes must be those of torch.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_WAY_OUT = "torch serves until then (impl='reference'), and more slowly"


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the C++ kernels cannot run here; None if they can, and are loaded as ``torch.ops.kvq``. Warns once."""
    try:
        torch.ops.load_library(_library())
        return None
    except _MissingError as error:
        reason = str(error)
    except Exception as error:
        # Compilers fail in many ways; the last lines of what they print say which.
        reason = f"the build failed: {' '.join(str(error).split())[-400:]}"
    logger.warning("The C++ kernels for the CPU cannot run: %s; %s.", reason, _WAY_OUT)
    return reason


class _MissingError(Exception):
    """What is not there to build with."""


def _library() -> str:
    """The path of the library, built if it is not there."""
    target = _root() / f"{_NAME}-{_key()}.so"
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The lock goes with the process that holds it, however that ends.
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(target)
    return str(target)


def _root() -> Path:
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(cache) / "torch_extensions"


def _key() -> str:
    """Names a build: the sources, how they are compiled, torch, and what the processor can do."""
    digest = hashlib.sha256()
    for path in [*sorted(_FOLDER.glob("*.h")), _FOLDER / "ops.cpp"]:
        digest.update(path.read_bytes())
    processor = platform.machine() + platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        # One processor's abilities; those of x86 are called flags, those of ARM features.
        lines = info.read_text().splitlines()
        processor += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    for part in (torch.__version__, processor, *_FLAGS):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _build(target: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        raise _MissingError("setuptools, which torch builds with, is not installed: pip install 'kvq-toolkit[cpu]'")
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise _MissingError(f"there is no C++ compiler ({compiler}): install GCC or Clang, or set CXX")
    # A virtual environment that is not activated has its ninja beside its Python.
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{path}{os.pathsep}{Path(sys.executable).parent}"
    try:
        if not cpp_extension.is_ninja_available():
            raise _MissingError("ninja is not installed: pip install 'kvq-toolkit[cpu]'")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{_NAME}-") as folder:
            cpp_extension.load(
                name=_NAME,
                sources=[str(_FOLDER / "ops.cpp")],
                extra_cflags=list(_FLAGS),
                build_directory=folder,
                is_python_module=False,
            )
            os.replace(Path(folder) / f"{_NAME}.so", target)
    finally:
        os.environ["PATH"] = path
