"""The build of the C++ kernels: once for a source, whole or not at all, and a missing tool is one sentence."""

import logging
import subprocess
import sys

import pytest
import torch

from kvq.errors import KernelError
from kvq.kernels.cpp import build
from kvq.kernels.dispatch import choose

needs_build = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")


@needs_build
def test_processes_that_start_together_build_once(tmp_path, monkeypatch):
    """With a compiler that counts its calls."""
    from torch.utils import cpp_extension

    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *ops.cpp*) echo "$$" >> {calls};; esac\n')
    with compiler.open("a") as script:
        script.write(f'exec {cpp_extension.get_cxx_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    code = "from kvq.kernels.cpp import build; import torch; print(build.unavailable(), torch.ops.kvq.pack)"
    run = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in run] == ["None kvq.pack"] * 2
    assert len(calls.read_text().split()) == 1
    assert len(list((tmp_path / "built").glob("*.so"))) == 1
    assert not [path for path in (tmp_path / "built").iterdir() if path.is_dir()], "what was built in is left"


@pytest.mark.parametrize("missing", ["compiler", "ninja", "build"])
def test_a_missing_tool_is_one_warning_and_the_reference(missing, tmp_path, monkeypatch, caplog):
    from torch.utils import cpp_extension

    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(broken) if missing == "build" else "/nowhere/c++" if missing == "compiler" else "sh")
    if missing == "ninja":
        monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    build.unavailable.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="kvq"):
            reason = build.unavailable()
            assert build.unavailable() == reason
    finally:
        build.unavailable.cache_clear()
    said = {"compiler": "no C++ compiler", "ninja": "kvq-toolkit[cpu]", "build": "the build failed"}[missing]
    assert said in reason
    assert [reason in record.message and "reference" in record.message for record in caplog.records] == [True]
    assert choose("auto", torch.device("cpu"), no_cpp=reason).impl == "reference"
    with pytest.raises(KernelError, match="cannot run"):
        choose("cpp", torch.device("cpu"), no_cpp=reason)
    assert not list(tmp_path.glob("*.so"))


@needs_build
def test_another_torch_or_processor_is_another_build(monkeypatch):
    own = build._key()
    assert build._key() == own
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert build._key() != own
    monkeypatch.setattr(build, "_FLAGS", ())
    assert build._key() != own
