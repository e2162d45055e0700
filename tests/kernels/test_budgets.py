"""What decode kernels cost on GPUs that need not be there: compiled to machine code, and counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvq.kernels.dispatch import triton_version

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(triton_version() is None, reason="triton is not installed")


def report(*options: str) -> list[dict]:
    """Rows of benchmarks/kernels/budgets.py. A process of its own: here kernels are made for the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels" / "budgets.py"), *options, "--json", "-"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout)["rows"]


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_main_loops_stay_within_their_budgets(sm):
    rows = report("--sm", str(sm))
    assert len(rows) >= 5
    assert {row["instance"]: row["over"] for row in rows if row["over"]} == {}
    # What was counted is there: products, and no fewer bytes than the codes have.
    assert all(row["lane_instructions"] > 0.9 and row["wide_bytes"] >= row["code_bytes"] for row in rows)


@pytest.mark.parametrize(("sm", "least"), [(80, 16), (90, 35), (100, 16)])
def test_every_other_kernel_compiles_without_a_stack(sm, least):
    """All of them for one GPU; for others what packs and unpacks, every way to choose numbers among it."""
    rows = report("--sm", str(sm), "--others")
    assert len(rows) >= least
    assert {row["instance"]: row["over"] for row in rows if row["over"]} == {}


def test_every_budget_can_be_exceeded():
    rows = {row["instance"]: row["over"] for row in report("--sm", "90", "--controls")}
    assert len(rows) >= 5
    for name, over in rows.items():
        assert any(found.startswith(name) for found in over), (name, over)
