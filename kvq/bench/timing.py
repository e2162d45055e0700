"""Timing of calls that do the same on different memory: medians, taken in turns, never from a warm cache."""

import time
from collections.abc import Callable, Sequence

import torch

# Memory that the calls rotate over: more than three times the last cache of the machines in question.
ROTATED_BYTES = {"cpu": 128 << 20, "cuda": 192 << 20}
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many copies of data of ``nbytes`` to rotate over."""
    return max(1, -(-ROTATED_BYTES[device.type] // nbytes))


def time_in_turns(
    sides: dict[str, Sequence[Callable[[], object]]], device: torch.device, *, seconds: float = 0.5, turns: int = 5
) -> dict[str, list[float]]:
    """Seconds a call of every side, one number a turn; the sides take turns, so that a change of pace meets all.

    sides     by name, equal calls on copies of the data, run one after the other.
    seconds   what a side's turns may take together.
    """
    run = _replay if device.type == "cuda" else _in_sequence
    runners = {name: run(calls) for name, calls in sides.items()}
    repeats = {}
    for name, once in runners.items():
        once(1)
        repeats[name] = max(1, round(seconds / turns / max(once(1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, once in runners.items():
            found[name].append(once(repeats[name]) / repeats[name] / len(sides[name]))
    return found


def copy_call(device: torch.device) -> Callable[[], object]:
    """A large copy: the roof of everything that reads memory once. It reads and writes ``copied_bytes``."""
    source, target = (torch.ones(COPY_BYTES[device.type] // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def copied_bytes(device: torch.device) -> int:
    return 2 * COPY_BYTES[device.type]


def _in_sequence(calls: Sequence[Callable[[], object]]) -> Callable[[int], float]:
    def once(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            for call in calls:
                call()
        return time.perf_counter() - start

    return once


def _replay(calls: Sequence[Callable[[], object]]) -> Callable[[int], float]:
    """The calls as one CUDA graph, as serving runs them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def once(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return once
