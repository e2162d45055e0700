"""The search space: families of transforms and codecs, expanded into options of each side.

A space is data (``space.yaml`` is the default): lists of families for keys and for values, and token policies. Options
that a recipe may not hold, that do not fit the model, or that need statistics that are not there, are left out, and
each leaving out is kept with its reason.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from kvq.cache import make_plan
from kvq.calib.stats import Stats
from kvq.codecs import CodecSpec, codec_spec, parse_codec
from kvq.errors import DataError, KvqError, RecipeError
from kvq.heads import TokenPolicy
from kvq.models.describe import ModelSpec
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe
from kvq.settings import build, read_yaml, refuse_unknown
from kvq.transforms import Transforms, build_transforms

# What stands on the side that an option leaves alone, where a plan needs something there.
PARTNER = codec_spec(codec="affine", bits=8, axis="token", group="head")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store one side. ``chain`` is its transforms as plain data; ``name`` is unique within its side.

    Options of one ``family`` differ in settings alone.
    """

    side: str
    name: str
    family: str
    codec: CodecSpec
    chain: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def recipe(self, tokens: TokenPolicy, partner: "Option | None" = None) -> Recipe:
        """A recipe with this option in every layer, and ``partner`` (or plain 8-bit codes) on the other side."""
        other = SIDES[1 - SIDES.index(self.side)]
        chains = {self.side: list(self.chain), other: list(partner.chain) if partner else []}
        return Recipe(
            name=self.name if partner is None else f"{self.name} + {partner.name}",
            tokens=tokens,
            transforms=build_transforms(chains, self.name),
            **{self.side: self.codec, other: partner.codec if partner else PARTNER},
        )

    def transforms(self) -> Transforms:
        return build_transforms({self.side: list(self.chain)}, self.name)


@dataclass(frozen=True, kw_only=True)
class Space:
    """``options`` of both sides, token policies, and what was left out: name -> reason."""

    options: Mapping[str, tuple[Option, ...]]
    tokens: tuple[TokenPolicy, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def of(self, side: str) -> tuple[Option, ...]:
        return self.options[side]

    def named(self, side: str, name: str) -> Option:
        return next(option for option in self.options[side] if option.name == name)


def load_space(source: str | Path | None = None) -> dict[str, Any]:
    """Read a space as plain data; None: the default. Raises RecipeError for a file that is not one."""
    if source is None:
        return yaml.safe_load(resources.files("kvq.searching").joinpath("space.yaml").read_text())
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"search space {str(source)!r} cannot be read: {error}.") from None
    data = read_yaml(text, f"search space {str(source)!r}")
    if not isinstance(data, Mapping):
        raise RecipeError(f"search space {str(source)!r} is not a mapping: give it key, value and tokens.")
    return dict(data)


def expand(
    data: Mapping[str, Any], model: ModelSpec, stats: Stats | None = None, *, sees_exact_tokens: bool = False
) -> Space:
    """Make the options of a space for a model.

    sees_exact_tokens   the budget counts exact tokens, so that all token policies are tried; else only the first.

    Raises RecipeError for data that are no space, or if a side has no option left.
    """
    refuse_unknown(data, ("key", "value", "tokens"), "search space")
    policies = [build(TokenPolicy, row, "search space: tokens") for row in data.get("tokens") or [{}]]
    left_out: dict[str, str] = {}
    if not sees_exact_tokens:
        for policy in policies[1:]:
            left_out[f"tokens {policy.to_dict()}"] = "an asymptotic budget does not count exact tokens"
        policies = policies[:1]
    options = {}
    for side in SIDES:
        found: dict[str, Option] = {}
        for family in data.get(side) or ():
            for option, why in _family(side, family, model, stats, policies):
                if why:
                    left_out[f"{side} {option}"] = why
                elif all(option.codec != o.codec or option.chain != o.chain for o in found.values()):
                    found[option.name] = option
        if not found:
            reason = next((why for name, why in left_out.items() if name.startswith(side)), "the space names none")
            raise RecipeError(f"the search space has no option for {side}s on this model: {reason}")
        options[side] = tuple(found.values())
    return Space(options=options, tokens=tuple(policies), left_out=left_out)


def _family(side, family, model, stats, policies: Sequence[TokenPolicy]):
    """(option, None) for each member of a family, or (its name, why it is left out)."""
    if not isinstance(family, Mapping):
        raise RecipeError(f"search space: a family of {side}s is {family!r}, not a mapping: give it name and codec.")
    refuse_unknown(family, ("name", "transforms", "codec", "vary"), f"search space: family of {side}s")
    vary = family.get("vary") or {}
    if not isinstance(vary, Mapping) or not all(isinstance(values, list) for values in vary.values()):
        raise RecipeError(f"search space: vary of {family.get('name')!r} is no mapping of settings to lists: mend it.")
    chain = tuple(family.get("transforms") or ())
    for values in itertools.product(*vary.values()):
        own = _resolved(dict(zip(vary, values)))
        name = " ".join([str(family.get("name")), *(f"{key}={_short(value)}" for key, value in own.items())])
        try:
            codec = parse_codec({**family["codec"], **own}, name)
            option = Option(side=side, name=name, family=str(family.get("name")), chain=chain, codec=codec)
            _check(option, model, stats, policies)
        except (KvqError, KeyError) as error:
            yield name, f"{error}"
        else:
            yield option, None


def _check(option: Option, model: ModelSpec, stats: Stats | None, policies: Sequence[TokenPolicy]) -> None:
    """Refuse what no recipe may hold, or what this model or these statistics do not allow."""
    if option.chain and stats is None and any(step.tensors for step in getattr(option.transforms(), option.side)):
        raise DataError("its transforms need statistics: pass --stats")
    if option.codec.is_exact:
        raise RecipeError("one exact side beside a quantized one is not stored")
    for policy in policies:
        recipe = option.recipe(policy)
        if not (option.chain or option.codec.is_calibrated):
            make_plan(recipe, model)


def _resolved(own: dict[str, Any]) -> dict[str, Any]:
    """A clip that is given by bits, as a number or as one for each tier."""
    clip, bits = own.get("clip"), own.get("bits")
    if not isinstance(clip, Mapping):
        return own
    return own | {"clip": [clip.get(b, 1.0) for b in bits] if isinstance(bits, list) else clip.get(bits, 1.0)}


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
