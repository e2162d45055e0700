"""Time and memory of an export against a plain copy of the checkpoint (bars: 1.5x the copy, 500 MB over idle).

    python benchmarks/export.py
    python benchmarks/export.py --model FOLDER --recipe kivi2 --json -

Copy and export take turns in one process, with hard links and with linking switched off; ``copy_flushed`` is a copy
that waits for the disk. Peak memory is that of a process of its own that exports once.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from kvq.exporting.atomic_folder import flush
from kvq.exporting.exporter import export
from kvq.models.resolve import resolve_model

TIME_BAR, MEMORY_BAR_MB = 1.5, 500
RESULTS = Path(__file__).parent / "results" / "export.json"
# Not getrusage: its maximum is inherited from the process that started this one.
_PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
_IDLE = "import kvq, transformers"
_EXPORT = "import os, sys, kvq, transformers\n{patch}\nfrom kvq.exporting.exporter import export\nexport(*sys.argv[1:])"
_NO_LINKS = "def refuse(*a, **k): raise OSError(18, 'no links')\nos.link = refuse"


def refuse_link(*args, **kwargs):
    raise OSError(18, "linking is switched off for this measurement")


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_times(source: Path, recipe: str, root: Path, repeats: int) -> dict[str, list[float]]:
    link = os.link
    target = root / "target"

    def copy(flushed: bool):
        shutil.copytree(source, target)
        if flushed:
            flush(target, limit=math.inf)

    def run(linking: bool):
        os.link = link if linking else refuse_link
        try:
            export(source, recipe, target)
        finally:
            os.link = link

    sides = {
        "copy": lambda: copy(False),
        "copy_flushed": lambda: copy(True),
        "export_linked": lambda: run(True),
        "export_copied": lambda: run(False),
    }
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            # What earlier turns left unwritten would otherwise be paid for by this one.
            os.sync()
            spent = timed(side)
            shutil.rmtree(target)
            # The first turn fills the page cache.
            if turn:
                seconds[name].append(spent)
                print(f"turn {turn}  {name:14} {spent:6.2f} s", file=sys.stderr)
    return seconds


def peak_mb(code: str, *arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_PEAK}", *arguments], capture_output=True, text=True, check=True
    )
    # In KiB.
    return int(done.stdout.split()[-1]) * 1024 / 1e6


def measure(arguments: argparse.Namespace) -> dict:
    source = resolve_model(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.dir or source.parent) as folder:
        root = Path(folder)
        seconds = measure_times(source, arguments.recipe, root, arguments.repeats)
        peaks = {"idle": peak_mb(_IDLE), "idle_with_torch": peak_mb(f"{_IDLE}, torch")}
        for name, patch in (("export_linked", ""), ("export_copied", _NO_LINKS)):
            peaks[name] = peak_mb(_EXPORT.format(patch=patch), str(source), arguments.recipe, str(root / name))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "benchmark": "export",
        "model": arguments.model if arguments.model == "builtin" else source.name,
        "recipe": arguments.recipe,
        "checkpoint_bytes": sum(p.stat().st_size for p in source.iterdir() if p.is_file()),
        "bars": {"ratio": TIME_BAR, "peak_over_idle_mb": MEMORY_BAR_MB},
        "ratio_linked": round(medians["export_linked"] / medians["copy"], 3),
        "ratio_copied": round(medians["export_copied"] / medians["copy"], 3),
        "ratio_copied_to_flushed_copy": round(medians["export_copied"] / medians["copy_flushed"], 3),
        "peak_over_idle_mb": {
            name: round(peaks[name] - peaks["idle"], 1) for name in ("export_linked", "export_copied")
        },
        "median_seconds": {name: round(value, 3) for name, value in medians.items()},
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "peak_mb": {name: round(value, 1) for name, value in peaks.items()},
        "machine": {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "kvq": version("kvq-toolkit"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin", help="builtin, a folder, or a hub id")
    parser.add_argument("--recipe", default="kivi2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", help="where to write (default: beside the model, so that linking is possible)")
    parser.add_argument("--json", default=str(RESULTS), help="file to write, or - for standard output")
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    if arguments.json == "-":
        print(text)
        return
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(text + "\n")
    print(f"linked  {result['ratio_linked']:.2f}x of a copy   copied  {result['ratio_copied']:.2f}x   (bar {TIME_BAR})")
    print(f"peak over idle import, MB: {result['peak_over_idle_mb']}   (bar {MEMORY_BAR_MB})")


if __name__ == "__main__":
    main()
