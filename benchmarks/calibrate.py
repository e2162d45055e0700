"""Time of calibration against plain forwards of the same model over the same tokens.

    python benchmarks/calibrate.py
    python benchmarks/calibrate.py --model FOLDER --samples 32 --seq-len 1024 --json -

All sides run the decoder without its head, in float32 on the CPU, taking turns batch by batch in one process. The
plain side keeps its ordinary cache; calibration adds the measuring of a batch and its joining with those before. A
ratio is the median over the rounds of side / plain, in CPU seconds of the process: other load on the machine
stretches wall time, and falls on sides of a round unevenly. Ratios of wall time are written beside them. What a run
does once, a look at a lone token, is timed apart.

    default   what ``kvq calibrate`` measures: ranges, quantiles, sinks, massive activations (bar: 1.15)
    moments   second moments of queries, keys, values and weighted values beside them (bar: 1.4)
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from machine import machine

from kvq.calib.data import load_documents
from kvq.calib.forward import look, plan_layers
from kvq.calib.forward import measure as watched
from kvq.calib.job import Job, join_layers
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS
from kvq.calib.tree import Tree
from kvq.calib.windows import token_windows
from kvq.models.describe import describe
from kvq.models.resolve import load_model, load_tokenizer, resolve_model

BARS = {"default": 1.15, "moments": 1.4}
NEEDS = {
    "default": DEFAULT_NEEDS,
    "moments": DEFAULT_NEEDS | {need for need in ALL_NEEDS if need.endswith("moments")},
}
RESULTS = Path(__file__).parent / "results" / "calibrate.json"


def plain_forward(model, batch: torch.Tensor) -> None:
    with torch.inference_mode():
        model.get_decoder()(input_ids=batch.to(model.device), use_cache=True)


class Calibration:
    """One side: what is measured on a batch, and the statistics so far."""

    def __init__(self, model, windows: torch.Tensor, batch_size: int, needs: frozenset[str]):
        spec = describe(model.config)
        settings = {"seed": 0, "dtype": model.dtype, "reservoir_bytes": 2**28}
        self.job = Job.of(spec, windows, None, needs, batch_size=batch_size, **settings)
        start = time.process_time()
        looks = look(model, self.job.lone, [layer.index for layer in spec.cached_layers])
        self.look_seconds = time.process_time() - start
        self.plans = plan_layers(spec, looks, needs, self.job.capacities)
        self.tree = Tree(join_layers)
        self.done = 0

    def __call__(self, model, number: int) -> None:
        self.tree.add((0, self.done), watched(model, self.job.batch(number), self.plans))
        self.done += 1


def spent(side, *arguments) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    side(*arguments)
    return {"cpu": round(time.process_time() - cpu, 3), "wall": round(time.perf_counter() - wall, 3)}


def ratios(rounds: list[dict], name: str, clock: str) -> dict[str, float]:
    """Median and quartiles over the rounds of a side's time by the plain side's."""
    found = sorted(spent[name][clock] / spent["plain"][clock] for spent in rounds)
    middle = {"first_quartile": found[len(found) // 4], "third_quartile": found[-1 - len(found) // 4]}
    return {key: round(value, 4) for key, value in {"median": statistics.median(found), **middle}.items()}


def measure(arguments: argparse.Namespace) -> dict:
    folder = resolve_model(arguments.model)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    windows = token_windows(
        load_tokenizer(folder),
        load_documents(arguments.data),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        source=arguments.data,
    )
    tokens = windows.tokens
    batches = tokens.split(arguments.batch_size)
    sides = {"plain": lambda model, number: plain_forward(model, batches[number])}
    for name, needs in NEEDS.items():
        sides[name] = Calibration(model, tokens, arguments.batch_size, needs)
    plain_forward(model, batches[0])
    rounds, names = [], list(sides)
    for number in range(len(batches) * arguments.repeats):
        # Every side goes first in turn.
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        rounds.append({name: spent(sides[name], model, number % len(batches)) for name in order})
        print(f"round {number + 1:3}  {rounds[-1]}", file=sys.stderr)
    return {
        "benchmark": "calibrate",
        "ratios": {name: ratios(rounds, name, "cpu") for name in BARS},
        "ratios_of_wall_time": {name: ratios(rounds, name, "wall") for name in BARS},
        "bars": BARS,
        "cpu_seconds_per_batch": {name: statistics.median(found[name]["cpu"] for found in rounds) for name in names},
        "look_cpu_seconds": round(sides["default"].look_seconds, 3),
        "rounds": rounds,
        "model": arguments.model if arguments.model == "builtin" else Path(arguments.model).name,
        "dtype": "float32",
        "data": windows.identity.to_dict(),
        "batch_size": arguments.batch_size,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin", help="builtin, a folder, or a hub id")
    parser.add_argument("--data", default="builtin", help="builtin, a file, or a hub id")
    parser.add_argument("--samples", type=int, default=56, help="windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a forward")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", default=str(RESULTS), help="file to write, or - for standard output")
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    if arguments.json == "-":
        print(text)
    else:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n")
        for name, found in result["ratios"].items():
            print(f"{name:9}  {found['median']:.3f} of plain   (bar {BARS[name]})")


if __name__ == "__main__":
    main()
