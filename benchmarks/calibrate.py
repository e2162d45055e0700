"""Time of calibration against plain forwards of the same model over the same tokens.

    python benchmarks/calibrate.py
    python benchmarks/calibrate.py --model FOLDER --samples 32 --seq-len 1024 --json -

All sides run the decoder without its head, in float32 on the CPU, taking turns batch by batch in one process. The plain
side keeps its ordinary cache; calibration adds the measuring, and the look at a lone token that begins every run. A
ratio is the median over the batches of side / plain, so that load that comes and goes on the machine falls on all sides
of a round.

    default   what ``kvq calibrate`` measures: ranges, quantiles, sinks, massive activations (bar: 1.15)
    moments   second moments of queries, keys, values and weighted values beside them (bar: 1.4)
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from machine import machine

from kvq.calib.collect import collect
from kvq.calib.data import load_documents
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS
from kvq.calib.windows import token_windows
from kvq.models.resolve import load_model, load_tokenizer, resolve_model

BARS = {"default": 1.15, "moments": 1.4}
MOMENTS = DEFAULT_NEEDS | {need for need in ALL_NEEDS if need.endswith("moments")}
RESULTS = Path(__file__).parent / "results" / "calibrate.json"


def plain_forward(model, batch: torch.Tensor) -> None:
    with torch.inference_mode():
        model.get_decoder()(input_ids=batch.to(model.device), use_cache=True)


def calibrate(needs: frozenset[str], model, batch: torch.Tensor) -> None:
    collect(model, batch, needs=needs, batch_size=len(batch))


def seconds(model, batch: torch.Tensor, order: list[str]) -> dict[str, float]:
    """Seconds of every side on one batch, in this order."""
    spent = {}
    for name in order:
        start = time.perf_counter()
        SIDES[name](model, batch)
        spent[name] = round(time.perf_counter() - start, 3)
    return spent


SIDES = {
    "plain": plain_forward,
    "default": partial(calibrate, DEFAULT_NEEDS),
    "moments": partial(calibrate, MOMENTS),
}


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
    batches = list(windows.tokens.split(arguments.batch_size)) * arguments.repeats
    seconds(model, batches[0], list(SIDES))
    rounds, names = [], list(SIDES)
    for number, batch in enumerate(batches):
        # Every side goes first in turn.
        turn = number % len(names)
        rounds.append(seconds(model, batch, names[turn:] + names[:turn]))
        print(f"batch {number + 1:3} of {len(batches)}  {rounds[-1]}", file=sys.stderr)
    medians = {name: statistics.median(spent[name] for spent in rounds) for name in SIDES}
    ratios = {name: sorted(spent[name] / spent["plain"] for spent in rounds) for name in BARS}
    return {
        "benchmark": "calibrate",
        "ratios": {name: round(statistics.median(found), 4) for name, found in ratios.items()},
        "ratios_quartiles": {
            name: [round(found[len(found) // 4], 4), round(found[-1 - len(found) // 4], 4)]
            for name, found in ratios.items()
        },
        "bars": BARS,
        "median_seconds_per_batch": medians,
        "seconds_per_batch": {name: [spent[name] for spent in rounds] for name in SIDES},
        "tokens_per_second": {
            name: round(arguments.batch_size * arguments.seq_len / value, 1) for name, value in medians.items()
        },
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
    parser.add_argument("--samples", type=int, default=16, help="windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window")
    parser.add_argument("--batch-size", type=int, default=4, help="windows a forward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default=str(RESULTS), help="file to write, or - for standard output")
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    if arguments.json == "-":
        print(text)
    else:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n")
        for name, value in result["median_seconds_per_batch"].items():
            print(f"{name:9}  {value:7.2f} s a batch  {result['tokens_per_second'][name]:8.1f} tokens/s")
        for name, ratio in result["ratios"].items():
            print(f"{name:9}  {ratio:.3f} of plain   (bar {BARS[name]})")


if __name__ == "__main__":
    main()
