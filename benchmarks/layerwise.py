"""Peak memory of layer-by-layer calibration, on a model several times larger than the limit.

    python benchmarks/layerwise.py

A random Llama of 1 GB (float32) is written to a temporary folder and calibrated by the command itself in processes of
their own: with ``--memory-limit 256MB``, which it does not fit in, and without a limit. Peak memory is the largest
resident set that the process ever had (VmHWM), less what it had with all imported and nothing loaded. The floor of
the first is the largest piece that must be in memory at a time: one decoder layer, or the embedding. The two files of
statistics must be the same, byte for byte.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import machine
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results" / "layerwise.json"
LIMIT = "256MB"
VOCABULARY, SAMPLES, SEQ_LEN = 8192, 4, 128

CHILD = """
import json, sys
from pathlib import Path

import accelerate.hooks, accelerate.big_modeling
import kvq.calib.run, kvq.cli, kvq.commands.calibrate, kvq.report.stats_tables
import torch, transformers.models.llama.modeling_llama
from kvq.calib.observers import Range

Range.observe(torch.ones(1, 1, 2, 2))  # loads the compiled loops

def memory(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024

before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
try:
    kvq.cli.main(sys.argv[2:])
except SystemExit as end:
    assert not end.code, end.code
Path(sys.argv[1]).write_text(json.dumps({"before": before, "peak": memory("VmHWM")}))
"""


def make_model(folder: Path, layers: int) -> int:
    """Write a random model with its tokenizer; returns the bytes of its weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="400MB")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def calibrate(folder: Path, out: Path, *arguments: str) -> dict:
    report = out.with_suffix(".json")
    command = [sys.executable, "-c", CHILD, report, "calibrate", folder, "-o", out, "--data", folder / "text.txt"]
    command += ["--samples", SAMPLES, "--seq-len", SEQ_LEN, "--batch-size", 2, *arguments]
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    found = json.loads(report.read_text())
    return {
        "peak_bytes": found["peak"] - found["before"],
        "imported_bytes": found["before"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(layers: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make_model(folder / "model", layers)
        ids = torch.randint(0, VOCABULARY, (SAMPLES * SEQ_LEN * 2,), generator=torch.Generator().manual_seed(1))
        (folder / "model" / "text.txt").write_text(" ".join(f"w{i}" for i in ids.tolist()))
        by_layer = calibrate(folder / "model", folder / "by-layer.st", "--memory-limit", LIMIT)
        whole = calibrate(folder / "model", folder / "whole.st")
        same = (folder / "by-layer.st").read_bytes() == (folder / "whole.st").read_bytes()
    embedding = VOCABULARY * 1024 * 4
    return {
        "benchmark": "layerwise",
        "layers": layers,
        "weight_bytes": weights,
        "limit": LIMIT,
        "weights_over_limit": round(weights / 256e6, 2),
        "floor_bytes": max(embedding, (weights - 2 * embedding) // layers),
        "layer_by_layer": by_layer,
        "whole": whole,
        "peak_over_weights": {
            "layer_by_layer": round(by_layer["peak_bytes"] / weights, 3),
            "whole": round(whole["peak_bytes"] / weights, 3),
        },
        "within_limit": by_layer["peak_bytes"] <= 256e6,
        "same_statistics": same,
        "tokens": SAMPLES * SEQ_LEN,
        "dtype": "float32",
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--json", default=str(RESULTS), help="file to write, or - for standard output")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.layers), indent=2)
    if arguments.json == "-":
        print(text)
    else:
        Path(arguments.json).write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
