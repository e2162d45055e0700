"""Decode attention over packed pages on the CPU, compiled by numba: one pass per row, nothing unpacked beyond a page.

The same numbers as ``decode_attention/products.py`` in another order of summation: tokens are cut into splits, every
split keeps a running maximum and sum (FlashDecoding), and the splits are merged. Each page is unpacked into a buffer
that fits the core's cache. numba is optional; without it ``unavailable`` says so, and callers use the torch reference.
"""

from functools import lru_cache

import numpy as np
import torch

from kvq.kernels import team
from kvq.pages.layout import ATOM, PageLayout, SideLayout

# Tokens a split takes at least: below this the merge costs more than a second core gains.
SPLIT_TOKENS = 512
# Stands for "no learned sink": its share of the softmax is zero.
LOWEST = -1e30
DTYPES = (torch.float32, torch.float64)


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
    numbers = q.numpy().dtype
    run, merge = _compiled(numbers.name)
    exact = [_rows(x) for x in exact]
    sinks = [_rows(x) for x in sinks] if sinks is not None else [q[:, :0], q[:, :0]]
    bias = None if bias is None else bias.contiguous()
    threads = torch.get_num_threads()
    splits = max(1, min(4 * threads, body // SPLIT_TOKENS))
    partial = [np.empty(shape, numbers) for shape in ((K, splits, M), (K, splits, M), (K, splits, M, D))]
    settings = np.array([*scales, softcap or 0.0], numbers)
    job = [
        *(0, splits, K, M, D, layout.record_bytes, layout.page_tokens, body, sinks[0].shape[1]),
        *(q.data_ptr(), addresses.ctypes.data),
        *(layout.offsets.get(name, 0) for name in _OFFSETS),
        *packed,
        *(number for x in exact for number in _strides(x, body)),
        *(number for x in sinks for number in _strides(x, x.shape[1])),
        *((0, 0) if bias is None else (bias.data_ptr(), bias.numel())),
        settings.ctypes.data,
        *(array.ctypes.data for array in partial),
        *_side_numbers(layout.key),
        *_side_numbers(layout.value),
    ]
    team.share(run, np.array(job, np.int64), min(threads, K * splits))
    out = torch.empty_like(q)
    merge(*partial, np.full((K, M), LOWEST, numbers) if learned is None else learned.contiguous().numpy(), out.numpy())
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with the numbers of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: torch.Tensor, tokens: int) -> tuple[int, int, int]:
    """Where token 0 of ``tokens`` is if x [K, n, D] holds the last n; bytes between heads, and between tokens."""
    size = x.element_size()
    return x.data_ptr() + (x.shape[1] - tokens) * x.stride(1) * size, x.stride(0) * size, x.stride(1) * size


@lru_cache(maxsize=256)
def appends(side: SideLayout) -> bool:
    """True for sides that ``append_token`` can write: an fp16 pair (scale, minimum) per group of a token's channels."""
    return side.is_plain and side.format == "affine" and side.axis == "token" and not team.unavailable()


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
