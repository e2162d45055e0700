"""Decode speed of two checkouts of kvq in one run: each has a process of its own, and they take turns.

    git worktree add ../before COMMIT
    python benchmarks/versions.py --before ../before --stats STATS --json benchmarks/results/versions.json

Both processes load the same model and fill the same caches from the same prompt (``decode.py`` of their own checkout,
so that an older one measures itself as it is). A turn decodes a few tokens with one recipe, first in one process and
then in the other, the order changing every turn; only one of them runs at a time. Reported: the ratio of tokens/s after
to before, as the median and the quartiles over turns, and DynamicCache of each checkout as the control.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers

CONTROL = "DynamicCache"


def work(checkout: Path, stats: str | None, contexts: list[int], recipes: list[str], tokens: int, room: int) -> None:
    """One checkout's process: fill every cache, then obey one line a turn, ``context recipe``, and answer its speed."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(checkout / "benchmarks"))
    import decode
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvq.calib.artefacts import fit_artefacts
    from kvq.calib.stats import Stats
    from kvq.models.describe import describe
    from kvq.models.resolve import resolve_model
    from kvq.recipe import load_recipe

    decode.attention.register()
    folder = resolve_model("builtin")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = Stats.load(stats) if stats else None
    methods, first = {}, {}
    for context in contexts:
        source, first[context] = decode.prompt_cache(model, tokenizer, context - room)
        for name in (CONTROL, *recipes):
            artefacts = {}
            if name != CONTROL and loaded is not None:
                artefacts = fit_artefacts(load_recipe(name), describe(model.config), loaded)
            methods[context, name] = decode.Method(name, model, artefacts)
            methods[context, name].fill(source)
    print("ready", file=answer, flush=True)
    for line in sys.stdin:
        context, name = line.split()
        speed = methods[int(context), name].turn(tokens, first[int(context)])
        print(speed, file=answer, flush=True)


class Checkout:
    """A checkout's process."""

    def __init__(self, path: Path, arguments: argparse.Namespace, room: int):
        command = [
            sys.executable,
            __file__,
            "--work",
            str(path),
            "--tokens",
            str(arguments.tokens),
            "--room",
            str(room),
        ]
        command += ["--contexts", *map(str, arguments.contexts), "--recipes", *arguments.recipes]
        command += ["--stats", arguments.stats] if arguments.stats else []
        environment = os.environ | {"PYTHONPATH": str(path)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=path)
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=path
        ).stdout.strip()

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.commit} ended: see its messages above.")
        return line.strip()

    def turn(self, context: int, name: str) -> float:
        self.process.stdin.write(f"{context} {name}\n")
        self.process.stdin.flush()
        return float(self.answer())


def compare(arguments: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    # The first turn of each is not counted.
    room = (arguments.turns + 1) * arguments.tokens
    checkouts = {}
    for which in ("before", "after"):
        checkouts[which] = Checkout(getattr(arguments, which).resolve(), arguments, room)
        if checkouts[which].answer() != "ready":
            raise SystemExit("a process did not become ready: see its messages above.")
    rows = []
    for context in arguments.contexts:
        names = (CONTROL, *arguments.recipes)
        speeds = {(which, name): [] for which in checkouts for name in names}
        for number in range(arguments.turns + 1):
            for name in names:
                for which in sorted(checkouts, reverse=bool(number % 2)):
                    speed = checkouts[which].turn(context, name)
                    speeds[which, name] += [speed] if number else []
        for name in names:
            rows.append(_row(context, name, speeds))
            row = rows[-1]
            print(
                f"{context:6d} {name:13s} {row['before_tokens_per_s']:7.2f} -> {row['after_tokens_per_s']:7.2f} tok/s  "
                f"{row['after_over_before']:.2f}x ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})  "
                f"{row['before_vs_dynamic']:.2f}x -> {row['after_vs_dynamic']:.2f}x dynamic",
                flush=True,
            )
    for checkout in checkouts.values():
        checkout.process.stdin.close()
        checkout.process.wait()
    return rows, {which: checkout.commit for which, checkout in checkouts.items()}


def _row(context: int, name: str, speeds: dict) -> dict:
    before, after = speeds["before", name], speeds["after", name]
    ratios = [new / old for new, old in zip(after, before)]
    quartiles = statistics.quantiles(ratios, n=4)
    row = {
        "context": context,
        "method": name,
        "before_tokens_per_s": statistics.median(before),
        "after_tokens_per_s": statistics.median(after),
        "after_over_before": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
    }
    for which, own in (("before", before), ("after", after)):
        row[f"{which}_vs_dynamic"] = statistics.median(a / b for a, b in zip(own, speeds[which, CONTROL]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="an older checkout")
    parser.add_argument("--after", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--stats", help="statistics for recipes that need them (kvq calibrate builtin --full)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--recipes", nargs="+", default=["kivi2", "int4", "klt2"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded per turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--room", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.stats, arguments.contexts, arguments.recipes, arguments.tokens, arguments.room)
        return
    if arguments.before is None:
        parser.error("--before names the checkout to compare with: git worktree add ../before COMMIT")
    if arguments.stats:
        arguments.stats = str(Path(arguments.stats).resolve())
    rows, commits = compare(arguments)
    if arguments.json:
        facts = {
            "model": "builtin",
            "dtype": "float32",
            "commits": commits,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "turns": arguments.turns,
            "tokens_per_turn": arguments.tokens,
        }
        arguments.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
