"""The CPU's kernels in numba against the same in C++: decode attention, the append of a token, passes of calibration.

    python benchmarks/cpu_kernels.py [--out benchmarks/results/cpu_kernels] [--only decode,append,pass]

Both sides run in one process on the same bytes and take turns; a turn is the fastest of five calls, a figure the median
of the turns, and a ratio the median of the turns' ratios (numba over C++: above 1 C++ is faster). Before anything is
timed, the two must agree.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from kvq.bench.bench import Shape, full_pages
from kvq.bench.samples import layout_of
from kvq.calib.kinds import loops
from kvq.calib.kinds.histogram import MAGNITUDES
from kvq.kernels import cpu, team
from kvq.kernels.cpp import build, launch
from kvq.pages.bits import kept_bits
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool

WIDTHS = ("2", "3", "4", "8", "2c32", "4c32", "e4m3")
CONTEXTS, BATCHES, THREADS = (2048, 8192), (1, 4), (1, 2)
HEADS, GROUP, HEAD_DIM = 3, 3, 64


def turns(sides: dict, count: int) -> dict:
    """Medians of both sides in seconds, and of the ratios of the turns."""
    seconds = {name: [] for name in sides}
    for call in sides.values():
        call()
    for turn in range(count):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            best = float("inf")
            for _ in range(5):
                start = time.perf_counter()
                sides[name]()
                best = min(best, time.perf_counter() - start)
            seconds[name].append(best)
    ratios = [a / b for a, b in zip(seconds["numba"], seconds["cpp"])]
    found = {name: statistics.median(own) for name, own in seconds.items()}
    return found | {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def decode_sides(width: str, context: int, batch: int, head_dim: int) -> dict:
    shape = Shape(batch=batch, context=context, kv_heads=HEADS, group=GROUP, head_dim=head_dim)
    channel, bits = "c" in width, width.split("c")[0]
    layout = layout_of(width, bits if channel else width, head_dim=head_dim)
    pages = full_pages(shape, layout, torch.device("cpu"), 0)
    q = torch.randn(batch, HEADS, GROUP, head_dim, generator=torch.Generator().manual_seed(1)) * head_dim**-0.5
    addresses = pages.pool.addresses(pages.table.numpy())
    empty = torch.empty(batch, HEADS, 1, head_dim)
    counts = torch.tensor([[context, context, context, 0, context, 0, 0]] * batch, dtype=torch.int32)

    def by_numba():
        none, scales = (empty[0, :, :0], empty[0, :, :0]), (pages.key_scale, pages.value_scale)
        row = [context, context]
        return torch.stack(
            [cpu.decode_row(q[b], addresses[b], layout, row, none, None, scales, context) for b in range(batch)]
        )

    def by_cpp():
        return launch.decode_attention(q.unsqueeze(3), pages, counts, (empty, empty))[0].squeeze(3)

    error = float((by_numba() - by_cpp()).norm() / by_cpp().norm())
    assert error < 1e-5, (width, error)
    return {"numba": by_numba, "cpp": by_cpp}


def append_sides(bits: str, batch: int, head_dim: int) -> dict:
    """One token of every row, into the last slot of a page."""
    layout = layout_of(bits, bits, head_dim=head_dim)
    slot = layout.page_tokens - 1
    keep = kept_bits(layout.key, slot // layout.key.rows, torch.device("cpu"))
    words = layout.key.words_bytes // 2 // layout.key.rows
    keep = np.zeros(words, np.uint16) if keep is None else keep.flatten().numpy().view(np.uint16)
    pool = Pool(layout, HEADS)
    ids = pool.allocate(batch)
    pages = Pages(pool=pool, ids=[[page] for page in ids])
    x = torch.randn(batch, HEADS, 1, head_dim, generator=torch.Generator().manual_seed(1))

    def by_numba():
        for page, token in zip(ids, x):
            cpu.append_token(token[:, 0], pool.records(page), layout, "key", slot, keep)

    def by_cpp():
        launch.pack(x, pages, "key", slot)

    by_numba()
    before = pool.base.clone()
    pool.base.zero_()
    by_cpp()
    assert torch.equal(before, pool.base)
    return {"numba": by_numba, "cpp": by_cpp}


def by_numba(name: str, rows: torch.Tensor, groups: int, arrays: list, bins=(0, 0, 0), stride: int = 0) -> None:
    threads = torch.get_num_threads()
    width = -(-rows.shape[2] // (16 * threads)) * 16
    units = rows.shape[0] if stride else -(-rows.shape[2] // width)
    job = np.zeros(loops.JOB, np.int64)
    job[: loops.ARRAYS] = 0, units, width, *rows.shape, groups, *bins, stride
    job[loops.ARRAYS : loops.ARRAYS + 1 + len(arrays)] = [array.data_ptr() for array in (rows, *arrays)]
    team.share(getattr(loops, name), job, min(threads, units))


def pass_sides(name: str) -> dict:
    """A pass of calibration over 8 x 512 tokens of 3 heads, or of 576 channels; results are made by both."""
    x = torch.randn(8, 512, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(8, 512, 576, generator=torch.Generator().manual_seed(2))
    valid, bins = torch.ones(8, 512, dtype=torch.bool), MAGNITUDES.integers
    places, levels = (1, x.shape[2]), MAGNITUDES.levels

    def made() -> list[torch.Tensor]:
        if name == "channel_range":
            infinity = torch.full(places, float("inf"))
            return [infinity, -infinity, *(torch.zeros(places, dtype=torch.float64) for _ in range(2))]
        if name == "count_signed":
            return [torch.zeros(*places, 2 * levels + 1, dtype=torch.int32)]
        columns = torch.zeros(8, 576, dtype=torch.int32)
        return [torch.zeros(8, 512, dtype=torch.int32), columns, torch.zeros(8, levels + 1, dtype=torch.int64)]

    def numba() -> list[torch.Tensor]:
        arrays = made()
        if name == "massive":
            by_numba(name, hidden, 1, [valid, *arrays], bins, 7)
        else:
            by_numba(name, x, 1, arrays, bins)
        return arrays

    def cpp() -> list[torch.Tensor]:
        arrays = made()
        if name == "massive":
            torch.ops.kvq.massive(hidden, valid, bins, 7, *arrays)
        else:
            getattr(torch.ops.kvq, name)(x, *([] if name == "channel_range" else [bins]), *arrays)
        return arrays

    for a, b in zip(numba(), cpp()):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12), name
    return {"numba": numba, "cpp": cpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "cpu_kernels"))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="decode,append,pass")
    settings = parser.parse_args()
    assert build.unavailable() is None, build.unavailable()
    rows = []

    def measure(what: str, sides: dict, threads: int, **facts) -> None:
        torch.set_num_threads(threads)
        row = {"what": what, **facts, "threads": threads, **turns(sides, settings.turns)}
        rows.append(row)
        print(*(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()), flush=True)

    if "decode" in settings.only:
        for width, context, batch, head_dim in itertools.product(WIDTHS, CONTEXTS, BATCHES, (64, 128)):
            sides = decode_sides(width, context, batch, head_dim)
            for threads in THREADS:
                facts = {"width": width, "context": context, "batch": batch, "head_dim": head_dim}
                measure("decode", sides, threads, **facts)
    if "append" in settings.only:
        for bits, batch in itertools.product(("2", "3", "4", "8"), BATCHES):
            measure("append", append_sides(bits, batch, 128), 1, width=bits, batch=batch, head_dim=128)
    if "pass" in settings.only:
        for name, threads in itertools.product(("channel_range", "count_signed", "massive"), THREADS):
            measure(name, pass_sides(name), threads)
    load = os.getloadavg()
    Path(settings.out + ".json").write_text(json.dumps({"rows": rows, "load": load}, indent=1) + "\n")


if __name__ == "__main__":
    main()
