"""What a recipe says of one codec: a base that turns numbers into codes, and the parts that may wrap it.

A spec only says what is wanted. What a codec does lives in ``kvq/codecs``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvq.errors import RecipeError, suggest
from kvq.fields import build, check_choice, check_fields, check_flag, given, is_count, is_number

AFFINE_BITS = (2, 3, 4, 8)
BOOK_BITS = (2, 3, 4)
# Tokens that a block may have: a page of 64 tokens holds whole blocks, or a block is a whole page.
BLOCK_TOKENS = (16, 32, 64, 128, 256)
LEVELS = ("lloyd_max", "normal_float", "uniform", "calibrated")
SCALES = {
    "float8": ("calibrated", "unit"),
    "float4": ("calibrated", "unit"),
    "book": ("unit", "absmax", "range", "moments", "calibrated"),
}
GROUPED_SCALES = ("absmax", "range", "moments")
TIER_BITS = (0, *AFFINE_BITS)
METADATA = {
    "affine": ("float16", "e4m3", "zero8", "range8"),
    "tiers": ("float16", "e4m3", "zero8", "range8"),
    "float4": ("e8m0", "e4m3"),
}
WRAPPERS = ("permute", "norm", "signs", "low_rank", "outliers")
# Settings by codec: those that must be given, and those that may be.
_CODEC_FIELDS = {
    "exact": ((), ()),
    "affine": (("bits", "axis", "group"), ("clip", "symmetric", "meta", "placement", *WRAPPERS)),
    "tiers": (("bits", "group"), ("clip", "meta", "placement")),
    "book": (("bits", "levels", "scale"), ("axis", "group", "weights", "q_norm", "placement", *WRAPPERS)),
    "float8": (("scale",), ("method", "percentile", "granularity", "placement", *WRAPPERS)),
    "float4": (("group", "meta"), ("scale", "placement", *WRAPPERS)),
    "sketch": (("bits",), ("seed", "outlier_channels", "outlier_bits", "group")),
}


@dataclass(frozen=True, kw_only=True)
class PermuteSpec:
    """Channels change places, so that those of like range share a group (SKVQ, arXiv 2405.06219).

    by   ``range``: balanced k-means over the channels' (minimum, maximum) in calibration.
    """

    by: str

    def __post_init__(self):
        check_choice("permute.by", self.by, ("range",))


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """Every token is divided by its length before the codec, and multiplied after it.

    over      ``head``: the length of the head's vector (TurboQuant, arXiv 2504.19874); ``token``: of all heads of the
              layer that are stored alike together, stored once (OScaR, arXiv 2605.19660).
    correct   which number is stored. Left out: the length itself. ``length``: what gives the decoded vector the length
              of the exact one. ``least_squares``: what brings it nearest to the exact one.
    """

    over: str
    correct: str | None = None

    def __post_init__(self):
        check_choice("norm.over", self.over, ("head", "token"))
        check_choice("norm.correct", self.correct, ("length", "least_squares"))


@dataclass(frozen=True, kw_only=True)
class SignSpec:
    """One more bit a channel: the signs of a random projection of what the codec left over (TurboQuant's QJL term).

    seed   of the projection.
    """

    seed: int = 0

    def __post_init__(self):
        _check_seed("signs.seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class LowRankSpec:
    """A low-rank approximation of what the codec left over, one per head and block of tokens (GEAR, arXiv 2403.05527).

    rank     columns of the factors.
    block    tokens of a block, which is quantized as a whole.
    format   of the factors: ``float16`` or ``e4m3``.
    """

    rank: int
    block: int
    format: str = "float16"

    def __post_init__(self):
        if not is_count(self.rank):
            raise RecipeError(f"low_rank.rank={self.rank!r} is not a rank: use a whole number of 1 or more.")
        check_choice("low_rank.block", self.block, BLOCK_TOKENS)
        check_choice("low_rank.format", self.format, ("float16", "e4m3"))


@dataclass(frozen=True, kw_only=True)
class OutlierSpec:
    """The most extreme numbers of every vector are stored exactly beside the codes, a fixed count of them.

    share   of a vector's numbers, half of them at each end (at least one at each).
    along   what a vector is: ``token`` (one token, all heads of the layer that are stored alike) or ``channel`` (one
            channel of one block of tokens).
    """

    share: float
    along: str

    def __post_init__(self):
        if not is_number(self.share) or not 0 < self.share <= 1:
            raise RecipeError(f"outliers.share={self.share!r} is not a share: use a number above 0 and at most 1.")
        check_choice("outliers.along", self.along, ("token", "channel"))


_PARTS = {"permute": PermuteSpec, "norm": NormSpec, "signs": SignSpec, "low_rank": LowRankSpec, "outliers": OutlierSpec}


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """How one tensor (keys or values) is stored.

    codec   ``exact``    kept in the model's dtype
            ``affine``   integer codes with a scale and a minimum
            ``book``     codes that name the levels of a static codebook, times a scale
            ``tiers``    affine codes along the channel axis, with bits of their own for equal parts of the channels
            ``float8``   E4M3 with one static scale per tensor, or per head
            ``float4``   E2M1 in blocks with a block scale (MXFP4, NVFP4)
            ``sketch``   signs of random projections, keys only (QJL)

    bits    affine: 2, 3, 4, 8. book: 2, 3, 4. sketch: projections per channel, 2, 3, 4, 8. tiers: a list, one number
            for each equal part of the channels, 0 for a part that is not stored.
    axis    ``token`` shares a scale among ``group`` channels of one token; ``channel`` shares it among ``group``
            consecutive tokens of one channel (KIVI keys).
    group   numbers that share a scale; ``head`` for the whole head dimension and ``token`` for all heads that are
            stored alike (axis token only). float4: channels of a block. sketch: tokens that share outlier channels.
    clip    affine: share of a group's range that the codes span, above 0 to 1; what lies outside saturates. tiers:
            likewise, one number for each tier, or one for all.
    symmetric   affine: codes are centred on zero, and there is no minimum (ZeroQuant, arXiv 2206.01861).
    meta    how scale and minimum are stored; see ``kvq/codecs/meta.py``. affine: ``float16`` (default), ``e4m3``,
            ``zero8``, ``range8``. float4: ``e8m0``, ``e4m3``.
    levels  book: ``lloyd_max`` (for the normal distribution), ``normal_float`` (QLoRA), ``uniform``, or ``calibrated``
            (k-means over statistics).
    weights book with calibrated levels: ``fisher`` weights the k-means by squared gradients (KVQuant).
    q_norm  book with calibrated levels: decoded numbers keep the mean and deviation of calibration (KVQuant).
    scale   float8: ``calibrated`` (from statistics, see method) or ``unit`` (a plain cast). float4 with
            meta e4m3: the global scale, likewise. book: ``unit``; ``absmax``, ``range`` (middle and half range) or
            ``moments`` (mean and deviation) of every group; or ``calibrated`` (a static range per channel).
    method  float8 with scale calibrated: ``max`` (default), ``percentile`` or ``mse``; see ``kvq/calib/scales.py``.
    percentile   of magnitudes that are not clipped, above 50 to 100; for method percentile.
    granularity  float8 with scale calibrated: one scale a ``tensor`` (default) or one a ``head``.
    seed    sketch: of the projections.
    outlier_channels, outlier_bits   sketch: channels of a group of tokens that have a sketch of their own, and its
            projections per channel of the head.
    placement   keys only: ``pre_rope`` quantizes keys as they are before the rotary embedding, and rotates them again
            as they are read (KVQuant, arXiv 2401.18079).
    permute, norm, signs, low_rank, outliers   parts that wrap the codec, in this order from the inside.
    """

    codec: str
    bits: int | tuple[int, ...] | None = None
    axis: str | None = None
    group: int | str | None = None
    clip: float | tuple[float, ...] | None = None
    symmetric: bool | None = None
    meta: str | None = None
    levels: str | None = None
    weights: str | None = None
    q_norm: bool | None = None
    scale: str | None = None
    method: str | None = None
    percentile: float | None = None
    granularity: str | None = None
    seed: int | None = None
    outlier_channels: int | None = None
    outlier_bits: int | None = None
    placement: str | None = None
    permute: PermuteSpec | None = None
    norm: NormSpec | None = None
    signs: SignSpec | None = None
    low_rank: LowRankSpec | None = None
    outliers: OutlierSpec | None = None

    def __post_init__(self):
        if self.codec not in _CODEC_FIELDS:
            raise RecipeError(f"unknown codec {self.codec!r}.{suggest(str(self.codec), _CODEC_FIELDS)}")
        for name, part in _PARTS.items():
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, build(part, getattr(self, name), name))
            elif not isinstance(getattr(self, name), part | None):
                raise RecipeError(f"{name} is {getattr(self, name)!r}, not a mapping: write it as '{{name: value}}'.")
        check_fields(self, f"codec {self.codec!r}", *_CODEC_FIELDS[self.codec])
        check_choice("placement", self.placement, ("pre_rope",), "a placement")
        if self.codec in SCALES:
            check_choice("scale", self.scale, SCALES[self.codec], f"a {self.codec} scale")
        if self.codec in METADATA:
            check_choice("meta", self.meta, METADATA[self.codec], f"metadata of {self.codec}")
        getattr(self, f"_check_{self.codec}")()
        self._check_parts()

    def _check_exact(self):
        pass

    def _check_float8(self):
        check_choice("method", self.method, ("max", "percentile", "mse"))
        check_choice("granularity", self.granularity, ("tensor", "head"))
        for name in ("method", "granularity"):
            if getattr(self, name) is not None and self.scale != "calibrated":
                raise RecipeError(f"{name} says how a scale is calibrated, and scale={self.scale}: remove one of them.")
        if (self.method == "percentile") != (self.percentile is not None):
            raise RecipeError("method=percentile and percentile belong together, as in percentile: 99.99.")
        if self.percentile is not None and (not is_number(self.percentile) or not 50 < self.percentile <= 100):
            raise RecipeError(f"percentile={self.percentile!r} is no percentile: use a number above 50 to 100.")

    def _check_affine(self):
        self._check_bits(AFFINE_BITS)
        self._check_group()
        _check_clip(self.clip)
        check_flag("symmetric", self.symmetric)
        if self.symmetric and self.meta in ("zero8", "range8"):
            raise RecipeError(f"symmetric codes have no minimum for meta={self.meta} to store: use float16 or e4m3.")
        if self.meta == "range8" and self.axis != "channel":
            raise RecipeError(
                "meta=range8 stores minima relative to those of the other channels: use axis channel, or meta zero8."
            )

    def _check_tiers(self):
        if not isinstance(self.bits, list | tuple) or not self.bits:
            raise RecipeError(f"bits={self.bits!r} are not tiers: give a list such as [4, 2, 2, 2].")
        object.__setattr__(self, "bits", tuple(self.bits))
        for width in self.bits:
            if isinstance(width, bool) or width not in TIER_BITS:
                raise RecipeError(f"bits={width!r} of a tier is not a packed width: use one of 0, 2, 3, 4, 8.")
        if not any(self.bits):
            raise RecipeError("every tier has 0 bits, so nothing would be stored: give one of them bits.")
        check_choice("group", self.group, BLOCK_TOKENS, "a block of tokens")
        if isinstance(self.clip, list | tuple):
            object.__setattr__(self, "clip", tuple(self.clip))
            if len(self.clip) != len(self.bits):
                raise RecipeError(f"clip={list(self.clip)!r} does not name a share for each of {len(self.bits)} tiers.")
        for share in self.clip if isinstance(self.clip, tuple) else (self.clip,):
            _check_clip(share)

    def _check_book(self):
        self._check_bits(BOOK_BITS)
        if self.levels == "uniform" and self.scale in ("unit", "moments"):
            raise RecipeError(
                f"levels=uniform go from -1 to 1, and scale={self.scale} has no such range: use absmax or range."
            )
        check_choice("levels", self.levels, LEVELS)
        if self.scale in GROUPED_SCALES:
            for name in ("axis", "group"):
                if getattr(self, name) is None:
                    raise RecipeError(f"scale={self.scale} is taken over groups and needs {name!r}: add it.")
            self._check_group()
        elif self.axis is not None or self.group is not None:
            raise RecipeError(f"scale={self.scale} is static and has no groups: remove axis and group.")
        if self.levels != "calibrated" and (self.weights is not None or self.q_norm is not None):
            raise RecipeError(f"weights and q_norm belong to calibrated levels, not to {self.levels}: remove them.")
        check_choice("weights", self.weights, ("fisher",))
        check_flag("q_norm", self.q_norm)
        if self.levels == "calibrated" and self.scale in ("unit", "absmax", "moments"):
            raise RecipeError(
                f"levels=calibrated are learned between the ends of a range: use scale=range or calibrated, not "
                f"{self.scale}."
            )

    def _check_float4(self):
        check_choice("group", self.group, (16, 32), "a block of float4")
        if (self.scale is None) != (self.meta == "e8m0"):
            raise RecipeError("meta=e4m3 needs scale=unit or scale=calibrated beside it, and meta=e8m0 takes none.")

    def _check_sketch(self):
        self._check_bits(AFFINE_BITS)
        _check_seed("seed", self.seed)
        outliers = [getattr(self, name) is not None for name in ("outlier_channels", "outlier_bits", "group")]
        if any(outliers) != all(outliers):
            raise RecipeError("outlier_channels, outlier_bits and group belong together: give all of them, or none.")
        if all(outliers):
            check_choice("group", self.group, BLOCK_TOKENS)
            for name in ("outlier_channels", "outlier_bits"):
                if not is_count(getattr(self, name)):
                    raise RecipeError(f"{name}={getattr(self, name)!r} is not a count: use 1 or more.")

    def _check_bits(self, widths: tuple[int, ...]):
        if isinstance(self.bits, bool) or self.bits not in widths:
            raise RecipeError(f"bits={self.bits!r} is not a packed width: use one of {', '.join(map(str, widths))}.")

    def _check_group(self):
        if self.axis not in ("token", "channel"):
            raise RecipeError(f"axis={self.axis!r} is not an axis: use 'token' or 'channel'.")
        if self.axis == "channel" and self.group not in BLOCK_TOKENS:
            raise RecipeError(
                f"group={self.group!r} does not divide a page of tokens: axis 'channel' takes "
                f"{', '.join(map(str, BLOCK_TOKENS))}."
            )
        if self.axis == "token" and self.group not in ("head", "token") and not is_count(self.group):
            raise RecipeError(f"group={self.group!r} is not a group size: use a positive number, 'head' or 'token'.")

    def _check_parts(self):
        if self.outliers is not None and self.outliers.along == "channel" and self.block_tokens == 1:
            raise RecipeError(
                "outliers along channel are chosen among the tokens of a block, and this codec has none: use axis "
                "channel, low_rank, or outliers along token."
            )
        if self.permute is not None and self.codec == "float8":
            raise RecipeError("permute changes which channels share a group, and float8 has no groups: remove it.")
        if self.permute is not None and self.codec == "book" and self.axis is None:
            raise RecipeError(
                f"permute changes which channels share a group, and scale={self.scale} has none: remove it."
            )
        if self.permute is not None and self.axis == "channel":
            raise RecipeError(
                "permute changes which channels share a group, and axis channel has groups of tokens: remove one."
            )
        if self.permute is not None and self.group in ("head", "token"):
            raise RecipeError(f"permute does nothing to group={self.group!r}, which holds every channel: remove one.")
        if self.norm is not None and self.codec == "book" and self.scale == "calibrated":
            raise RecipeError("norm changes the numbers that scale=calibrated was fitted to: remove one of them.")

    @property
    def block_tokens(self) -> int:
        """The smallest number of consecutive tokens that can be encoded alone."""
        sizes = [1]
        if self.axis == "channel" or self.codec in ("sketch", "tiers"):
            sizes.append(self.group or 1)
        if self.low_rank is not None:
            sizes.append(self.low_rank.block)
        # All sizes are powers of two.
        return max(sizes)

    @property
    def is_calibrated(self) -> bool:
        """True if the codec needs tensors that calibration makes."""
        return "calibrated" in (self.levels, self.scale) or self.permute is not None

    def group_size(self, head_dim: int) -> int:
        """Numbers per scale for this head dimension; refuses a group that does not divide it (axis token)."""
        group = head_dim if self.group in ("head", "token") else int(self.group)
        if self.axis != "channel" and head_dim % group:
            fits = [g for g in (16, 32, 64, 128, 256) if head_dim % g == 0]
            ways = ", ".join(map(str, fits)) + (" or " if fits else "") + "'head'"
            raise RecipeError(f"group={group} does not divide head_dim={head_dim}; use {ways}.")
        return group

    def to_dict(self) -> dict[str, Any]:
        return {"codec": self.codec} | given(self, *_CODEC_FIELDS[self.codec])


def _check_clip(clip: Any) -> None:
    if clip is not None and (not is_number(clip) or not 0 < clip <= 1):
        raise RecipeError(f"clip={clip!r} is not a share of the range: use a number above 0 and at most 1.")


def _check_seed(name: str, seed: Any) -> None:
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise RecipeError(f"{name}={seed!r} is not a seed: use a whole number of 0 or more.")
