"""Time of calibration against plain forwards of the same model over the same tokens (bar: 1.15).

    python benchmarks/calibrate.py
    python benchmarks/calibrate.py --model FOLDER --samples 32 --seq-len 1024 --json -

Both sides run the decoder without its head, in float32 on the CPU, taking turns batch by batch in one process. The
plain side keeps its ordinary cache; calibration adds the measuring and nothing else. The ratio is the median over the
batches of calibrate / plain, so that load that comes and goes on the machine falls on both sides of each pair.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from kvq.calib.collect import collect
from kvq.calib.data import load_texts, token_windows
from kvq.models.resolve import load_model, load_tokenizer, resolve_model

BAR = 1.15
RESULTS = Path(__file__).parent / "results" / "calibrate.json"


def plain_forward(model, batch: torch.Tensor) -> None:
    with torch.inference_mode():
        model.get_decoder()(input_ids=batch.to(model.device), use_cache=True)


def calibrate(model, batch: torch.Tensor) -> None:
    collect(model, batch, batch_size=len(batch))


def seconds(model, batch: torch.Tensor, order: list[str]) -> dict[str, float]:
    """Seconds of both sides on one batch, in this order."""
    spent = {}
    for name in order:
        start = time.perf_counter()
        SIDES[name](model, batch)
        spent[name] = round(time.perf_counter() - start, 3)
    return spent


SIDES = {"plain": plain_forward, "calibrate": calibrate}


def measure(arguments: argparse.Namespace) -> dict:
    folder = resolve_model(arguments.model)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    windows, data = token_windows(
        load_tokenizer(folder),
        load_texts(arguments.data),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        source=arguments.data,
    )
    batches = list(windows.split(arguments.batch_size)) * arguments.repeats
    seconds(model, batches[0], list(SIDES))
    pairs = []
    for number, batch in enumerate(batches):
        # Each side goes first every other time.
        pairs.append(seconds(model, batch, sorted(SIDES, reverse=bool(number % 2))))
        print(f"batch {number + 1:3} of {len(batches)}  {pairs[-1]}", file=sys.stderr)
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in SIDES}
    return {
        "benchmark": "calibrate",
        "ratio": round(statistics.median(pair["calibrate"] / pair["plain"] for pair in pairs), 4),
        "bar": BAR,
        "median_seconds_per_batch": medians,
        "seconds_per_batch": {name: [pair[name] for pair in pairs] for name in SIDES},
        "tokens_per_second": {
            name: round(arguments.batch_size * arguments.seq_len / value, 1) for name, value in medians.items()
        },
        "model": arguments.model if arguments.model == "builtin" else Path(arguments.model).name,
        "dtype": "float32",
        "data": data.to_dict(),
        "batch_size": arguments.batch_size,
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "kvq": version("kvq-toolkit"),
        },
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
        print(f"ratio      {result['ratio']:.3f}   (bar {BAR})")


if __name__ == "__main__":
    main()
