"""The parts of a recipe: codec, transforms, token policy, and what one head gets, as frozen, validated data.

A spec only says what is wanted. What a codec or transform does lives in ``kvq/quantizers`` and ``kvq/transforms``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvq.codec_specs import CodecSpec
from kvq.errors import RecipeError, suggest
from kvq.fields import build, check_fields, given, is_count, refuse_unknown

# Settings by kind of transform, likewise; and the sides that it makes sense on.
_TRANSFORM_FIELDS = {
    "hadamard": ((), ("block", "seed")),
}
_COMMUTES_WITH_ROPE: tuple[str, ...] = ()
_TRANSFORM_SIDES = {
    "hadamard": ("key", "value"),
}


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
        check_fields(self, f"transform {self.kind!r}", *_TRANSFORM_FIELDS[self.kind])
        if self.block is not None and not is_count(self.block):
            raise RecipeError(f"block={self.block!r} is not a number of channels: use 16, 32, 64, ...")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0):
            raise RecipeError(f"seed={self.seed!r} is not a seed: use a whole number of 0 or more.")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | given(self, *_TRANSFORM_FIELDS[self.kind])


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

    A codec that encodes tokens alone (axis ``token``) quantizes each as it leaves the window. For one that encodes
    blocks of tokens (axis ``channel``, low rank) the window is also the flush unit: ``window`` tokens are quantized
    together when it is full (KIVI); window 0 flushes every block.
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
            block = spec.block_tokens
            if self.tokens.window % block:
                name = "group" if spec.group == block else "low_rank.block"
                raise RecipeError(
                    f"tokens.window={self.tokens.window} is no multiple of {side}.{name}={block}: a block of tokens "
                    f"is flushed whole; use a window of 0, {block}, {2 * block}, ..."
                )
            if spec.is_calibrated and getattr(self.transforms, side):
                raise RecipeError(
                    f"{side}: what calibration made for the codec is of {side}s without transforms: remove the "
                    "transforms, or the calibrated settings."
                )
        if self.value.codec == "sketch":
            raise RecipeError("value.codec='sketch' estimates products with queries: use it for keys only.")
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

    @property
    def has_head_scales(self) -> bool:
        """True if keys or values have one static scale a head."""
        return "head" in (self.key.granularity, self.value.granularity)


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
