"""What a recipe says of one codec, and what calibration must provide for it: the base of every codec's settings.

A codec is one file: its settings here derive from ``CodecSpec`` (or from ``PartSpec``, for what wraps a codec), carry
their checks, name the tensors and statistics that they need, and build what encodes and decodes. The decorators
``register_codec`` and ``register_part`` make them known by the name that recipes use; there is no other list.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from kvq.codecs.base import Codec
from kvq.errors import RecipeError
from kvq.registry import Registry
from kvq.settings import build, check_choice, check_settings, own_fields, plain, refuse_unknown

CODECS = Registry("codec", "kvq.codecs", "kvq.codecs")
PARTS = Registry("part of a codec", "kvq.codecs", "kvq.codecs")
# Tokens that a block may have: a page of 64 tokens holds whole blocks, or a block is a whole page.
BLOCK_TOKENS = (16, 32, 64, 128, 256)
# Where keys may be quantized but after RoPE, and what statistics call them there.
_TENSORS = {"pre_rope": "key_pre", "page": "key_page"}
_PLACING = ("placement", "frame")
_SHARED = {"shared": True}


def register_codec(name: str) -> Callable[[type], type]:
    """Class decorator: make a ``CodecSpec`` the codec ``name`` of recipes. Raises RecipeError for a taken name."""
    return CODECS.register(name, "codec")


def register_part(name: str) -> Callable[[type], type]:
    """Class decorator: make a ``PartSpec`` the setting ``name`` of every codec that parts may wrap."""
    return PARTS.register(name, "name")


@dataclass(frozen=True)
class Artefact:
    """One tensor that calibration makes for a codec of K heads that are stored alike.

    shape      of the tensor.
    stand_in   makes one of a shape that passes ``wrong``, for where bytes matter and numbers do not.
    wrong      what is wrong with a tensor, to be read after "has ..."; None if nothing is.
    by_head    the first dimension holds one part for each of the K heads.
    joint      it names channels of all heads, which so must be stored together.
    """

    shape: tuple[int, ...]
    stand_in: Callable[[tuple[int, ...]], torch.Tensor] = torch.ones
    wrong: Callable[[torch.Tensor], str | None] = lambda tensor: None
    by_head: bool = False
    joint: bool = False


def not_positive(tensor: torch.Tensor) -> str | None:
    """What is wrong with scales."""
    return None if bool((tensor > 0).all()) else "a scale that is not positive"


class Measured(Protocol):
    """What calibration has measured of the numbers that the codec of K heads sees (``kvq.calib.measured``).

    All raise DataError for statistics that lack it or are not finite.
    """

    def absmax(self) -> torch.Tensor:
        """Largest magnitude of every channel, after transforms, float64 [K, head_dim]."""

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest number of every channel, before transforms, float64 [K, head_dim]."""

    def quantile(self, share: float) -> torch.Tensor:
        """What ``share`` of every channel's numbers stay below, before transforms, float64 [K, head_dim]."""

    def counts(self, reader: str) -> torch.Tensor:
        """Numbers by bin of the histogram, int64 [K, bins]; ``reader`` names the setting that wants them in errors."""

    def edges(self) -> torch.Tensor:
        """Where these bins end, float64 [bins + 1], symmetric about 0."""

    def compared(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a codebook is learned from: normalised numbers, how many there are of each, their weights; [n]."""


@dataclass(frozen=True, kw_only=True)
class PartSpec(ABC):
    """Settings of a codec around a codec. Parts wrap in the order of ``order``, from the inside.

    name              its name in recipes, from ``register_part``.
    changes_input     the codec inside sees other numbers than without it.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 100
    changes_input: ClassVar[bool] = True
    # Consecutive tokens that it encodes together, and the share of numbers that it stores exactly.
    block_tokens: ClassVar[int] = 1
    outside_share: ClassVar[float] = 0.0

    def check_codec(self, spec: "CodecSpec") -> None:
        """Raise RecipeError for a codec that this part does not go with."""

    def artefacts(self, head_dim: int, heads: int) -> dict[str, Artefact]:
        """Tensors that calibration makes for it, by name."""
        return {}

    def needs(self, tensor: str) -> Iterable[str]:
        """Statistics that it reads of ``tensor`` (``kvq.calib.needs``)."""
        return ()

    def fit(self, measured: Measured, spec: "CodecSpec") -> dict[str, torch.Tensor]:
        """The tensors of ``artefacts`` for the codec that it is part of."""
        return {}

    @abstractmethod
    def wrap(self, inner: Codec, *, base: Codec, artefacts: Mapping[str, torch.Tensor], heads: int) -> Codec:
        """The codec around ``inner``; ``base`` is the codec inside all parts."""


@dataclass(frozen=True, kw_only=True)
class CodecSpec(ABC):
    """Settings of how one tensor (keys or values) is stored; ``codec_spec`` makes one of plain data.

    placement   keys only: ``pre_rope`` quantizes keys as they are before the rotary embedding, and rotates them again
                as they are read (KVQuant, arXiv 2401.18079); ``page`` as they are relative to the first token of
                their block (``kvq/transforms/frame.py``).
    frame       tokens of such a block, 64 if not given.
    parts       what wraps the codec, from the inside.

    A codec's own settings are fields that default to None where they may be left out; ``check`` refuses what cannot
    work. The class says

    codec             its name in recipes, from ``register_codec``.
    is_exact          nothing is quantized.
    is_placeable      ``placement`` and ``frame`` may be given.
    is_wrappable      parts may be given.
    keys_only         why it does not store values, to be read after its name; None if it does.
    fits_transformed  what calibration makes for it is made of numbers after transforms, from their largest magnitudes.
    """

    placement: str | None = field(default=None, metadata=_SHARED)
    frame: int | None = field(default=None, metadata=_SHARED)
    parts: tuple[PartSpec, ...] = field(default=(), metadata=_SHARED)

    codec: ClassVar[str]
    is_exact: ClassVar[bool] = False
    is_placeable: ClassVar[bool] = True
    is_wrappable: ClassVar[bool] = True
    keys_only: ClassVar[str | None] = None
    fits_transformed: ClassVar[bool] = False

    def __post_init__(self):
        check_choice("placement", self.placement, tuple(_TENSORS), "a placement")
        check_choice("frame", self.frame, BLOCK_TOKENS, "a block of tokens")
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda part: part.order)))
        self.check()
        for part in self.parts:
            part.check_codec(self)

    def check(self) -> None:
        """Raise RecipeError for settings that cannot work."""

    # What a codec without parts says of itself.

    @property
    def own_block_tokens(self) -> int:
        """Consecutive tokens that the codec encodes together."""
        return 1

    def own_artefacts(self, head_dim: int, heads: int) -> dict[str, Artefact]:
        """Tensors that calibration makes for it, by name."""
        return {}

    def own_needs(self, tensor: str) -> Iterable[str]:
        """Statistics that it reads of ``tensor``: ``key``, ``key_pre`` or ``value`` (``kvq.calib.needs``)."""
        return ()

    def own_fit(self, measured: Measured) -> dict[str, torch.Tensor]:
        """The tensors of ``own_artefacts``."""
        return {}

    @abstractmethod
    def bind(self, head_dim: int, artefacts: Mapping[str, torch.Tensor], heads: int) -> Codec:
        """The codec without its parts, for ``heads`` KV heads that are stored together.

        Raises RecipeError for a head dimension that the settings do not fit.
        """

    @property
    def has_head_scales(self) -> bool:
        """True if every head has static numbers of its own, so that heads are stored apart."""
        return False

    @property
    def has_static_ranges(self) -> bool:
        """True if codes span static ranges, outside of which a number saturates."""
        return False

    @property
    def learns_levels(self) -> bool:
        """True if the levels of a codebook are learned from the numbers that it is compared with."""
        return False

    @property
    def weighs_by_gradients(self) -> bool:
        """True if these numbers are weighted by squared gradients."""
        return False

    def before_learning(self) -> "CodecSpec":
        """A codec that compares the same numbers with levels that need not be learned."""
        return self

    def compared_settings(self) -> dict[str, Any]:
        """The settings that decide which numbers are compared with levels."""
        return {k: v for k, v in self.to_dict().items() if k not in {p.name for p in self.parts if not p.changes_input}}

    @property
    def why_no_channel_groups(self) -> str | None:
        """Why moving channels would change nothing, as a sentence; None if groups of channels share metadata."""
        return f"permute changes which channels share a group, and {self.codec} has no groups: remove it."

    @property
    def hint(self) -> str | None:
        """Settings, as for --set, with which the codec needs no statistics; None if there are none."""
        return None

    @property
    def token_dtype_bits(self) -> int | None:
        """Bits of the cache dtype that stores the same with scales by token and head; None if there is none."""
        return None

    def engine_obstacle(self, side: str) -> str | None:
        """Why an FP8 cache with static scales does not store what this codec says; None if it does."""
        bits = getattr(self, "bits", None)
        return f"{side}s are stored by the codec {self.codec!r}{f' with {bits} bits' if bits else ''}"

    # What it is with its parts.

    def part(self, name: str) -> PartSpec | None:
        """The part of this name; None if there is none."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def block_tokens(self) -> int:
        """The smallest number of consecutive tokens that can be encoded alone. All sizes are powers of two."""
        return max(self.own_block_tokens, *(part.block_tokens for part in self.parts), 1)

    @property
    def block_setting(self) -> str:
        """The setting that ``block_tokens`` comes from."""
        if self.own_block_tokens == self.block_tokens:
            return "group"
        return next(f"{part.name}.block" for part in self.parts if part.block_tokens == self.block_tokens)

    @property
    def outside_share(self) -> float:
        """Share of the numbers that are stored exactly beside the codes."""
        return sum(part.outside_share for part in self.parts)

    def artefacts(self, head_dim: int, heads: int) -> dict[str, Artefact]:
        """Tensors that calibration makes for the codec, by name."""
        found = dict(self.own_artefacts(head_dim, heads))
        for part in self.parts:
            found |= part.artefacts(head_dim, heads)
        return found

    @property
    def is_calibrated(self) -> bool:
        """True if the codec needs tensors that calibration makes."""
        return bool(self.artefacts(1, 1))

    def needs(self, side: str) -> set[str]:
        """Statistics that are read for keys or values."""
        tensor = self.tensor(side)
        return {*self.own_needs(tensor), *(need for part in self.parts for need in part.needs(tensor))}

    def tensor(self, side: str) -> str:
        """What statistics call the numbers that the codec sees: ``key``, ``key_pre``, ``key_page`` or ``value``."""
        return _TENSORS[self.placement] if self.placement else side

    @property
    def has_channel_numbers(self) -> bool:
        """True if calibration makes numbers for its channels, of which rotary positions change what they see."""
        head_dim, heads = 97, 89
        return any(own.shape[-1:] == (head_dim,) for own in self.artefacts(head_dim, heads).values())

    def fit(self, measured: Measured) -> dict[str, torch.Tensor]:
        """The tensors of ``artefacts``."""
        found = dict(self.own_fit(measured))
        for part in self.parts:
            found |= part.fit(measured, self)
        return found

    def build(self, head_dim: int, artefacts: Mapping[str, torch.Tensor] | None = None, heads: int = 1) -> Codec:
        """The codec for one head dimension.

        artefacts   the tensors of ``artefacts`` by name, of these heads.
        heads       KV heads that are stored together; some codecs share numbers among them.
        """
        codec = base = self.bind(head_dim, artefacts or {}, heads)
        for part in self.parts:
            codec = part.wrap(codec, base=base, artefacts=artefacts or {}, heads=heads)
        return codec

    def stand_in(self, head_dim: int, heads: int) -> Codec:
        """The codec with stand-ins for what calibration makes, to fit transforms before it."""
        # A codec has one static scale.
        needed = self.artefacts(head_dim, 1 if self.has_head_scales else heads)
        made = {name: own.stand_in(own.shape) for name, own in needed.items()}
        return self.build(head_dim, made, heads)

    def to_dict(self) -> dict[str, Any]:
        """The settings that were given, as plain data: required ones first."""
        own = {f.name: getattr(self, f.name) for f in own_fields(type(self))}
        found = {"codec": self.codec} | own | {name: getattr(self, name) for name in _PLACING}
        found |= {part.name: part for part in self.parts}
        return {name: plain(value) for name, value in found.items() if value is not None}


def codec_spec(codec: str, **settings: Any) -> CodecSpec:
    """The settings of a codec from plain data, as in a recipe; what is None is left out. Raises RecipeError."""
    cls = CODECS.get(codec)
    given = {name: value for name, value in settings.items() if value is not None}
    parts = {name: PARTS.find(name) for name in given if name not in _own_names(cls)}
    made = {name: _part(part, name, given[name]) for name, part in parts.items() if part is not None}
    foreign = [name for name in given if name not in _own_names(cls) and not (name in made and cls.is_wrappable)]
    # Names of all parts are only for the message: they are asked of every plug-in.
    more = _shared_names(cls) if foreign else (*_PLACING, *made)
    check_settings(cls, given, f"codec {codec!r}", more)
    return cls(**{name: value for name, value in given.items() if name not in made}, parts=tuple(made.values()))


def _own_names(cls: type) -> set[str]:
    return {field.name for field in own_fields(cls)} | set(_PLACING if cls.is_placeable else ())


def _shared_names(cls: type) -> tuple[str, ...]:
    parts = sorted(PARTS.classes(), key=lambda part: part.order) if cls.is_wrappable else ()
    return (*(_PLACING if cls.is_placeable else ()), *(part.name for part in parts))


def _part(cls: type, name: str, value: Any) -> PartSpec:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} is {value!r}, not a mapping: write it as '{{name: value}}'.")
    return build(cls, value, name)


def parse_codec(data: Any, where: str) -> CodecSpec:
    """``codec_spec`` of a mapping; ``where`` names it in error messages."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}, not a mapping: write it as '{{name: value}}'.")
    named = CODECS.find(data.get("codec"))
    # A setting that no codec has is likely misspelt; an unknown codec may have any.
    if "codec" not in data or (named and not set(data) <= {"codec", *_own_names(named)}):
        refuse_unknown(data, known_settings(), where)
    if "codec" not in data:
        raise RecipeError(f"{where} is incomplete: {data!r} lacks a required setting.")
    try:
        return codec_spec(**data)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def known_settings() -> tuple[str, ...]:
    """Every setting that some codec takes."""
    own = dict.fromkeys(field.name for cls in CODECS.classes() for field in own_fields(cls))
    return ("codec", *own, *_PLACING, *(part.name for part in PARTS.classes()))


def merge_codec(base: CodecSpec, override: Any, where: str) -> CodecSpec:
    """Lay an override over a codec; naming another codec starts from nothing."""
    if not isinstance(override, Mapping):
        raise RecipeError(f"{where} is {override!r}, not a mapping: write it as '{{bits: 4}}'.")
    keep = {} if override.get("codec", base.codec) != base.codec else base.to_dict()
    return parse_codec(keep | dict(override), where)
