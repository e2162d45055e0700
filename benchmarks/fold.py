"""Time and memory of an export that folds transforms, against a plain copy of the checkpoint (bar: 3x the copy).

    python benchmarks/fold.py
    python benchmarks/fold.py --model made --json benchmarks/results/fold-made.json
    python benchmarks/fold.py --model FOLDER --recipe smooth4 --json -

Copy and export take turns in one process. ``checked`` is what users run; ``export`` is the same without the comparison
of logits. Folded weights exist nowhere else, so an export returns when they are on the disk: the bar compares it with a
copy that is on the disk too (``on_disk``: until a sync of all disks after it has returned). ``seconds``, until each
returns, sets it against a copy between caches of the system, which moves 3 to 4 GB/s and can still be lost.

The floor of time is the copy, the folded tensors read and written once more, and their products in float64; with the
check, all weights multiplied with the tokens of four versions of the model, which alone takes ``check_seconds`` on this
machine. Peak memory is that of a process of its own that exports once; its floor is the largest tensor in float32.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from export import peak_mb, timed
from transformers import AutoConfig, AutoModelForCausalLM

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.exporting import exporter
from kvq.exporting.exporter import export
from kvq.exporting.fold_check import ROWS, TOKENS, FoldCheck
from kvq.exporting.folding import plan_of_folds
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, resolve_model, weights_fingerprint
from kvq.models.stored import tensors_of
from kvq.recipe import load_recipe
from kvq.transforms.fold import Columns, Operation, Rows

TIME_BAR = 3.0
RESULTS = Path(__file__).parent / "results" / "fold.json"
# What an export imports is no memory of exporting: half of it is the code of model families.
_IDLE = "import kvq, transformers, torch, kvq.exporting.exporter"
_EXPORT = (
    f"import sys\n{_IDLE}\nfrom kvq.exporting import exporter\n{{patch}}\nsource, recipe, out, stats = sys.argv[1:]\n"
    + ("exporter.export(source, recipe, out, stats=stats)")
)
_UNCHECKED = (
    "from kvq.exporting.fold_check import FoldCheck\n"
    "exporter.check_folds = lambda *_: FoldCheck(error=0.0, kl=0.0, top1=1.0, noise_kl=0.0, tokens=0)"
)


def statistics_file(source: Path, recipe: str, path: Path) -> None:
    """Statistics of a few random tokens: what they say changes neither time nor memory of folding."""
    model = load_model(source)
    needs = needs_of(load_recipe(recipe), describe(load_config(source)))
    tokens = torch.randint(
        model.config.get_text_config().vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)
    )
    collect(model, tokens, needs=needs, weights_fingerprint=weights_fingerprint(source)).save(path)


def measure_times(source: Path, recipe: str, stats: Path, root: Path, repeats: int) -> dict[str, dict[str, list]]:
    """Seconds of each side: until it returns (``seconds``), and until all is on the disk (``on_disk``)."""
    target, check = root / "target", exporter.check_folds

    def run(checked: bool):
        exporter.check_folds = check if checked else lambda *_: FoldCheck(error=0, kl=0, top1=1, noise_kl=0, tokens=0)
        try:
            export(source, recipe, target, stats=stats)
        finally:
            exporter.check_folds = check

    sides = {
        "copy": lambda: shutil.copytree(source, target),
        "export": lambda: run(False),
        "checked": lambda: run(True),
    }
    found = {kind: {name: [] for name in sides} for kind in ("seconds", "on_disk")}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            # What earlier turns left unwritten would otherwise be paid for by this one.
            os.sync()
            spent = timed(side)
            written = spent + timed(os.sync)
            shutil.rmtree(target)
            # The first turn fills the page cache.
            if turn:
                found["seconds"][name].append(spent)
                found["on_disk"][name].append(written)
                print(f"turn {turn}  {name:8} {spent:6.2f} s, on disk {written:6.2f} s", file=sys.stderr)
    return found


def ratios_to_copy(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(a / b for a, b in zip(seconds[name], seconds["copy"])), 3)
        for name in ("export", "checked")
    }


def largest_tensor(source: Path) -> int:
    """Bytes of the largest tensor that is no embedding or head, which are never folded."""
    return max(tensor.nbytes for name, tensor in tensors_of(source).items() if "layers." in name)


def floor(source: Path, recipe: str, stats: Path) -> dict[str, float]:
    """What no implementation does without: bytes of folded tensors, 10^9 operations of folding and of the check."""
    spec, recipe = describe(load_config(source)), load_recipe(recipe)
    plan = make_plan(recipe, spec, fit_artefacts(recipe, spec, Stats.load(stats), source))
    operations, tensors = plan_of_folds(plan, source).operations, tensors_of(source)
    numbers = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    folding = sum(_size(own[0]) * numbers[name] for name, own in operations.items())
    return {
        "folded_mb": round(sum(numbers[name] * tensors[name].dtype.itemsize for name in operations) / 1e6, 1),
        "folding_gflop": round(folding / 1e9, 2),
        "check_gflop": round(2 * 4 * ROWS * TOKENS * sum(numbers.values()) / 1e9, 2),
        "check_seconds": round(products([tensor.shape for tensor in tensors.values()]), 3),
    }


def _size(operation: Operation) -> int:
    """Operations a number: a row or column block is multiplied by a matrix of the head's size, else by a number."""
    return 2 * len(operation.matrix) if isinstance(operation, Rows | Columns) else 1


def products(shapes: list[tuple[int, ...]]) -> float:
    """Seconds of all products of weights with the check's tokens: each shape once, in float32, the best of five."""
    seconds = 0.0
    for shape, count in Counter(shape for shape in shapes if len(shape) == 2).items():
        weight, tokens = torch.ones(shape), torch.ones(shape[1], 4 * ROWS * TOKENS)
        seconds += count * min(timed(lambda: torch.mm(weight, tokens)) for _ in range(5))  # noqa: B023
    return seconds


def made_model(folder: Path) -> Path:
    """1.1 billion random numbers in the shapes of TinyLlama: eight times the embedded model, with a head of its own."""
    config = AutoConfig.for_model(
        "llama", vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "made")
    return folder / "made"


def measure(arguments: argparse.Namespace) -> dict:
    if arguments.model != "made":
        return measure_model(resolve_model(arguments.model), arguments)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        return measure_model(made_model(Path(folder)), arguments)


def measure_model(source: Path, arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(dir=arguments.dir or source.parent) as folder:
        root = Path(folder)
        stats = root / "stats.safetensors"
        statistics_file(source, arguments.recipe, stats)
        least = floor(source, arguments.recipe, stats)
        times = measure_times(source, arguments.recipe, stats, root, arguments.repeats)
        peaks = {"idle": peak_mb(_IDLE)}
        for name, patch in (("export", _UNCHECKED), ("checked", "")):
            code = _EXPORT.format(patch=patch)
            peaks[name] = peak_mb(code, str(source), arguments.recipe, str(root / name), str(stats))
    ratios = {kind: ratios_to_copy(own) for kind, own in times.items()}
    medians = {name: statistics.median(values) for name, values in times["seconds"].items()}
    return {
        "benchmark": "fold",
        "model": arguments.model if arguments.model == "builtin" else source.name,
        "recipe": arguments.recipe,
        "checkpoint_bytes": sum(p.stat().st_size for p in source.iterdir() if p.is_file()),
        "tensors": len(tensors_of(source)),
        "bar": TIME_BAR,
        "ratio_on_disk": ratios["on_disk"]["export"],
        "ratio_checked_on_disk": ratios["on_disk"]["checked"],
        "ratio_to_cached_copy": ratios["seconds"]["export"],
        "ratio_checked_to_cached_copy": ratios["seconds"]["checked"],
        "floor": least,
        "peak_over_idle_mb": {name: round(peaks[name] - peaks["idle"], 1) for name in ("export", "checked")},
        "largest_layer_tensor_mb": round(largest_tensor(source) / 1e6, 2),
        "median_seconds": {name: round(value, 3) for name, value in medians.items()},
        **{
            kind: {name: [round(value, 3) for value in values] for name, values in own.items()}
            for kind, own in times.items()
        },
        "peak_mb": {name: round(value, 1) for name, value in peaks.items()},
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
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
    parser.add_argument("--model", default="builtin", help="builtin, made, a folder, or a hub id")
    parser.add_argument("--recipe", default="qoq4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", help="where to write (default: beside the model)")
    parser.add_argument("--json", default=str(RESULTS), help="file to write, or - for standard output")
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    if arguments.json == "-":
        print(text)
        return
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(text + "\n")
    print(
        f"folding export, on the disk: {result['ratio_checked_on_disk']:.2f}x of a copy (bar {TIME_BAR}), without the "
        f"check {result['ratio_on_disk']:.2f}x; of a copy in the system's cache "
        f"{result['ratio_checked_to_cached_copy']:.2f}x and {result['ratio_to_cached_copy']:.2f}x"
    )
    print(f"peak over idle, MB: {result['peak_over_idle_mb']}")


if __name__ == "__main__":
    main()
