"""What the host does in a steady decode step, counted without a GPU, stays small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvq.kernels.dispatch import why_no_triton

CHECKS = Path(__file__).with_name("host_overhead_checks.py")
NO_TRITON = why_no_triton(torch.device("cpu"))


@pytest.mark.long
@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
def test_the_checks_of_counted_steps_pass():
    """In a process of their own: the device that they pretend stays registered with torch until its process ends."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(CHECKS)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=CHECKS.parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    last = done.stdout.splitlines()[-1]
    assert " passed" in last
    assert "skipped" not in last
