"""Arguments and options of the launches of one decode step: split, exact, merge."""

from typing import Any

import torch

from kvq.kernels.decode_attention.decode_plan import MOST_REGISTERS, TURNED_ROUNDS, DecodePlan, Geometry
from kvq.kernels.decode_attention.exact_tokens import decode_exact
from kvq.kernels.decode_attention.merge import decode_merge
from kvq.kernels.decode_attention.split import decode_split
from kvq.kernels.device.launch import Launch, books, factor, limit_of
from kvq.kernels.types import Exact, KeyFrame, Query
from kvq.pages.pages import Pages

_MERGE_SPLITS = 16


def _options(geometry: Geometry, registers: int) -> dict[str, int | bool]:
    options = {"num_warps": geometry.parameters.warps, "enable_fp_fusion": True}
    # The interpreter takes no limit of registers.
    return options | ({"maxnreg": registers} if geometry.sm else {})


def _shared_constants(geometry: Geometry, query: Query, frame: KeyFrame | None) -> dict[str, Any]:
    return {
        "K": geometry.key,
        "V": geometry.value,
        "T": geometry.tile,
        "RECORD": geometry.layout.record_bytes,
        "HEADS": geometry.group,
        "QUERIES": geometry.queries,
        "H": geometry.columns,
        "SOFTCAP": query.softcap is not None,
        "WINDOW": query.window is not None,
        "C": geometry.turned_columns,
        "BLOCKS": geometry.turned_blocks,
        "MATRIX": frame is not None and frame.matrix is not None,
        "MEAN": frame is not None and frame.mean is not None,
        "ASM": geometry.sm,
    }


def _scalars(pages: Pages, query: Query) -> tuple:
    return (
        float(query.scale),
        factor(pages, "key"),
        factor(pages, "value"),
        float(query.softcap or 1.0),
        int(query.window or 0),
    )


def _framed(plan: DecodePlan, frame: KeyFrame | None) -> tuple:
    """Arguments ``frame``, ``frame_stride``, ``growth`` and ``matrix_scale`` of a kernel."""
    if frame is None:
        return (), 0, 1.0, 1.0
    numbers = [frame.turns if numbers is None else numbers for numbers in (frame.matrix, frame.mean)]
    held = (frame.index, frame.turns, frame.partner, *numbers, plan.turned, plan.turned_bias)
    return held, frame.index.stride(0), float(frame.growth), float(frame.matrix_scale)


def split(
    plan: DecodePlan,
    pages: Pages,
    lengths: torch.Tensor,
    query: Query,
    first_token: int,
    frame: KeyFrame | None = None,
) -> Launch:
    """``lengths`` [B] int32: packed tokens on both sides; ``first_token``: position of the first of them."""
    geometry, q = plan.geometry, query.q
    return Launch(
        kernel=decode_split,
        grid=(plan.capacity, plan.heads, geometry.column_blocks),
        args=(
            q,
            pages.pool.base,
            pages.table,
            plan.items,
            lengths,
            lengths if query.window is None else query.positions,
            limit_of(pages, plan.partial),
            plan.partial,
            plan.partial_lse,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            pages.table.stride(0),
            pages.pool.unit,
            *_scalars(pages, query),
            first_token,
            *books(pages),
            *_framed(plan, frame),
        ),
        constants=_shared_constants(geometry, query, frame)
        | {"CHUNK": TURNED_ROUNDS, "STAGES": geometry.parameters.stages},
        options=_options(geometry, geometry.parameters.registers),
    )


def exact(plan: DecodePlan, pages: Pages, query: Query, tokens: Exact, frame: KeyFrame | None = None) -> Launch:
    geometry, q = plan.geometry, query.q
    sinks = tokens.sink_keys
    return Launch(
        kernel=decode_exact,
        grid=(plan.batch, plan.heads, geometry.column_blocks),
        args=(
            q,
            pages.pool.base,
            pages.table,
            tokens.lengths,
            query.positions,
            limit_of(pages, plan.partial),
            plan.partial,
            plan.partial_lse,
            tokens.keys,
            tokens.values,
            tokens.key_offsets,
            tokens.value_offsets,
            tokens.keys if sinks is None else sinks,
            tokens.values if sinks is None else tokens.sink_values,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            pages.table.stride(0),
            pages.pool.unit,
            *tokens.keys.stride()[:3],
            tokens.keys.shape[2],
            *tokens.values.stride()[:3],
            tokens.values.shape[2],
            *((0, 0, 0) if sinks is None else sinks.stride()[:3]),
            0 if sinks is None else sinks.shape[2],
            *_scalars(pages, query),
            plan.capacity,
            *books(pages),
            *_framed(plan, frame),
        ),
        constants=_shared_constants(geometry, query, frame)
        | {"MIXED_KEY": tokens.mixed_key, "MIXED_VALUE": tokens.mixed_value, "SINKS": sinks is not None},
        # A few programs read a few hundred tokens: what counts is that nothing spills, not how many fit.
        options=_options(geometry, MOST_REGISTERS),
    )


def merge(plan: DecodePlan, query: Query, out: torch.Tensor, has_exact: bool) -> Launch:
    geometry = plan.geometry
    head_dim = geometry.layout.key.head_dim
    return Launch(
        kernel=decode_merge,
        grid=(plan.batch, plan.heads, geometry.group * geometry.queries),
        args=(
            out,
            plan.partial,
            plan.partial_lse,
            plan.spans,
            plan.lse if query.sink_logits is None else query.sink_logits,
            plan.lse,
            plan.capacity,
            *out.stride()[:3],
        ),
        constants={
            "HEADS": geometry.group,
            "QUERIES": geometry.queries,
            "D": head_dim,
            "BLOCK_D": 1 << (head_dim - 1).bit_length(),
            "SPLITS": _MERGE_SPLITS,
            "EXACT": int(has_exact),
            "SINK_LOGITS": query.sink_logits is not None,
        },
        options={"num_warps": 4},
    )
