"""Arguments and options of every kernel launch, in one place: what runs is what the budgets are counted on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvq.kernels.choice import capability
from kvq.kernels.device.append import advance as advance_kernel
from kvq.kernels.device.append import append_tokens
from kvq.kernels.device.exact import decode_exact
from kvq.kernels.device.hadamard import hadamard_rotate
from kvq.kernels.device.merge import decode_merge
from kvq.kernels.device.pack import PACK_ROWS, pack_tokens
from kvq.kernels.device.plan import plan_items as plan_items_kernel
from kvq.kernels.device.split import decode_split
from kvq.kernels.device.unpack import unpack_pages
from kvq.kernels.fields import book_registers
from kvq.kernels.geometry import sides_of

if TYPE_CHECKING:
    from kvq.kernels.append import DecodeState, ExactStore
    from kvq.kernels.attention import Exact, Query
    from kvq.kernels.packing import Rotation, Source
    from kvq.kernels.plan import DecodePlan, Geometry
    from kvq.pages.pages import Pages

_MERGE_SPLITS = 16
_PLAN_ITEMS = 32
_MOST_REGISTERS = 255
_ADVANCE_BLOCK = 32
_PACK_ROWS = PACK_ROWS.value


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel call: ``run`` it, or ``compile`` it for the current target and get the binary."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple
    constants: dict[str, Any]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants, **self.options)

    def compile(self):
        return self.kernel.warmup(*self.args, **self.constants, **self.options, grid=self.grid)


def _options(geometry: "Geometry", registers: int) -> dict[str, int | bool]:
    options = {"num_warps": geometry.parameters.warps, "enable_fp_fusion": True}
    # The interpreter takes no limit of registers.
    return options | ({"maxnreg": registers} if geometry.sm else {})


def plan_items(
    plan: "DecodePlan", lengths: torch.Tensor, positions: torch.Tensor | None, window: int | None, first_token: int
) -> Launch:
    from kvq.kernels.plan import MAX_SPLITS, OVERHEAD

    geometry = plan.geometry
    return Launch(
        kernel=plan_items_kernel,
        grid=(-(-plan.capacity // _PLAN_ITEMS), 1, 1),
        args=(
            lengths,
            lengths if positions is None else positions,
            plan.items,
            plan.spans,
            plan.batch,
            plan.slots,
            plan.capacity,
            plan.heads * geometry.column_blocks,
            window or 0,
            first_token,
        ),
        constants={
            "ROUND": geometry.tile.round,
            "QUERIES": plan.queries,
            "OVERHEAD": OVERHEAD,
            "MAX_SPLITS": MAX_SPLITS,
            "BATCH": 1 << (plan.batch - 1).bit_length(),
            "ITEMS": _PLAN_ITEMS,
            "WINDOW": window is not None,
        },
        options={"num_warps": 4},
    )


def _limits(pages: "Pages") -> bool:
    """Whether the values' scales lie in pages, token by token, and a bound of them is known."""
    value = sides_of(pages.layout)[1]
    return pages.value_limit is not None and value.scaled and not value.by_channel


def _books(pages: "Pages") -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(() if levels is None else book_registers(levels) for levels in (pages.key_levels, pages.value_levels))


def _shared_constants(geometry: "Geometry", pages: "Pages", query: "Query") -> dict[str, Any]:
    return {
        "K": geometry.key,
        "V": geometry.value,
        "T": geometry.tile,
        "RECORD": geometry.layout.record_bytes,
        "HEADS": geometry.group,
        "QUERIES": geometry.queries,
        "H": geometry.columns,
        "FACTOR": pages.channel_factor is not None,
        "LIMIT": _limits(pages),
        "SOFTCAP": query.softcap is not None,
        "WINDOW": query.window is not None,
        "ASM": geometry.sm,
    }


def _scalars(pages: "Pages", query: "Query") -> tuple:
    return (
        float(query.scale),
        float(pages.key_scale),
        float(pages.value_scale),
        float(query.softcap or 1.0),
        int(query.window or 0),
    )


def split(plan: "DecodePlan", pages: "Pages", lengths: torch.Tensor, query: "Query", first_token: int) -> Launch:
    """``lengths`` [B] int32: packed tokens on both sides; ``first_token``: position of the first of them."""
    geometry, q = plan.geometry, query.q
    masked = query.positions is not None and (query.causal or query.window is not None)
    return Launch(
        kernel=decode_split,
        grid=(plan.capacity, plan.heads, geometry.column_blocks),
        args=(
            q,
            pages.pool,
            pages.table,
            plan.items,
            lengths,
            query.positions if masked else lengths,
            q if pages.channel_factor is None else pages.channel_factor,
            pages.value_limit if _limits(pages) else plan.partial,
            plan.partial,
            plan.partial_lse,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            pages.table.stride(0),
            pages.stride,
            *_scalars(pages, query),
            first_token,
            *_books(pages),
        ),
        constants=_shared_constants(geometry, pages, query)
        | {"CAUSAL": query.causal, "STAGES": geometry.parameters.stages},
        options=_options(geometry, geometry.parameters.registers),
    )


def exact(plan: "DecodePlan", pages: "Pages", query: "Query", tokens: "Exact") -> Launch:
    geometry, q = plan.geometry, query.q
    sinks = tokens.sink_keys
    return Launch(
        kernel=decode_exact,
        grid=(plan.batch, plan.heads, geometry.column_blocks),
        args=(
            q,
            pages.pool,
            pages.table,
            tokens.lengths,
            query.positions,
            q if pages.channel_factor is None else pages.channel_factor,
            pages.value_limit if _limits(pages) else plan.partial,
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
            pages.stride,
            *tokens.keys.stride()[:3],
            tokens.keys.shape[2],
            *tokens.values.stride()[:3],
            tokens.values.shape[2],
            *((0, 0, 0) if sinks is None else sinks.stride()[:3]),
            0 if sinks is None else sinks.shape[2],
            *_scalars(pages, query),
            plan.capacity,
            *_books(pages),
        ),
        constants=_shared_constants(geometry, pages, query)
        | {"MIXED_KEY": tokens.mixed_key, "MIXED_VALUE": tokens.mixed_value, "SINKS": sinks is not None},
        # A few programs read a few hundred tokens: what counts is that nothing spills, not how many fit.
        options=_options(geometry, _MOST_REGISTERS),
    )


def merge(plan: "DecodePlan", query: "Query", out: torch.Tensor, has_exact: bool) -> Launch:
    geometry = plan.geometry
    head_dim = geometry.layout.key.head_dim
    return Launch(
        kernel=decode_merge,
        grid=(plan.batch, plan.heads, geometry.group * geometry.queries),
        args=(
            plan.partial,
            plan.partial_lse,
            plan.spans,
            plan.lse if query.sinks is None else query.sinks,
            out,
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
            "SINKS": query.sinks is not None,
        },
        options={"num_warps": 4},
    )


def _pieces(longest: int, page_tokens: int) -> int:
    """Most pages that a range of ``longest`` tokens can touch."""
    return (longest + page_tokens - 2) // page_tokens + 1


def _exactly() -> dict[str, int | bool]:
    """Options of kernels whose bytes must not depend on how products and sums are contracted."""
    return {"num_warps": 4, "enable_fp_fusion": False}


def pack(source: "Source", pages: "Pages", side: str, clip: float, rotation: "Rotation | None") -> Launch:
    sm = capability(source.x.device)
    own = sides_of(pages.layout)[0 if side == "key" else 1]
    x = source.x
    factor = side == "key" and pages.channel_factor is not None
    limit = side == "value" and _limits(pages)
    return Launch(
        kernel=pack_tokens,
        grid=(_pieces(source.longest, own.page_tokens), x.shape[0], pages.heads),
        args=(
            x,
            pages.pool,
            pages.table,
            source.ranges,
            source.offsets,
            source.offsets if rotation is None else rotation.signs,
            pages.channel_factor if factor else source.offsets,
            pages.value_limit if limit else source.offsets,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            x.shape[2],
            pages.table.stride(0),
            pages.stride,
            (1 - clip) / 2,
            float(pages.key_scale if side == "key" else pages.value_scale),
        ),
        constants={
            "S": own,
            "RECORD": pages.layout.record_bytes,
            "CLIP": clip < 1,
            "LIMIT": limit,
            "FACTOR": factor,
            "ROTATE": 0 if rotation is None else rotation.block,
            "ASM": sm,
        },
        options=_exactly(),
    )


def unpack(pages: "Pages", side: str, lengths: torch.Tensor, out: torch.Tensor) -> Launch:
    sm = capability(out.device)
    own = sides_of(pages.layout)[0 if side == "key" else 1]
    factor = side == "key" and pages.channel_factor is not None
    count = -(-out.shape[2] // own.page_tokens)
    return Launch(
        kernel=unpack_pages,
        grid=(count * -(-own.rows // _PACK_ROWS), out.shape[0], pages.heads),
        args=(
            pages.pool,
            pages.table,
            lengths,
            pages.channel_factor if factor else lengths,
            out,
            out.stride(0),
            out.stride(1),
            out.stride(2),
            pages.table.stride(0),
            pages.stride,
            float(pages.key_scale if side == "key" else pages.value_scale),
            _books(pages)[0 if side == "key" else 1],
        ),
        constants={"S": own, "RECORD": pages.layout.record_bytes, "FACTOR": factor, "ASM": sm},
        options=_exactly(),
    )


def hadamard(x: torch.Tensor, rotation: "Rotation", out: torch.Tensor, inverse: bool) -> Launch:
    B, heads, tokens, head_dim = x.shape
    return Launch(
        kernel=hadamard_rotate,
        grid=(-(-B * heads * tokens // _PACK_ROWS), head_dim // rotation.block, 1),
        args=(x, out, rotation.signs, B * heads * tokens, tokens, heads, *x.stride()[:3], *out.stride()[:3]),
        constants={
            "D": head_dim,
            "BLOCK": rotation.block,
            "SIGNS": True,
            "INVERSE": inverse,
            "ASM": capability(x.device),
        },
        options=_exactly(),
    )


def advance(state: "DecodeState", new: "int | torch.Tensor") -> Launch:
    per_sequence = isinstance(new, torch.Tensor)
    return Launch(
        kernel=advance_kernel,
        grid=(-(-state.batch // _ADVANCE_BLOCK), 1, 1),
        args=(
            state.counters,
            state.exact_lengths,
            state.lengths,
            state.positions,
            new if per_sequence else state.zeros,
            state.batch,
            0 if per_sequence else new,
            state.sinks,
            state.key.window,
            state.key.unit,
            state.value.window,
            state.value.unit,
        ),
        constants={"PER_SEQUENCE": per_sequence, "BLOCK": _ADVANCE_BLOCK},
        options={"num_warps": 1},
    )


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    store: "ExactStore",
    pages: "Pages",
    state: "DecodeState",
    rotations: "dict[str, Rotation]",
    clip: tuple[float, float],
) -> Launch:
    key_side, value_side = sides_of(pages.layout)
    new, head_dim = keys.shape[2], keys.shape[3]
    flushed = max(state.key.flushed(state.most_new), state.value.flushed(state.most_new))
    blocks = [rotations[side].block if side in rotations else 0 for side in ("key", "value")]
    signs = next((rotation.signs for rotation in rotations.values()), state.zeros)
    assert all(rotation.signs is signs for rotation in rotations.values()), "keys and values share their signs"
    limit = _limits(pages)
    sinks = store.sink_keys
    return Launch(
        kernel=append_tokens,
        grid=(_pieces(flushed, key_side.page_tokens), keys.shape[0], 2 * pages.heads),
        args=(
            keys,
            values,
            store.keys,
            store.values,
            sinks,
            store.sink_values,
            state.counters,
            pages.pool,
            pages.table,
            signs,
            state.zeros if pages.channel_factor is None else pages.channel_factor,
            pages.value_limit if limit else state.zeros,
            *keys.stride()[:3],
            *values.stride()[:3],
            *store.keys.stride()[:3],
            store.keys.shape[2],
            *store.values.stride()[:3],
            store.values.shape[2],
            *sinks.stride()[:3],
            state.sinks,
            pages.table.stride(0),
            pages.stride,
            float(pages.key_scale),
            float(pages.value_scale),
            (1 - clip[0]) / 2,
            (1 - clip[1]) / 2,
        ),
        constants={
            "K": key_side,
            "V": value_side,
            "RECORD": pages.layout.record_bytes,
            "NEW": new,
            "EVERY": 1 << (head_dim - 1).bit_length(),
            "KEY_CLIP": clip[0] < 1,
            "VALUE_CLIP": clip[1] < 1,
            "LIMIT": limit,
            "FACTOR": pages.channel_factor is not None,
            "KEY_ROTATE": blocks[0],
            "VALUE_ROTATE": blocks[1],
            "ASM": capability(keys.device),
        },
        options=_exactly(),
    )
