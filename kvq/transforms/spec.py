"""What a recipe says of transforms, and what calibration must provide for them: the base of every kind's settings.

A kind of transform is one file: its settings derive from ``TransformSpec``, carry their checks, say on which sides and
in which order it makes sense, which statistics and tensors it needs, how these are fitted, and which step they make.
``register_transform`` makes it known by the name that recipes use; there is no other list.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kvq.codecs import Artefact
from kvq.codecs.spec import not_positive
from kvq.errors import RecipeError
from kvq.models.architecture import Attention
from kvq.pages.layout import SIDES
from kvq.registry import Registry
from kvq.settings import check_choice, check_settings, own_fields, plain, refuse_unknown
from kvq.transforms.chain import Chain, Step
from kvq.transforms.fit_data import FitData

TRANSFORMS = Registry("transform", "kvq.transforms", "kvq.transforms")
# Tensors of the forms in ``steps.py``, in the letters K (KV heads) and D (head dimension); 1 for one of all heads.
SCALE = {"scale": "KD"}
PAIRS = {"real": "KD", "imaginary": "KD", "partner": "D"}
MATRIX = {"matrix": "KDD"}
# Where a step of keys, or their codec, may stand: after RoPE, relative to the first token of a block, or before RoPE.
PLACES = ("post_rope", "page", "pre_rope")


def register_transform(kind: str) -> Callable[[type], type]:
    """Class decorator: make a ``TransformSpec`` the ``kind`` of recipes. Raises RecipeError for a taken name."""
    return TRANSFORMS.register(kind, "kind")


@dataclass(frozen=True, kw_only=True)
class TransformSpec(ABC):
    """Settings of one step that keys or values go through before their codec, and that attention undoes exactly.

    at   keys only, one of ``PLACES``: where the step acts (``frame.py``); None: where the step before it does, and
         the first of all after RoPE. What is fitted to keys after RoPE holds at the positions that it was fitted at.

    Settings are fields that default to None where they may be left out; ``check`` refuses what cannot work. The class
    says

    kind                 its name in recipes, from ``register_transform``.
    sides                on which it makes sense.
    tensors              by name, the shapes of what calibration makes for it, in the letters above.
    is_learned           its tensors come from ``learnable`` and not from ``fit``.
    commutes_with_rope   it leaves channels where they are, up to the two of a rotary pair.
    mixes_channels       a step after it has no channel of its own to work on.
    works_on_channels    it is such a step.
    takes_mean           later codecs see numbers without their mean.
    reads_magnitudes     it is fitted on magnitudes of what it sees.
    keeps_magnitudes     magnitudes after it follow from those before it, without tokens to measure again.
    why_not_framed       why it stands after RoPE and nowhere else, to be read after "because it"; None if it may.

    A step that drops channels or mixes heads (``loses``) acts where the codec is, and so do those after it: exact
    tokens stay as they are.
    """

    at: str | None = field(default=None, metadata={"shared": True})

    kind: ClassVar[str]
    sides: ClassVar[tuple[str, ...]] = SIDES
    tensors: ClassVar[Mapping[str, str]] = {}
    is_learned: ClassVar[bool] = False
    commutes_with_rope: ClassVar[bool] = False
    mixes_channels: ClassVar[bool] = False
    works_on_channels: ClassVar[bool] = False
    takes_mean: ClassVar[bool] = False
    reads_magnitudes: ClassVar[bool] = False
    keeps_magnitudes: ClassVar[bool] = False
    why_not_framed: ClassVar[str | None] = None

    def __post_init__(self):
        check_choice("at", self.at, PLACES, "a place of keys")
        self.check()

    def check(self) -> None:
        """Raise RecipeError for settings that cannot work."""

    @property
    def loses(self) -> bool:
        """True if it stores less than it sees, or channels of all heads together."""
        return False

    def width(self, head_dim: int) -> int:
        """Channels that it stores of ``head_dim``."""
        return head_dim

    def check_chain(self, side: str, before: Sequence["TransformSpec"], after: Sequence["TransformSpec"]) -> None:
        """Raise RecipeError for other steps of the side that this one does not go with."""

    def inexact(self, side: str, attention: Attention) -> str | None:
        """What of a layer's attention does not undo the step, to be read after "has ..."; None if all of it does."""
        return None

    def lacking(self, attention: Attention) -> str | None:
        """Why a layer has nothing for the step to do, as a sentence; None if it has."""
        return None

    @property
    def is_fitted_to_positions(self) -> bool:
        """True if its tensors, fitted to keys after RoPE, suit the positions of the calibration text alone."""
        return bool(self.tensors)

    def needs(self, side: str) -> Iterable[str]:
        """Statistics that it is fitted on (``kvq.calib.needs``)."""
        return ()

    def reads_output(self, side: str) -> bool:
        """True if it is fitted on the output projection: on the attention output, or on what reads values."""
        return False

    def reads_projection(self, side: str) -> bool:
        """True if it is fitted on the weights of the projection that gives what is stored."""
        return False

    def artefacts(self, kv_heads: int, head_dim: int) -> dict[str, Artefact]:
        """The tensors that calibration makes, by name."""
        sizes = {"K": kv_heads, "D": head_dim, "1": 1}
        return {
            name: Artefact(
                shape=tuple(sizes[letter] for letter in shape), **({"wrong": not_positive} if name == "scale" else {})
            )
            for name, shape in self.tensors.items()
        }

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        """The tensors, chosen from what the step will see."""
        raise NotImplementedError(f"{self.kind!r} names tensors and does not say how they are fitted")

    def learnable(self, data: FitData):
        """The step in the making (``kvq.transforms.learned.Learnable``), for kinds that are learned."""
        raise NotImplementedError(f"{self.kind!r} is not learned")

    @abstractmethod
    def build(self, head_dim: int, tensors: Mapping[str, torch.Tensor]) -> Step:
        """The step. Raises RecipeError for a head dimension that the settings do not fit."""

    def to_dict(self) -> dict[str, Any]:
        """The settings that were given, as plain data."""
        own = {part.name: getattr(self, part.name) for part in own_fields(type(self))} | {"at": self.at}
        return {"kind": self.kind} | {name: plain(value) for name, value in own.items() if value is not None}


def transform_spec(kind: str, **settings: Any) -> TransformSpec:
    """The settings of a transform from plain data, as in a recipe; what is None is left out. Raises RecipeError."""
    cls = TRANSFORMS.get(kind)
    given = {name: value for name, value in settings.items() if value is not None}
    check_settings(cls, given, f"transform {kind!r}", ("at",))
    return cls(**given)


def _parsed(data: Any, where: str) -> TransformSpec:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}, not a mapping: write it as '{{name: value}}'.")
    cls = TRANSFORMS.find(data.get("kind"))
    if "kind" not in data or (cls and not set(data) <= {"kind", "at", *(part.name for part in own_fields(cls))}):
        every = dict.fromkeys(part.name for cls in TRANSFORMS.classes() for part in own_fields(cls))
        refuse_unknown(data, ("kind", "at", *every), where)
    if "kind" not in data:
        raise RecipeError(f"{where} is incomplete: {data!r} lacks a required setting.")
    try:
        return transform_spec(**data)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """The transforms of both sides, in the order in which they are applied."""

    key: tuple[TransformSpec, ...] = ()
    value: tuple[TransformSpec, ...] = ()

    def __post_init__(self):
        for side in SIDES:
            chain = getattr(self, side)
            for spec in chain:
                if side not in spec.sides:
                    raise RecipeError(
                        f"transform {spec.kind!r} does nothing for {side}s: list it under {' or '.join(spec.sides)}."
                    )
            mixed = next((i for i, spec in enumerate(chain) if spec.mixes_channels), len(chain))
            for spec in chain[mixed:]:
                if spec.works_on_channels:
                    raise RecipeError(
                        f"{side} transform {spec.kind!r} comes after {chain[mixed].kind!r}, which has mixed the "
                        "channels that it works on: list it before."
                    )
            for i, spec in enumerate(chain):
                spec.check_chain(side, chain[:i], chain[i + 1 :])
        self._check_places()

    def _check_places(self) -> None:
        for spec in self.value:
            if spec.at is not None:
                raise RecipeError(
                    f"value transform {spec.kind!r} has at={spec.at!r}, and values have no rotary embedding: remove it."
                )
        place, first = PLACES[0], None
        for spec in self.key:
            own = spec.at or place
            if first is not None and own != place:
                raise RecipeError(
                    f"key transform {spec.kind!r} at {own} comes after {first.kind!r} at {place}: what follows a step "
                    f"acts where it does, so list it before, or leave its 'at' out."
                )
            if own != PLACES[0] and spec.why_not_framed:
                raise RecipeError(
                    f"key transform {spec.kind!r} stands after RoPE, because it {spec.why_not_framed}: list it before "
                    f"the steps at {own}."
                )
            if first is None and own != PLACES[0]:
                place, first = own, spec
        for spec in self.key[: len(self.key) - self.framed_steps] if first else ():
            if not spec.commutes_with_rope:
                raise RecipeError(
                    f"key transform {spec.kind!r} after RoPE and {first.kind!r} at {place} exclude each other, because "
                    f"it does not commute with the rotary embedding: give it 'at: {place}' too."
                )

    @property
    def framed_steps(self) -> int:
        """How many of the last steps of keys do not act after RoPE."""
        return next((len(self.key) - i for i, spec in enumerate(self.key) if spec.at not in (None, PLACES[0])), 0)

    def codec_steps(self, side: str) -> int:
        """How many of the last steps of a side act on what the codec stores, and leave exact tokens alone."""
        chain = getattr(self, side)
        first = next((i for i, spec in enumerate(chain) if spec.loses), len(chain))
        return max(len(chain) - first, self.framed_steps if side == "key" else 0)

    def width(self, side: str, head_dim: int) -> int:
        """Channels of a head that the codec sees."""
        for spec in getattr(self, side):
            head_dim = spec.width(head_dim)
        return head_dim

    @property
    def key_place(self) -> str:
        """Where the last step of keys acts."""
        return self.key[-self.framed_steps].at if self.framed_steps else PLACES[0]

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        sides = {side: [spec.to_dict() for spec in getattr(self, side)] for side in SIDES}
        return {side: specs for side, specs in sides.items() if specs}


def build_transforms(data: Any, where: str) -> Transforms:
    """``{"key": [{"kind": ...}], "value": [...]}`` to Transforms."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}, not a mapping: write it as '{{key: [{{kind: hadamard}}]}}'.")
    refuse_unknown(data, SIDES, where)
    sides = {}
    for side, chain in data.items():
        if not isinstance(chain, list | tuple):
            raise RecipeError(f"{where}.{side} is {chain!r}, not a list: write it as '[{{kind: hadamard}}]'.")
        sides[side] = tuple(_parsed(step, f"{where}.{side}[{i}]") for i, step in enumerate(chain))
    try:
        return Transforms(**sides)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def needed_tensors(specs: Sequence[TransformSpec], kv_heads: int, head_dim: int) -> dict[str, Artefact]:
    """By name, ``transforms.{i}.{what}``, what the steps of one side of one layer need."""
    found = {}
    for i, spec in enumerate(specs):
        found |= {f"transforms.{i}.{name}": own for name, own in spec.artefacts(kv_heads, head_dim).items()}
        head_dim = spec.width(head_dim)
    return found


def build_chain(
    specs: Sequence[TransformSpec],
    head_dim: int,
    artefacts: Mapping[str, torch.Tensor] | None = None,
    folded: int = 0,
) -> Chain:
    """Build the transforms of one side of one layer, for all its KV heads.

    artefacts   what calibration made, by the names of ``needed_tensors``.
    folded      how many of the first steps the model's weights have taken over.

    Raises RecipeError for a step that does not fit the head dimension, or that lacks its tensors.
    """
    steps = []
    for i, spec in enumerate(specs):
        prefix = f"transforms.{i}."
        found = {name: artefacts[prefix + name] for name in spec.tensors if prefix + name in (artefacts or {})}
        if len(found) < len(spec.tensors):
            raise RecipeError(
                f"transform {spec.kind!r} needs statistics of this model: run 'kvq calibrate MODEL --for RECIPE -o "
                "STATS' and pass --stats STATS."
            )
        steps.append(spec.build(head_dim, found))
        head_dim = spec.width(head_dim)
    return Chain(tuple(steps), folded)
