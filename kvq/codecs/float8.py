"""FP8 E4M3 with one static scale per tensor: stored = cast(x / scale), largest magnitude 448.

The scale is 1 (a plain cast) or comes from calibration, by method:

    max          the largest magnitude seen / 448: nothing that was seen is clipped.
    percentile   the magnitude that ``percentile`` of all numbers stay below / 448: rarer ones are clipped.
    mse          the scale of least squared error over the numbers seen, among eighths of octaves below ``max``.

FP8 keeps three digits of mantissa at any magnitude above 2^-6, so smaller scales gain little until numbers fall below
that, and clipping costs much: ``max`` is the default, and what serving engines' producers write.

Numbers beyond 448 * scale saturate, as hardware converts them. Hardware rounds to the nearest number, ties to even; a
conversion that cuts bits off rounds toward zero instead, with twice the error (vLLM's CPU kernels).
"""

import math
from dataclasses import dataclass

import torch

from kvq.codecs.base import Codec, StaticNumbers
from kvq.codecs.spec import Artefact, CodecSpec, Measured, not_positive, register_codec
from kvq.errors import DataError, RecipeError
from kvq.kernels.decode_attention.products import page_scores, page_weighted_sum
from kvq.pages.affine import wide
from kvq.pages.layout import E4M3_MAX, SideLayout
from kvq.pages.meta import from_e4m3, quotient, to_e4m3
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import Slice, View
from kvq.settings import check_choice, is_number

# Points in a bin of a histogram, which is as wide as a step of E4M3; octaves searched below the largest magnitude, and
# steps an octave.
_POINTS = 16
_OCTAVES, _STEPS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Float8Codec(Codec):
    """scale: the number that a stored 1.0 stands for, positive; head_dim: channels; rounding: ``nearest`` or
    ``toward_zero``."""

    head_dim: int
    scale: float = 1.0
    rounding: str = "nearest"

    bits = 8

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(format="e4m3", bits=8, head_dim=self.head_dim, page_tokens=page_tokens)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., T, head_dim]: bytes [..., T, head_dim] (uint8) and no sections."""
        x = wide(x)
        scaled = quotient(x, self.scale)
        codes = to_e4m3(scaled)
        if self.rounding == "toward_zero":
            # Codes of one sign are in the order of their magnitudes.
            over = from_e4m3(codes, x.dtype).abs() > scaled.abs()
            codes = codes - over.to(torch.uint8)
        if x.device.type == "cpu" and not bool(x.isfinite().all()):
            raise DataError(
                "keys or values hold NaN or infinity: these cannot be quantized; check the checkpoint, and run it in "
                "float32 or bfloat16."
            )
        return Encoded(codes=codes, sections={})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that the bytes stand for, [..., T, head_dim]."""
        return from_e4m3(encoded.codes, dtype) * self.scale

    def static_numbers(self) -> StaticNumbers:
        return StaticNumbers(scale=float(self.scale))

    def view(self, page_tokens: int) -> View:
        encoding = "cast" if self.rounding == "nearest" else ""
        return View(slices=(Slice(layout=self.layout(page_tokens)),), encoding=encoding, scale=float(self.scale))

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        return page_scores(q, pages, side, None, scale=self.scale)

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        return page_weighted_sum(p, pages, side, None, scale=self.scale)


@register_codec("float8")
@dataclass(frozen=True, kw_only=True)
class Float8(CodecSpec):
    """E4M3 with one static scale per tensor, or per head.

    scale         ``calibrated`` (from statistics, see ``method``) or ``unit`` (a plain cast).
    method        with scale calibrated: ``max`` (default), ``percentile`` or ``mse``.
    percentile    of magnitudes that are not clipped, above 50 to 100; for method percentile.
    granularity   with scale calibrated: one scale a ``tensor`` (default) or one a ``head``.
    """

    scale: str
    method: str | None = None
    percentile: float | None = None
    granularity: str | None = None

    fits_transformed = True

    def check(self) -> None:
        check_choice("scale", self.scale, ("calibrated", "unit"), "a float8 scale")
        check_choice("method", self.method, ("max", "percentile", "mse"))
        check_choice("granularity", self.granularity, ("tensor", "head"))
        for name in ("method", "granularity"):
            if getattr(self, name) is not None and self.scale != "calibrated":
                raise RecipeError(f"{name} says how a scale is calibrated, and scale={self.scale}: remove one of them.")
        if (self.method == "percentile") != (self.percentile is not None):
            raise RecipeError("method=percentile and percentile belong together, as in percentile: 99.99.")
        if self.percentile is not None and (not is_number(self.percentile) or not 50 < self.percentile <= 100):
            raise RecipeError(f"percentile={self.percentile!r} is no percentile: use a number above 50 to 100.")

    @property
    def has_head_scales(self) -> bool:
        return self.granularity == "head"

    def own_artefacts(self, head_dim: int, heads: int) -> dict[str, Artefact]:
        shape = (heads,) if self.has_head_scales else ()
        return static_scale(shape, by_head=self.has_head_scales) if self.scale == "calibrated" else {}

    def own_needs(self, tensor: str):
        if self.scale == "calibrated":
            yield f"{tensor}.range"
        if self.method in ("percentile", "mse"):
            yield f"{tensor}.histogram"

    def own_fit(self, measured: Measured) -> dict[str, torch.Tensor]:
        """``scale``, float64: [] for granularity tensor, [K] for head; 1.0 where all was zero."""
        if self.scale != "calibrated":
            return {}
        largest = measured.absmax().amax(-1)
        largest = largest if self.has_head_scales else largest.max().reshape(1)
        scales = largest / E4M3_MAX
        if self.method in ("percentile", "mse"):
            counts, edges = measured.counts(f"method={self.method}"), measured.edges()
            counts = counts if self.has_head_scales else counts.sum(0, keepdim=True)
            if self.method == "percentile":
                tops = [_percentile(own, edges, top, self.percentile) for own, top in zip(counts, largest)]
                scales = torch.stack(tops) / E4M3_MAX
            else:
                scales = torch.stack([_least_error(own, edges, scale) for own, scale in zip(counts, scales)])
        scales = torch.where(scales > 0, scales, 1.0)
        return {"scale": scales if self.has_head_scales else scales[0]}

    def bind(self, head_dim, artefacts, heads) -> Float8Codec:
        return Float8Codec(head_dim=head_dim, scale=float(artefacts["scale"]) if self.scale == "calibrated" else 1.0)

    @property
    def hint(self) -> str | None:
        return "scale=unit"

    @property
    def token_dtype_bits(self) -> int | None:
        return 8 if self.scale == "unit" and set(self.to_dict()) <= {"codec", "scale"} else None

    def engine_obstacle(self, side: str) -> str | None:
        if self.scale != "calibrated":
            return f"{side}.scale is {self.scale!r}, which engines use without any checkpoint"
        extra = {part.name for part in self.parts} | ({"placement"} if self.placement else set())
        return f"{side}s have {min(extra)!r}, which an FP8 cache does not have" if extra else None


def static_scale(shape: tuple[int, ...], by_head: bool = False) -> dict[str, Artefact]:
    """What a stored 1.0 stands for, one for all numbers or one for each head."""
    return {"scale": Artefact(shape=shape, wrong=not_positive, by_head=by_head)}


def _percentile(counts: torch.Tensor, edges: torch.Tensor, largest: torch.Tensor, percentile: float) -> torch.Tensor:
    """The magnitude that ``percentile`` of the counted numbers stay below, []; never above the largest seen."""
    # The histogram mirrors negative numbers: folding it gives one of magnitudes.
    middle = len(counts) // 2
    folded = counts[middle:].double()
    folded[1:] += counts[:middle].flip(0)
    below, wanted = folded.cumsum(0), percentile / 100 * float(folded.sum())
    index = int((below < max(wanted, 0.5)).sum().clamp(max=len(folded) - 1))
    low, high = edges[middle + index], edges[middle + index + 1]
    inside = (wanted - (below[index] - folded[index])) / folded[index]
    return torch.minimum((low + (high - low) * inside.clamp(0, 1)).float().double(), largest)


def _least_error(counts: torch.Tensor, edges: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The scale in [start / 2^4, start] of least squared error, numbers spread evenly inside their bins."""
    used = counts > 0
    if not bool(used.any()) or not float(start):
        return start
    low, high = edges[:-1][used], edges[1:][used]
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    points = (low.unsqueeze(1) + (high - low).unsqueeze(1) * inside).clamp(-start * E4M3_MAX, start * E4M3_MAX)
    weights = counts[used].double().unsqueeze(1)
    candidates = [float(start) * 2.0 ** (-step / _STEPS) for step in range(_OCTAVES * _STEPS + 1)]
    errors = [_squared_error(points, weights, scale) for scale in candidates]
    return torch.tensor(candidates[min(range(len(errors)), key=errors.__getitem__)], dtype=torch.float64)


def _squared_error(points: torch.Tensor, weights: torch.Tensor, scale: float) -> float:
    codec = Float8Codec(head_dim=points.shape[-1], scale=scale)
    error = float(((codec.decode(codec.encode(points), torch.float64) - points).square() * weights).sum())
    return error if math.isfinite(error) else math.inf
