"""Sides of a page as the C++ kernels take them: ``kvq::Side`` and ``kvq::Slice`` of pages.h, from a codec's view."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvq.pages.layout import ATOM, SECTION_BYTES, SIDES, PageLayout, Place
from kvq.pages.pages import Pages
from kvq.pages.view import Slice, View, Viewed

# ``kMostHeadDim`` and ``kMostLevels`` of pages.h.
LARGEST_HEAD = 1024
MOST_LEVELS = 16
_AXES = ("none", "token", "channel", "static")
_META = ("float16", "e4m3", "e8m0", "zero8", "range8")
_ENCODINGS = ("", "minmax", "symmetric", "unit", "absmax", "range", "e2m1", "cast", "calibrated")
_CORRECT = (None, "length", "least_squares")


@dataclass(frozen=True, kw_only=True, eq=False)
class CppSide:
    """numbers: int64, reals: float64, as ``kvq::Side`` reads them; packs: whether the kernel also writes it."""

    numbers: torch.Tensor
    reals: torch.Tensor
    packs: bool


def sides_of(codecs: Mapping[str, Viewed], layout: PageLayout) -> dict[str, CppSide | str]:
    """Both sides of pages, or why the kernels cannot read them."""
    return {name: _side(codecs[name].view(layout.page_tokens), layout, name) for name in SIDES}


def sides_of_pages(pages: Pages) -> dict[str, CppSide | str]:
    """The same where pages say with their layout and static numbers all that codes mean; to read alone."""
    found = {}
    for name in SIDES:
        side = pages.layout.side(name)
        scale, levels = (
            (pages.key_scale, pages.key_levels) if name == "key" else (pages.value_scale, pages.value_levels)
        )
        lacks = side.permuted or side.extras or side.format not in ("affine", "book", "e4m3")
        view = View(slices=(Slice(layout=side),), encoding="", scale=scale, levels=levels or ())
        found[name] = _side("more than codes and scales" if lacks else view, pages.layout, name)
    return found


def _side(view: View | str, layout: PageLayout, name: str) -> CppSide | str:
    reason = view if isinstance(view, str) else _why_not(view, layout, name)
    if isinstance(view, str) or reason is not None:
        return f"{name}s have what the C++ kernels do not read: {reason}"
    places = {part: place for (side, part), place in layout.places.items() if side == name}
    norm = places["norm"] if view.norm else None
    header = (
        len(view.slices),
        layout.side(name).head_dim,
        layout.page_tokens,
        -1 if norm is None else norm.start,
        int(view.norm == "token"),
        _CORRECT.index(view.correct),
        _ENCODINGS.index(view.encoding),
        len(view.levels),
        *_terms(view, places),
    )
    numbers = [*header, *(number for part in view.slices for number in _slice_numbers(part, view, places))]
    levels = [*view.levels, *[0.0] * (MOST_LEVELS - len(view.levels))]
    edges = [*view.edges, *[0.0] * (MOST_LEVELS - 1 - len(view.edges))]
    statics = [number for head in view.statics for numbers in head for number in numbers]
    reals = [view.scale, *levels, *edges, *(part.clip for part in view.slices), *statics]
    return CppSide(
        numbers=torch.tensor(numbers, dtype=torch.int64),
        reals=torch.tensor(reals, dtype=torch.float64),
        packs=bool(view.encoding),
    )


def _terms(view: View, places: Mapping[str, Place]) -> tuple[int, ...]:
    """Of factors and outliers: how many, of what blocks, where, and their bytes."""
    rank, block, token_at, block_at, size = 0, 1, 0, 0, 0
    if view.low_rank is not None:
        rank, block = view.low_rank
        token, own = places["low_rank_token"], places["low_rank_block"]
        token_at, block_at, size = token.start, own.start, SECTION_BYTES[own.dtype]
    outliers = (0, 0, 0, 0, 0)
    if view.outliers is not None:
        index, value = places["outlier_index"], places["outlier_value"]
        outliers = (*view.outliers, index.start, value.start, SECTION_BYTES[index.dtype])
    return rank, block, token_at, block_at, size, *outliers


def _slice_numbers(part: Slice, view: View, places: Mapping[str, Place]) -> tuple[int, ...]:
    """``kvq::Slice``."""
    layout, e4m3 = part.layout, part.layout.format == "e4m3"
    meta, ends = places.get(f"{part.prefix}meta"), places.get(f"{part.prefix}meta_range")
    axis = layout.axis if layout.meta is not None else "static" if view.statics else "none"
    group = {"none": layout.head_dim, "static": layout.page_tokens}.get(axis, layout.group)
    return (
        places[f"{part.prefix}words"].start,
        meta.start if meta else 0,
        ends.start if ends else 0,
        0 if e4m3 else layout.bits,
        _AXES.index(axis),
        group,
        layout.rows,
        layout.chunks,
        layout.width,
        layout.head_dim,
        part.first,
        layout.page_tokens,
        layout.meta_terms if meta else 0,
        _META.index(layout.meta_format),
        int(meta is not None and meta.shared),
    )


def _why_not(view: View, layout: PageLayout, name: str) -> str | None:
    """What stands against reading a view, or None."""
    if layout.side(name).head_dim > LARGEST_HEAD:
        return f"head_dim {layout.side(name).head_dim}, more than {LARGEST_HEAD}"
    for part in view.slices:
        if part.layout.meta is not None and part.layout.axis == "token" and part.layout.group % ATOM:
            return f"groups of {part.layout.group} channels, not a multiple of {ATOM}"
    return None
