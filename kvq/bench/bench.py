"""Decode attention of every width against the roof: correct first, then bytes, copy bandwidth, and 16-bit attention.

Nothing is timed before it has been compared with softmax over dequantized tokens in fp64, on the same codes.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from kvq.bench import timing
from kvq.bench.roofline import Shape, exact_bytes, step_bytes
from kvq.bench.samples import layout_of, levels_of, random_pages
from kvq.errors import DataError, KernelError
from kvq.kernels.cpp import build, launch
from kvq.kernels.cpp.sides import CppSide, sides_of_pages
from kvq.kernels.decode_attention import decode_attention
from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.decode_attention.reference import dense_attention
from kvq.kernels.dispatch import Choice, choose, why_no_layout, why_no_triton
from kvq.kernels.types import Query
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Pages

WIDTHS = ("8", "4", "3", "2", "e4m3", "kivi2", "nf4")
# Pairs of sides (see ``samples.side_of``) that have a name of their own.
NAMED = {"kivi2": ("2c32", "2/32"), "kivi4": ("4c32", "4/32")}
# Tokens of the comparison with fp64: some pages and a piece of one.
CHECKED_TOKENS = 777
COPY = "copy"
# Largest relative error (Frobenius) of a result in fp32 and in 16 bits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-3}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One width on one shape. Times are medians in seconds; None where nothing was measured, and why in ``note``.

    error           relative error against fp64. bytes: what a step moves. floor: those bytes at copy bandwidth.
    fraction        of the copy bandwidth that was reached.
    vs_best_exact   the best exact attention's time over this one, in the same turns.
    """

    shape: str
    width: str
    ran: str
    error: float | None = None
    bytes: int | None = None
    floor: float | None = None
    seconds: float | None = None
    spread: tuple[float, float] | None = None
    fraction: float | None = None
    vs_best_exact: float | None = None
    note: str | None = None


def sides_of(width: str) -> tuple[str, str]:
    """Key and value of a width: one name for both, KEY:VALUE, or a name of ``NAMED``. Raises DataError."""
    key, _, value = width.partition(":")
    pair = NAMED.get(width, (key, value or key))
    try:
        layout_of(*pair)
    except (AssertionError, ValueError, KeyError):
        raise DataError(
            f"width {width!r} is not readable: write bits (8, 4, 3, 2), e4m3, nf4, kivi2, or KEY:VALUE such as 4:2."
        ) from None
    return pair


def bench(shapes: list[Shape], widths: list[str], device: torch.device, impl: str = "auto", peers=(), progress=None):
    """Measure; returns {"copy_bandwidth", "rows", "exact"}: ``exact`` has the attention over plain numbers, by shape.

    peers      functions (shape, device) -> (name, calls on copies of the data, or why it cannot run).
    progress   called with a text before every part.

    Raises KernelError if ``impl`` cannot run here.
    """
    say = progress or (lambda text: None)
    rows, exact, copies = [], [], []
    for shape in shapes:
        say(f"{shape}: checks")
        made = [_side(shape, width, device, impl) for width in widths]
        sides = {row.width: calls for row, calls in made if calls}
        known, notes = _exact_sides(shape, device, peers)
        say(f"{shape}: timing")
        times = timing.time_in_turns(sides | known | {COPY: [timing.copy_call(device)]}, device)
        # The copy takes turns with the others: its pace is theirs.
        bandwidths = [timing.copied_bytes(device) / seconds for seconds in times[COPY]]
        best = [min(own) for own in zip(*(times[name] for name in known if _reads_plain(name)))]
        rows += [_timed(row, times.get(row.width), best, bandwidths) for row, _ in made]
        exact.append(_exact_report(shape, {name: times[name] for name in known}, notes, bandwidths))
        copies += bandwidths
        del made, sides, known
    return {"copy_bandwidth": statistics.median(copies), "rows": [asdict(row) for row in rows], "exact": exact}


def _timed(row: Row, times: list[float] | None, best: list[float], bandwidths: list[float]) -> Row:
    if times is None:
        return row
    return replace(
        row,
        seconds=statistics.median(times),
        spread=(min(times), max(times)),
        floor=row.bytes / statistics.median(bandwidths),
        fraction=_fraction(row.bytes, times, bandwidths),
        vs_best_exact=statistics.median(b / t for b, t in zip(best, times)),
    )


def _fraction(size: int, times: list[float], bandwidths: list[float]) -> float:
    """Share of the copy bandwidth, turn by turn."""
    return statistics.median(size / bandwidth / seconds for seconds, bandwidth in zip(times, bandwidths))


def _reads_plain(name: str) -> bool:
    """Names of exact attention begin with the dtype that it reads; other peers read quantized numbers."""
    return name.startswith(("float", "bfloat"))


def _exact_report(shape: Shape, times: dict[str, list[float]], notes: dict[str, str], bandwidths: list[float]) -> dict:
    return {
        "shape": str(shape),
        "seconds": {name: statistics.median(own) for name, own in times.items()},
        "fraction": {
            name: _fraction(exact_bytes(shape, 4 if name.startswith("float32") else 2), own, bandwidths)
            for name, own in times.items()
            if _reads_plain(name)
        },
        "not_run": notes,
    }


def _side(shape: Shape, width: str, device: torch.device, impl: str) -> tuple[Row, list[Callable] | None]:
    """A width's row, and its calls on copies of the data if the check passes."""
    layout = layout_of(*sides_of(width), head_dim=shape.head_dim)
    ran = choose(impl, device, why_no_layout(layout), _why_no_cpp(layout) or build.unavailable())
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    error = _check(shape, layout, device, ran, dtype)
    splits, made = 1, None
    if error <= TOLERANCE[dtype]:
        count = timing.copies_of(step_bytes(shape, layout, dtype.itemsize), device)
        calls = [_call(shape, layout, device, ran, dtype, seed) for seed in range(count)]
        splits, made = calls[0][1], [call for call, _ in calls]
    size = step_bytes(shape, layout, dtype.itemsize, splits)
    note = None if made else f"not timed: error {error:.1e} is above {TOLERANCE[dtype]:.0e}"
    return Row(shape=str(shape), width=width, ran=str(ran), error=error, bytes=size, note=note), made


def _why_no_cpp(layout: PageLayout) -> str | None:
    """Why the C++ kernel does not read a width, or None."""
    sides = sides_of_pages(random_pages(layout, [layout.page_tokens], 1, device="cpu"))
    return next((side for side in sides.values() if not isinstance(side, CppSide)), None)


def _check(shape: Shape, layout: PageLayout, device: torch.device, ran: Choice, dtype: torch.dtype) -> float:
    """Relative error of two sequences, one of them short, against fp64."""
    unit = layout.page_tokens if "channel" in (layout.key.axis, layout.value.axis) else 1
    longest = max(unit, min(shape.context, CHECKED_TOKENS) // unit * unit)
    lengths = [longest, max(unit, longest // 2 // unit * unit)]
    heads = min(shape.kv_heads, 2)
    pages = random_pages(layout, lengths, heads, device=device, spread=0.5)
    small = replace(shape, batch=len(lengths), kv_heads=heads)
    query = _query(small, dtype, device, 1)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    found = _runner(small, pages, counts, ran, query)[0]().double()
    want, _ = dense_attention(query, pages, counts, None, torch.float64)
    return float((found - want).norm() / want.norm())


def _query(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Query:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, generator=generator).to(dtype).to(device)
    return Query(q=q, scale=shape.head_dim**-0.5)


def _call(shape: Shape, layout: PageLayout, device, ran: Choice, dtype, seed: int) -> tuple[Callable, int]:
    """One step on memory of its own, and its splits."""
    pages = full_pages(shape, layout, device, seed)
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    return _runner(shape, pages, lengths, ran, _query(shape, dtype, device, seed))


def _runner(shape: Shape, pages: Pages, lengths: torch.Tensor, ran: Choice, query: Query) -> tuple[Callable, int]:
    if ran.impl == "cpp":
        return _cpp_runner(shape, pages, lengths, query)
    plan = DecodePlan(
        pages.layout,
        batch=shape.batch,
        heads=shape.kv_heads,
        group=shape.group,
        device=lengths.device,
        impl=ran.impl,
    )
    plan.update(lengths)
    out = torch.empty_like(query.q)
    # A layer's share of a step: the plan serves all layers, so its update is not part of it.
    splits = 1 if ran.impl == "reference" else int(plan.spans[:, 1].max())
    return lambda: decode_attention(query, pages, lengths, plan, out=out, impl=ran.impl).out, splits


def _cpp_runner(shape: Shape, pages: Pages, lengths: torch.Tensor, query: Query) -> tuple[Callable, int]:
    q = (query.q.float() * query.scale).view(shape.batch, shape.kv_heads, shape.group, 1, shape.head_dim)
    # Everything is packed: the query comes after the last token.
    counts = torch.zeros(shape.batch, 7, dtype=torch.int32)
    counts[:, :3] = counts[:, 4:5] = lengths.unsqueeze(1)
    empty = torch.empty(shape.batch, shape.kv_heads, 1, shape.head_dim)
    sides = {name: side for name, side in sides_of_pages(pages).items() if isinstance(side, CppSide)}
    return lambda: launch.decode_attention(q, pages, sides, counts, (empty, empty))[0].view_as(query.q), 1


def full_pages(shape: Shape, layout: PageLayout, device: torch.device, seed: int) -> Pages:
    """Pages of a batch that hold numbers everywhere, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    count = -(-shape.context // layout.page_tokens)
    size = (shape.batch * count, shape.kv_heads, layout.record_bytes)
    pool = torch.randint(0, 256, size, generator=generator, device=device, dtype=torch.uint8)
    table = torch.randperm(shape.batch * count, generator=generator, device=device).int().view(shape.batch, count)
    numbers = {f"{side}_levels": levels_of(layout.side(side)) for side in ("key", "value")}
    pages = Pages.of(layout, pool, table, **numbers)
    pages.pool.value_limit.fill_(0.25)
    for side in ("key", "value"):
        own = layout.side(side)
        if own.format == "e4m3":
            # Bit 6 cleared: no number is NaN, and none is large.
            pages.pool.all(layout.places[side, "words"]).bitwise_and_(0xBF)
        if own.format == "dense":
            pages.pool.all(layout.places[side, "words"]).normal_(generator=generator)
        for section in own.sections:
            target = pages.pool.all(layout.places[side, section.name])
            if target.dtype == torch.float16:
                target.uniform_(0.05, 0.2, generator=generator)
            else:
                target.fill_(124 if own.meta_format == "e8m0" else 40)
    return pages


def _exact_sides(shape: Shape, device: torch.device, peers) -> tuple[dict[str, list[Callable]], dict[str, str]]:
    """Attention over plain numbers: torch's own, the kernel of the same structure, and what ``peers`` bring."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)
    found: dict[str, list[Callable]] = {}
    notes: dict[str, str] = {}
    for dtype in dtypes:
        copies = range(timing.copies_of(exact_bytes(shape, dtype.itemsize), device))
        name = str(dtype).removeprefix("torch.")
        found[f"{name} torch SDPA"] = [_sdpa(shape, dtype, device, seed) for seed in copies]
    if device.type == "cuda" and why_no_triton(device) is None:
        layout = layout_of("dense", "dense", head_dim=shape.head_dim)
        ran = choose("triton", device, why_no_layout(layout))
        copies = range(timing.copies_of(exact_bytes(shape, 2), device))
        found["float16 kvq Triton"] = [_call(shape, layout, device, ran, torch.bfloat16, seed)[0] for seed in copies]
    for peer in peers:
        try:
            name, calls = peer(shape, device)
        except Exception as error:
            # Foreign code of any version: what it says stands beside the table, and the others are measured.
            name, calls = peer.__name__, f"{type(error).__name__}: {error}"
        if isinstance(calls, str):
            notes[name] = calls
        else:
            found[name] = calls
    return found, notes


def _sdpa(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Callable:
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.kv_heads, shape.context, shape.head_dim)
    k, v = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    q = _query(shape, dtype, device, seed).q
    grouped = shape.group > 1
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def failed(report: dict) -> list[str]:
    """Widths that did not pass their check, as sentences."""
    return [f"{row['shape']} {row['width']}: {row['note']}" for row in report["rows"] if row["seconds"] is None]


def refuse_too_large(shapes: list[Shape], widths: list[str], device: torch.device) -> None:
    """Raise KernelError for shapes whose data does not fit into memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    for shape in shapes:
        needed = exact_bytes(shape, 2) * (1 + (device.type == "cuda"))
        needed += exact_bytes(shape, 4) if device.type == "cpu" else 0
        for width in widths:
            layout = layout_of(*sides_of(width), head_dim=shape.head_dim)
            needed += max(step_bytes(shape, layout, 2), timing.ROTATED_BYTES[device.type])
        if needed > free:
            raise KernelError(
                f"shape {shape} needs {needed / 2**30:.1f} GiB for its {len(widths)} widths and their peers, and "
                f"{free / 2**30:.1f} GiB are free: measure fewer widths at a time, or a smaller shape."
            )


def _free_memory() -> int:
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62
