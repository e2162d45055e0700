"""Codes that name the levels of a static codebook, times a scale: NF4, Lloyd-Max, KVQuant's non-uniform codes.

    code = index of the level nearest to (x - offset) / scale,    x' = level[code] * scale + offset

where scale and offset are, by ``scale``:

    unit        1 and 0 (for numbers that a norm has brought to variance 1)
    absmax      max|x| of the group and 0
    range       half the range of the group and its middle (KVQuant values, arXiv 2401.18079)
    moments     standard deviation and mean of the group
    calibrated  static numbers per channel (KVQuant keys); what lies outside saturates

Dynamic ones are rounded to fp16 before encoding. Edges between levels are their midpoints unless given (Q-Norm decodes
to other levels than it encodes by). A constant group has scale 0 and decodes to its (fp16) offset.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kvq.codecs.affine import check_bits
from kvq.codecs.base import Codec, StaticNumbers
from kvq.codecs.grouped import GroupedSpec
from kvq.codecs.kmeans import levels_of, q_norm
from kvq.codecs.levels import NAMED_LEVELS, make_levels, midpoints
from kvq.codecs.spec import Artefact, Measured, not_positive, register_codec
from kvq.errors import RecipeError
from kvq.kernels.decode_attention.products import page_scores, page_weighted_sum
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.grouping import Grouping
from kvq.pages.layout import SideLayout
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import Slice, View
from kvq.settings import check_choice, check_flag

META_DTYPE = torch.float16
BITS = (2, 3, 4)
SCALES = ("unit", "absmax", "range", "moments", "calibrated")
# Those that are taken over groups of what is stored.
GROUPED_SCALES = ("absmax", "range", "moments")
# Share of unweighted counts in a codebook's weights, so that it is defined where gradients are all zero.
_PLAIN_SHARE = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class BookCodec(Codec):
    """bits in {2, 3, 4}; levels, edges: float64 [2^bits] and [2^bits - 1], ascending.

    scale      as above; grouping: of its dynamic kinds.
    static     scale=calibrated: (scale, offset) [K, head_dim, 2], float64.
    """

    bits: int
    head_dim: int
    levels: torch.Tensor
    edges: torch.Tensor
    scale: str
    grouping: Grouping
    static: torch.Tensor | None = None

    @property
    def names_heads(self) -> bool:
        return self.static is not None

    @property
    def block_tokens(self) -> int:
        return self.grouping.group if self.grouping.axis == "channel" else 1

    @property
    def meta_terms(self) -> int:
        return {"unit": 0, "calibrated": 0, "absmax": 1}.get(self.scale, 2)

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(
            format="book",
            bits=self.bits,
            head_dim=self.head_dim,
            page_tokens=page_tokens,
            axis=self.grouping.axis,
            group=self.grouping.group,
            meta_terms=self.meta_terms,
            meta_shared=self.grouping.shared,
            evenly=self._evenly,
        )

    @cached_property
    def _evenly(self) -> bool:
        """Whether levels are evenly spaced about zero, to a few roundings of float64, and kernels can use that."""
        if self.meta_terms == 2 or (self.meta_terms == 1 and self.grouping.axis == "channel"):
            return False
        even = torch.linspace(-1, 1, len(self.levels), dtype=torch.float64)
        return bool(torch.allclose(self.levels.double().cpu(), even * self.levels[-1].double().cpu(), 1e-14, 1e-14))

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim]; ``meta`` has (scale, offset), or (scale,) for absmax, in its last dimension.

        Raises DataError if x holds NaN, infinity or numbers beyond fp16 (checked where it costs no device sync).
        """
        x = wide(x)
        if self.meta_terms == 0:
            refuse_unstorable("float16", x)
            return Encoded(codes=self._codes(self.normalised(x)), sections={})
        sections = self._measured(x)
        return Encoded(codes=self._codes(self._normalised(x, sections)), sections=sections)

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """What is compared with the levels, for x [..., K, T, head_dim]; the same shape."""
        if self.static is not None:
            scale, offset = self._statics(x)
            return (x - offset) / scale
        return x if self.meta_terms == 0 else self._normalised(x, self._measured(x))

    def scales(self, x: torch.Tensor) -> torch.Tensor:
        """What ``normalised`` divides by, for every number of x."""
        if self.static is not None:
            return self._statics(x)[0].expand_as(x)
        if self.meta_terms == 0:
            return torch.ones_like(x)
        scale, _ = self.pair(self._measured(x), x.dtype)
        return self.grouping.join(self.grouping.spread(scale).expand_as(self.grouping.split(x)))

    def _normalised(self, x: torch.Tensor, sections: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale, offset = (self.grouping.spread(part) for part in self.pair(sections, x.dtype))
        return self.grouping.join((self.grouping.split(x) - offset) / scale.masked_fill(scale == 0, torch.inf))

    def _measured(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The metadata of x as it is stored."""
        numbers = self._numbers(self.grouping.split(x))
        refuse_unstorable("float16", *numbers)
        return {"meta": torch.stack([number.to(META_DTYPE) for number in numbers], dim=-1)}

    def _numbers(self, grouped: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dim = self.grouping.dim
        if self.scale == "absmax":
            return (grouped.abs().amax(dim),)
        if self.scale == "moments":
            return torch.std(grouped, dim, correction=0), grouped.mean(dim)
        low, high = torch.aminmax(grouped, dim=dim)
        return (high - low) / 2, (high + low) / 2

    def _codes(self, numbers: torch.Tensor) -> torch.Tensor:
        edges = self.edges.to(numbers)
        return torch.bucketize(numbers.contiguous(), edges, out_int32=True).to(torch.uint8)

    def _statics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Static scale and offset, each [K, 1, head_dim]."""
        return self.static.to(like).unsqueeze(-3).unbind(-1)

    def pair(self, sections: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and offset of every group as numbers, each of the shape of ``meta`` without its last dimension."""
        meta = sections["meta"].to(dtype)
        if self.meta_terms == 1:
            return meta[..., 0], torch.zeros_like(meta[..., 0])
        return meta.unbind(-1)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that codes and meta stand for, [..., K, T, head_dim]."""
        numbers = self.levels.to(encoded.codes.device, dtype)[encoded.codes.to(torch.int32)]
        if self.static is not None:
            scale, offset = self._statics(numbers)
            return torch.addcmul(offset, numbers, scale)
        if self.meta_terms == 0:
            return numbers
        scale, offset = (self.grouping.spread(part) for part in self.pair(encoded.sections, dtype))
        return self.grouping.join(torch.addcmul(offset, self.grouping.split(numbers), scale))

    def static_numbers(self) -> StaticNumbers | str:
        if self.static is not None:
            return "static scales of channels"
        return StaticNumbers(levels=tuple(self.levels.double().tolist()))

    def view(self, page_tokens: int) -> View | str:
        statics = () if self.static is None else self.static.transpose(-1, -2).tolist()
        # Moments are sums, whose order torch does not say, and groups of tokens are nobody's.
        by_token = self.grouping.axis == "token" and self.scale != "moments"
        return View(
            slices=(Slice(layout=self.layout(page_tokens)),),
            encoding=self.scale if by_token else "",
            statics=tuple(tuple(map(tuple, head)) for head in statics),
            levels=tuple(self.levels.tolist()),
            edges=tuple(self.edges.tolist()),
        )

    def compared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.normalised(x), self.scales(x)

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        levels = self.levels.to(q.device)
        pairs = self._page_pairs(pages, side, q.dtype)
        if self.static is None:
            return page_scores(q, pages, side, pairs, levels=levels)
        scale, offset = self._statics(q)
        constant = (q * offset).sum(-1, keepdim=True)
        return page_scores(q * scale, pages, side, None, levels=levels) + constant

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        levels = self.levels.to(p.device)
        out = page_weighted_sum(p, pages, side, self._page_pairs(pages, side, p.dtype), levels=levels)
        if self.static is None:
            return out
        scale, offset = self._statics(p)
        return torch.addcmul(p.sum(-1, keepdim=True) * offset, out, scale)

    def _page_pairs(self, pages: Pages, side: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Metadata of pages as plain pairs, [B, K, P, rows, groups or channels, 2]; None for none."""
        if self.meta_terms == 0:
            return None
        pairs = torch.stack(self.pair({"meta": pages.section(side, "meta")}, dtype), dim=-1)
        if self.grouping.shared:
            pairs = pairs.unsqueeze(1).expand(-1, pages.heads, *pairs.shape[1:])
        return pairs


@register_codec("book")
@dataclass(frozen=True, kw_only=True)
class Book(GroupedSpec):
    """Codes that name the levels of a static codebook, times a scale.

    bits          2, 3 or 4.
    levels        ``lloyd_max`` and ``even`` (for the normal distribution), ``normal_float`` (QLoRA), ``uniform``, or
                  ``calibrated`` (k-means over statistics).
    scale         ``unit``; ``absmax``, ``range`` (middle and half range) or ``moments`` (mean and deviation) of every
                  group; or ``calibrated`` (a static range per channel).
    axis, group   what shares a scale (``GroupedSpec``), for scales that are taken over groups.
    weights       with calibrated levels: ``fisher`` weights the k-means by squared gradients (KVQuant).
    q_norm        with calibrated levels: decoded numbers keep the mean and deviation of calibration (KVQuant).
    """

    bits: int
    levels: str
    scale: str
    axis: str | None = None
    group: int | str | None = None
    weights: str | None = None
    q_norm: bool | None = None

    def check(self) -> None:
        check_choice("scale", self.scale, SCALES, "a book scale")
        check_bits(self.bits, BITS)
        if self.levels == "uniform" and self.scale in ("unit", "moments"):
            raise RecipeError(
                f"levels=uniform go from -1 to 1, and scale={self.scale} has no such range: use absmax or range."
            )
        check_choice("levels", self.levels, (*NAMED_LEVELS, "calibrated"))
        if self.scale in GROUPED_SCALES:
            for name in ("axis", "group"):
                if getattr(self, name) is None:
                    raise RecipeError(f"scale={self.scale} is taken over groups and needs {name!r}: add it.")
            self.check_group()
        elif self.axis is not None or self.group is not None:
            raise RecipeError(f"scale={self.scale} is static and has no groups: remove axis and group.")
        if not self.learns_levels and (self.weights is not None or self.q_norm is not None):
            raise RecipeError(f"weights and q_norm belong to calibrated levels, not to {self.levels}: remove them.")
        check_choice("weights", self.weights, ("fisher",))
        check_flag("q_norm", self.q_norm)
        if self.learns_levels and self.scale in ("unit", "absmax", "moments"):
            raise RecipeError(
                f"levels=calibrated are learned between the ends of a range: use scale=range or calibrated, not "
                f"{self.scale}."
            )

    @property
    def has_static_ranges(self) -> bool:
        return self.scale == "calibrated"

    @property
    def learns_levels(self) -> bool:
        return self.levels == "calibrated"

    @property
    def weighs_by_gradients(self) -> bool:
        return self.weights == "fisher"

    def before_learning(self) -> "Book":
        return replace(self, levels="uniform", weights=None, q_norm=None)

    def compared_settings(self) -> dict[str, Any]:
        return {k: v for k, v in super().compared_settings().items() if k not in ("bits", "weights", "q_norm")}

    @property
    def why_no_channel_groups(self) -> str | None:
        if self.axis is None:
            return f"permute changes which channels share a group, and scale={self.scale} has none: remove it."
        return super().why_no_channel_groups

    def own_artefacts(self, head_dim: int, heads: int) -> dict[str, Artefact]:
        """range: [K, head_dim, 2] float64, half range and middle of channels; with outliers, of all but their share.
        levels: [2^bits] float64, ascending; edges: [2^bits - 1] float64, where one code ends and the next begins.
        """
        found = {}
        if self.has_static_ranges:
            found["range"] = Artefact(
                shape=(heads, head_dim, 2),
                stand_in=lambda shape: torch.tensor([4.0, 0.0], dtype=torch.float64).expand(shape).clone(),
                wrong=lambda tensor: not_positive(tensor[..., 0]),
                by_head=True,
            )
        if self.learns_levels:
            found["levels"] = Artefact(shape=(2**self.bits,), stand_in=_even_levels, wrong=_not_ascending)
            found["edges"] = Artefact(
                shape=(2**self.bits - 1,),
                stand_in=lambda shape: midpoints(_even_levels((shape[0] + 1,))),
                wrong=_not_ascending,
            )
        return found

    def own_needs(self, tensor: str):
        if self.has_static_ranges or self.learns_levels:
            yield f"{tensor}.range"
        if self.has_static_ranges and self.outside_share:
            yield f"{tensor}.histogram"

    def own_fit(self, measured: Measured) -> dict[str, torch.Tensor]:
        found = {"range": channel_ranges(measured, self.outside_share)} if self.has_static_ranges else {}
        return found | (self._learned(measured) if self.learns_levels else {})

    def _learned(self, measured: Measured) -> dict[str, torch.Tensor]:
        numbers, counts, weights = measured.compared()
        counts = counts / counts.sum()
        if self.weighs_by_gradients:
            weights = weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny) + _PLAIN_SHARE * counts
        else:
            weights = counts
        levels = levels_of(numbers, weights, 2**self.bits)
        edges = midpoints(levels)
        return {"levels": q_norm(levels, numbers, counts) if self.q_norm else levels, "edges": edges}

    def bind(self, head_dim, artefacts, heads) -> BookCodec:
        if self.learns_levels:
            levels, edges = artefacts["levels"].double(), artefacts["edges"].double()
        else:
            levels = make_levels(self.levels, self.bits, unit_range=self.scale not in ("unit", "moments"))
            edges = midpoints(levels)
        return BookCodec(
            bits=self.bits,
            head_dim=head_dim,
            levels=levels,
            edges=edges,
            scale=self.scale,
            grouping=Grouping(
                axis=self.axis or "token",
                group=head_dim if self.axis is None else self.group_size(head_dim),
                head_dim=head_dim,
                shared=self.group == "token",
            ),
            static=artefacts["range"].double() if self.has_static_ranges else None,
        )


def channel_ranges(measured: Measured, share: float) -> torch.Tensor:
    """(half range, middle) of every channel, float64 [K, head_dim, 2] (KVQuant, section 3.1).

    share   of a channel's numbers that lie outside, half of them at each end; 0: the range of all numbers.
    """
    low, high = (measured.quantile(q) for q in (share / 2, 1 - share / 2)) if share else measured.ends()
    # A channel that never changes would have no range to divide by.
    half = ((high - low) / 2).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack([half, (high + low) / 2], dim=-1)


def _even_levels(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.linspace(-1, 1, *shape, dtype=torch.float64)


def _not_ascending(tensor: torch.Tensor) -> str | None:
    return None if bool((tensor.diff() >= 0).all()) else "numbers that do not ascend"
