"""Decode attention over packed pages on the CPU, compiled by numba: one pass per row, nothing unpacked beyond a page.

The same numbers as ``kvq/kernels/decode.py`` in another order of summation: tokens are cut into splits, every split
keeps a running maximum and sum (FlashDecoding), and the splits are merged. Each page is unpacked into a buffer that
fits the core's cache. numba is optional; without it ``unavailable`` says so, and callers use the torch reference.
"""

import importlib.util
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from kvq.kernels.spec import ATOM, PageLayout, SideLayout

# Tokens a split takes at least: below this the merge costs more than a second core gains.
SPLIT_TOKENS = 512
# Stands for "no learned sink": its share of the softmax is zero.
LOWEST = -1e30
DTYPES = (torch.float32, torch.float64)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the compiled kernel cannot run here; None if it can."""
    return None if importlib.util.find_spec("numba") else "numba is not installed: pip install 'kvq-toolkit[cpu]'"


@lru_cache(maxsize=256)
def supports(layout: PageLayout) -> bool:
    """True for layouts whose numbers are code * scale + minimum, or e4m3 bytes, and whose groups fill whole lanes."""
    return all(s.is_plain and (s.axis == "channel" or s.group % ATOM == 0) for s in (layout.key, layout.value))


@lru_cache(maxsize=256)
def _side_numbers(side: SideLayout) -> np.ndarray:
    """What the kernel must know of a side: bits (0 for e4m3), axis, group, rows, chunks, width, metadata groups."""
    if side.format == "e4m3":
        return np.array([0, 0, side.head_dim, side.page_tokens, 1, side.head_dim, 0])
    channel = side.axis == "channel"
    groups = 0 if channel else side.head_dim // side.group
    return np.array([side.bits, int(channel), side.group, side.rows, side.chunks, side.width, groups])


def decode_row(
    q: torch.Tensor,
    addresses: np.ndarray,
    layout: PageLayout,
    packed: tuple[int, int],
    exact: tuple[torch.Tensor, torch.Tensor],
    sinks: tuple[torch.Tensor, torch.Tensor] | None,
    scales: tuple[float, float],
    body: int,
    *,
    softcap: float | None = None,
    learned: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one row's queries over all its tokens, [K, M, D] like q (float32 or float64, scaled already).

    addresses   int64 [P], where each page's records [K, record_bytes] start in memory.
    packed      body tokens that keys and values read from pages; later ones are read from ``exact``.
    exact       keys and values [K, n, D] in the dtype of q; the last token is body token ``body - 1``.
    sinks       exact keys and values [K, S, D] before the body, or None.
    scales      static scales of e4m3 keys and values.
    learned     one more logit per query, [K, M], or None. bias: additive mask over all S + body tokens, or None.
    """
    K, M, D = q.shape
    dtype = q.numpy().dtype
    attend_units, merge = _compiled(dtype.name)
    empty = np.empty((K, 0, D), dtype)
    sink_k, sink_v = (x.numpy() for x in sinks) if sinks is not None else (empty, empty)
    threads = torch.get_num_threads()
    splits = max(1, min(4 * threads, body // SPLIT_TOKENS))
    offsets = (layout.offsets.get(name, 0) for name in _OFFSETS)
    partial = np.empty((K, splits, M), dtype), np.empty((K, splits, M), dtype), np.empty((K, splits, M, D), dtype)
    arguments = (
        q.numpy(),
        addresses,
        np.array([layout.record_bytes, *offsets, layout.page_tokens, *packed, body, splits]),
        _side_numbers(layout.key),
        _side_numbers(layout.value),
        np.array([*scales, softcap or 0.0], dtype),
        exact[0].numpy(),
        exact[1].numpy(),
        sink_k,
        sink_v,
        np.empty(0, dtype) if bias is None else bias.contiguous().numpy(),
        *partial,
    )
    _share(attend_units, K * splits, threads, arguments)
    out = torch.empty_like(q)
    merge(*partial, np.full((K, M), LOWEST, dtype) if learned is None else learned.contiguous().numpy(), out.numpy())
    return out


@lru_cache(maxsize=256)
def appends(side: SideLayout) -> bool:
    """True for sides that ``append_token`` can write: an fp16 pair (scale, minimum) per group of a token's channels."""
    return side.is_plain and side.format == "affine" and side.axis == "token" and not unavailable()


def append_token(tokens: torch.Tensor, records: torch.Tensor, layout: PageLayout, side: str, slot: int, keep) -> bool:
    """Quantize one token with the plain min-max grid and write it to its page: the bytes of the torch reference.

    tokens   [K, D] float32 or float64.
    records  [K, record_bytes] uint8, those of one page.
    keep     uint16 numpy array: the bits of a row of words that belong to tokens before this one.

    Returns False if the numbers cannot be stored (NaN, infinite, beyond fp16).
    """
    own, numbers = layout.side(side), tokens.numpy()
    sizes = layout.offsets[f"{side}_words"], own.words_bytes, layout.offsets[f"{side}_meta"]
    return _compiled_append(numbers.dtype.name)(numbers, records.numpy(), sizes, _side_numbers(own), slot, keep)


def _share(attend_units, units: int, threads: int, arguments: tuple) -> None:
    """Run the units on this thread and, where there is enough to do, on others: the loops hold no lock."""
    shares = min(threads, units)
    cuts = [units * i // shares for i in range(shares + 1)]
    others = [_pool().submit(attend_units, a, b, *arguments) for a, b in itertools.pairwise(cuts[1:])]
    attend_units(cuts[0], cuts[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kvq")


_OFFSETS = ("key_words", "value_words", "key_meta", "value_meta")


@lru_cache(maxsize=2)
def _compiled(dtype: str):
    """Import and compile on first use; the machine code is kept beside the source or in the user's cache folder."""
    import numba

    from kvq.kernels.cpu_loops import compiled

    return compiled(getattr(numba.types, dtype))


@lru_cache(maxsize=2)
def _compiled_append(dtype: str):
    import numba

    from kvq.kernels.cpu_append_loops import compiled

    return compiled(getattr(numba.types, dtype))
