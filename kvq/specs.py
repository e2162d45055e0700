"""The parts of a recipe: codec, transforms, token policy, and what one head gets, as frozen, validated data.

A spec only says what is wanted. What a codec or transform does lives in ``kvq/quantizers`` and ``kvq/transforms``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvq.errors import RecipeError, suggest

AFFINE_BITS = (2, 3, 4, 8)
CHANNEL_GROUPS = (16, 32, 64, 128, 256)
# Settings by codec: those that must be given, and those that may be.
_CODEC_FIELDS = {
    "exact": ((), ()),
    "affine": (("bits", "axis", "group"), ("clip", "placement")),
    "float8": (("scale",), ()),
}
# Settings by kind of transform, likewise; and the sides that it makes sense on.
_TRANSFORM_FIELDS = {
    "hadamard": ((), ("block", "seed")),
}
_COMMUTES_WITH_ROPE: tuple[str, ...] = ()
_TRANSFORM_SIDES = {
    "hadamard": ("key", "value"),
}


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """How one tensor (keys or values) is stored.

    codec   ``exact`` (kept in the model's dtype), ``affine`` (integer codes with a float scale and minimum), or
            ``float8`` (E4M3 with one scale per tensor).
    bits    affine only: bits per code, one of 2, 3, 4, 8.
    axis    affine only: ``token`` shares a scale among ``group`` channels of one token; ``channel`` shares it among
            ``group`` consecutive tokens of one channel (KIVI keys).
    group   affine only: numbers that share a scale, or ``head`` for the whole head dimension (axis token only).
    clip    affine only: share of a group's range that the codes span, above 0 to 1; what lies outside saturates.
    scale   float8 only: ``calibrated`` (absolute maximum from statistics / 448) or ``unit`` (a plain cast).
    placement   affine keys only: ``pre_rope`` quantizes keys as they are before the rotary embedding, and rotates them
            again as they are read (KVQuant, arXiv 2401.18079).
    """

    codec: str
    bits: int | None = None
    axis: str | None = None
    group: int | str | None = None
    clip: float | None = None
    scale: str | None = None
    placement: str | None = None

    def __post_init__(self):
        if self.codec not in _CODEC_FIELDS:
            raise RecipeError(f"unknown codec {self.codec!r}.{suggest(str(self.codec), _CODEC_FIELDS)}")
        _check_fields(self, f"codec {self.codec!r}", *_CODEC_FIELDS[self.codec])
        if self.codec == "affine":
            self._check_affine()
        if self.codec == "float8" and self.scale not in ("calibrated", "unit"):
            raise RecipeError(f"scale={self.scale!r} is not a float8 scale: use 'calibrated' or 'unit'.")
        if self.placement not in (None, "pre_rope"):
            raise RecipeError(f"placement={self.placement!r} is not known: use 'pre_rope', or leave it out.")

    def _check_affine(self):
        if isinstance(self.bits, bool) or self.bits not in AFFINE_BITS:
            raise RecipeError(f"bits={self.bits!r} is not a packed width: use one of 2, 3, 4, 8.")
        if self.axis not in ("token", "channel"):
            raise RecipeError(f"axis={self.axis!r} is not an axis: use 'token' or 'channel'.")
        if self.axis == "channel" and self.group not in CHANNEL_GROUPS:
            raise RecipeError(
                f"group={self.group!r} does not divide a page of tokens: axis 'channel' takes "
                f"{', '.join(map(str, CHANNEL_GROUPS))}."
            )
        if self.axis == "token" and self.group != "head" and not is_count(self.group):
            raise RecipeError(f"group={self.group!r} is not a group size: use a positive number or 'head'.")
        if self.clip is not None and (not is_number(self.clip) or not 0 < self.clip <= 1):
            raise RecipeError(f"clip={self.clip!r} is not a share of the range: use a number above 0 and at most 1.")

    def group_size(self, head_dim: int) -> int:
        """Numbers per scale for this head dimension; refuses a group that does not divide it (axis token)."""
        group = head_dim if self.group == "head" else int(self.group)
        if self.axis == "token" and head_dim % group:
            fits = [g for g in (16, 32, 64, 128, 256) if head_dim % g == 0]
            ways = ", ".join(map(str, fits)) + (" or " if fits else "") + "'head'"
            raise RecipeError(f"group={group} does not divide head_dim={head_dim}; use {ways}.")
        return group

    def to_dict(self) -> dict[str, Any]:
        return {"codec": self.codec} | _given(self, *_CODEC_FIELDS[self.codec])


@dataclass(frozen=True, kw_only=True)
class TransformSpec:
    """One step that keys or values go through before their codec, and that attention undoes exactly.

    kind    ``hadamard``: a Hadamard rotation of every head, scaled to be orthonormal (QuaRot, arXiv 2404.00456).
    block   hadamard only: rotate blocks of so many channels instead of the whole head.
    seed    hadamard only: flip the signs of channels first, chosen by this seed.
    """

    kind: str
    block: int | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.kind not in _TRANSFORM_FIELDS:
            raise RecipeError(f"unknown transform {self.kind!r}.{suggest(str(self.kind), _TRANSFORM_FIELDS)}")
        _check_fields(self, f"transform {self.kind!r}", *_TRANSFORM_FIELDS[self.kind])
        if self.block is not None and not is_count(self.block):
            raise RecipeError(f"block={self.block!r} is not a number of channels: use 16, 32, 64, ...")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0):
            raise RecipeError(f"seed={self.seed!r} is not a seed: use a whole number of 0 or more.")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | _given(self, *_TRANSFORM_FIELDS[self.kind])


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """The transforms of both sides, in the order in which they are applied."""

    key: tuple[TransformSpec, ...] = ()
    value: tuple[TransformSpec, ...] = ()

    def __post_init__(self):
        for side in ("key", "value"):
            for spec in getattr(self, side):
                if side not in _TRANSFORM_SIDES[spec.kind]:
                    raise RecipeError(
                        f"transform {spec.kind!r} does nothing for {side}s: list it under "
                        f"{' or '.join(_TRANSFORM_SIDES[spec.kind])}."
                    )

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        sides = {side: [spec.to_dict() for spec in getattr(self, side)] for side in ("key", "value")}
        return {side: specs for side, specs in sides.items() if specs}


@dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """Tokens that stay exact, in tokens: the first ``sinks`` and the last ``window``.

    With axis ``token`` a token is quantized as it leaves the window. With axis ``channel`` the window is also the
    flush unit: ``window`` tokens are quantized together when it is full (KIVI); window 0 flushes every group.
    """

    sinks: int = 0
    window: int = 0

    def __post_init__(self):
        for name in ("sinks", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise RecipeError(f"tokens.{name}={value!r} is not a number of tokens: use 0 or more.")

    def to_dict(self) -> dict[str, int]:
        return {"sinks": self.sinks, "window": self.window}


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What one KV head of one layer gets: both codecs, the transforms before them, and the token policy."""

    key: CodecSpec
    value: CodecSpec
    tokens: TokenPolicy
    transforms: Transforms = Transforms()

    def __post_init__(self):
        if (self.key.codec == "exact") != (self.value.codec == "exact"):
            raise RecipeError("'exact' keys with quantized values (or the reverse) are not stored: set both or none.")
        for side in ("key", "value"):
            spec = getattr(self, side)
            if spec.axis == "channel" and self.tokens.window % spec.group:
                raise RecipeError(
                    f"tokens.window={self.tokens.window} is no multiple of {side}.group={spec.group}: a channel group "
                    f"is flushed whole; use a window of 0, {spec.group}, {2 * spec.group}, ..."
                )
        if self.value.placement is not None:
            raise RecipeError(f"value.placement={self.value.placement!r}: values have no rotary embedding; remove it.")
        for step in self.transforms.key if self.key.placement == "pre_rope" else ():
            if step.kind not in _COMMUTES_WITH_ROPE:
                raise RecipeError(
                    f"key.placement=pre_rope and the key transform {step.kind!r} exclude each other, because it does "
                    "not commute with the rotary embedding: remove one of them."
                )

    @property
    def is_exact(self) -> bool:
        return self.key.codec == "exact"


def build(cls, data: Any, where: str):
    """Make a spec of plain data; ``where`` names it in error messages."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}, not a mapping: write it as '{{name: value}}'.")
    refuse_unknown(data, tuple(f.name for f in dataclasses.fields(cls)), where)
    try:
        return cls(**data)
    except TypeError:
        raise RecipeError(f"{where} is incomplete: {data!r} lacks a required setting.") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def build_transforms(data: Any, where: str) -> Transforms:
    """``{"key": [{"kind": ...}], "value": [...]}`` to Transforms."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}, not a mapping: write it as '{{key: [{{kind: hadamard}}]}}'.")
    refuse_unknown(data, ("key", "value"), where)
    sides = {}
    for side, chain in data.items():
        if not isinstance(chain, list | tuple):
            raise RecipeError(f"{where}.{side} is {chain!r}, not a list: write it as '[{{kind: hadamard}}]'.")
        sides[side] = tuple(build(TransformSpec, step, f"{where}.{side}[{i}]") for i, step in enumerate(chain))
    try:
        return Transforms(**sides)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def merge_codec(base: CodecSpec, override: Any, where: str) -> CodecSpec:
    """Lay an override over a codec; naming another codec starts from nothing."""
    if not isinstance(override, Mapping):
        raise RecipeError(f"{where} is {override!r}, not a mapping: write it as '{{bits: 4}}'.")
    keep = {} if override.get("codec", base.codec) != base.codec else base.to_dict()
    return build(CodecSpec, keep | dict(override), where)


def refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in data:
        if name not in known:
            raise RecipeError(f"{where} has no setting {name!r}.{suggest(str(name), known)}")


def is_count(value: Any) -> bool:
    """True for a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_fields(spec, what: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuse settings that this codec or transform lacks or does not take; the first field names the kind."""
    for field in dataclasses.fields(spec)[1:]:
        name, value = field.name, getattr(spec, field.name)
        if name in required and value is None:
            raise RecipeError(f"{what} needs {name!r}: add '{name}: ...' beside it.")
        if name not in (*required, *optional) and value is not None:
            takes = ", ".join((*required, *optional)) or "no settings"
            raise RecipeError(f"{what} has no setting {name!r} (it takes {takes}): remove it.")


def _given(spec, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in (*required, *optional) if getattr(spec, name) is not None}
