"""What a recipe says of one transform, and of the transforms of both sides in their order.

A spec only says what is wanted. What a transform does lives in ``kvq/transforms``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvq.errors import RecipeError, suggest
from kvq.settings import build, check_choice, is_count, is_number, plain, refuse_unknown

_SIDES = ("key", "value")
# Settings by kind of transform: those that must be given, and those that may be; and the sides that it makes sense on.
_TRANSFORM_FIELDS = {
    "hadamard": ((), ("block", "seed")),
    "smooth": ((), ("alpha", "beta", "rule")),
    "align": ((), ()),
    "shift": ((), ()),
    "rope_bias": ((), ()),
    "spectral": ((), ()),
    "balance": ((), ()),
    "principal": ((), ()),
    "learned_pairs": ((), ("steps", "seed")),
    "learned_scale": ((), ("steps", "seed")),
    "learned_rotation": ((), ("steps", "seed")),
    "learned_matrix": ((), ("steps", "seed")),
}
_TRANSFORM_SIDES = {
    "hadamard": _SIDES,
    "smooth": _SIDES,
    "align": ("key",),
    "shift": _SIDES,
    "rope_bias": ("key",),
    "spectral": _SIDES,
    "balance": _SIDES,
    "principal": _SIDES,
    "learned_pairs": ("key",),
    "learned_scale": ("value",),
    "learned_rotation": _SIDES,
    "learned_matrix": _SIDES,
}
SMOOTH_RULES = ("absmax", "mean", "threshold")
_SEARCH = "search"
# These leave channels where they are, up to the two of a rotary pair.
COMMUTES_WITH_ROPE = ("smooth", "align", "learned_pairs")
# These mix channels, so that a scale after them has no channel of its own to work on.
_ROTATIONS = ("hadamard", "spectral", "balance", "principal", "learned_rotation", "learned_matrix")


@dataclass(frozen=True, kw_only=True)
class TransformSpec:
    """One step that keys or values go through before their codec, and that attention undoes exactly.

    kind    ``hadamard``   a Hadamard rotation of every head, scaled to be orthonormal (QuaRot, arXiv 2404.00456).
            ``smooth``     a scale by channel (keys: by rotary pair), max|k|^alpha / max|q|^beta (SmoothQuant, arXiv
                           2211.10438; QServe, arXiv 2405.04532).
            ``align``      keys: turn every rotary pair so that its mean has two equal halves; what is static in a key
                           then lies along one diagonal, which a group's minimum stores.
            ``shift``      subtract the mean of every channel (Outlier Suppression+, arXiv 2304.09145).
            ``rope_bias``  keys: take away the rotated bias of the key projection, and add it again when read.
            ``spectral``   eigenvectors of what reads the tensor, then a Hadamard (OSCAR, arXiv 2605.17757).
            ``balance``    the closed-form matrix that gives what is stored and what reads it one covariance, then a
                           Hadamard: least product of the two errors.
            ``principal``  the same matrix without the Hadamard: independent channels, sorted by what their errors cost.
            ``learned_pairs``     keys: a scale and an angle by rotary pair (OmniQuant, arXiv 2308.13137, kept exact).
            ``learned_scale``     values: a scale by channel (OmniQuant).
            ``learned_rotation``  an orthogonal matrix (SpinQuant's R2, arXiv 2405.16406).
            ``learned_matrix``    an invertible matrix (FlatQuant, arXiv 2410.09426; AffineQuant, arXiv 2403.12544).
            Learned steps begin as the identity, after the steps before them.
    block   hadamard only: rotate blocks of so many channels instead of the whole head.
    seed    hadamard: flip the signs of channels first, chosen by this seed; learned steps: of their batches.
    alpha, beta   smooth only: exponents of 0 to 1 (0.5 and 0 if not given), or ``search``: what gives the least error
            of the attention output.
    rule    smooth only: ``absmax``, ``mean`` (mean|v|^alpha, AWQ, arXiv 2306.00978), or ``threshold``
            (max(1, max|k| / t) with t searched, Outlier Suppression+).
    steps   learned steps only: optimiser steps a layer.
    """

    kind: str
    block: int | None = None
    seed: int | None = None
    alpha: float | str | None = None
    beta: float | str | None = None
    rule: str | None = None
    steps: int | None = None

    def __post_init__(self):
        if self.kind not in _TRANSFORM_FIELDS:
            raise RecipeError(f"unknown transform {self.kind!r}.{suggest(str(self.kind), _TRANSFORM_FIELDS)}")
        check_fields(self, f"transform {self.kind!r}", *_TRANSFORM_FIELDS[self.kind])
        if self.block is not None and not is_count(self.block):
            raise RecipeError(f"block={self.block!r} is not a number of channels: use 16, 32, 64, ...")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0):
            raise RecipeError(f"seed={self.seed!r} is not a seed: use a whole number of 0 or more.")
        if self.steps is not None and not is_count(self.steps):
            raise RecipeError(f"steps={self.steps!r} is not a number of steps: use 1 or more.")
        if self.kind == "smooth":
            self._check_smooth()

    def _check_smooth(self):
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value not in (None, _SEARCH) and (not is_number(value) or not 0 <= value <= 1):
                raise RecipeError(f"{name}={value!r} is not an exponent: use a number of 0 to 1, or 'search'.")
        check_choice("rule", self.rule, SMOOTH_RULES)
        if self.rule == "threshold" and not self.alpha == self.beta is None:
            raise RecipeError("rule 'threshold' has no exponents: remove alpha and beta.")
        if self.rule == "mean" and self.beta is not None:
            raise RecipeError("rule 'mean' has no beta: remove it.")

    @property
    def searches(self) -> bool:
        """True if candidates are tried on measured attention."""
        return self.rule == "threshold" or _SEARCH in (self.alpha, self.beta)

    @property
    def is_learned(self) -> bool:
        return self.kind.startswith("learned_")

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
            self._check_order(side, [spec.kind for spec in getattr(self, side)])

    @staticmethod
    def _check_order(side: str, kinds: list[str]) -> None:
        rotated = next((i for i, kind in enumerate(kinds) if kind in _ROTATIONS), len(kinds))
        for kind in kinds[rotated:]:
            if kind in ("smooth", "align", "learned_pairs", "learned_scale"):
                raise RecipeError(
                    f"{side} transform {kind!r} comes after {kinds[rotated]!r}, which has mixed the channels that it "
                    "works on: list it before."
                )
        behind = kinds[kinds.index("rope_bias") + 1 :] if "rope_bias" in kinds else ()
        for kind in behind:
            if kind != "hadamard":
                raise RecipeError(
                    f"key transform {kind!r} comes after 'rope_bias', and is fitted on keys with their bias: list it "
                    "before."
                )
        if "rope_bias" in kinds and "shift" in kinds:
            raise RecipeError("key transforms 'rope_bias' and 'shift' take away one mean twice: remove one of them.")

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        sides = {side: [spec.to_dict() for spec in getattr(self, side)] for side in ("key", "value")}
        return {side: specs for side, specs in sides.items() if specs}


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


def check_fields(spec, what: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuse settings that this codec or transform lacks or does not take; the first field names the kind."""
    for field in dataclasses.fields(spec)[1:]:
        name, value = field.name, getattr(spec, field.name)
        if name in required and value is None:
            raise RecipeError(f"{what} needs {name!r}: add '{name}: ...' beside it.")
        if name not in (*required, *optional) and value is not None:
            takes = ", ".join((*required, *optional)) or "no settings"
            raise RecipeError(f"{what} has no setting {name!r} (it takes {takes}): remove it.")


def given(spec, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """The settings that were given, as plain data."""
    found = {name: getattr(spec, name) for name in (*required, *optional) if getattr(spec, name) is not None}
    return {name: plain(value) for name, value in found.items()}
