"""Recipes: what kvq does to a model's KV cache, as frozen, validated data.

A recipe names a codec for keys and one for values, the transforms before them, the tokens that stay exact, and
overrides by layer and head.
Recipes are YAML files (``kvq/recipes/*.yaml``); this module reads, checks, overrides and hashes them. It knows no
tensors and no models, except that ``Recipe.for_head`` answers what a given layer and head gets.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kvq.codecs.spec import CodecSpec, merge_codec, parse_codec
from kvq.errors import RecipeError, suggest
from kvq.heads import HeadSpec, TokenPolicy
from kvq.recipes import CALIBRATED, CONTEXTS, list_recipes, recipe_text
from kvq.settings import build, read_yaml, refuse_unknown
from kvq.transforms import Transforms, build_transforms

_LAYER_PATTERN = re.compile(r"^[-\d,]+(/[\d,-]+)?$")
_PARTS = ("key", "value", "tokens", "transforms")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named KV-cache recipe. ``layers`` maps a pattern ('0-1', '3,5', '-1', '2/0-1' for heads) to overrides."""

    name: str
    key: CodecSpec
    value: CodecSpec
    tokens: TokenPolicy = field(default_factory=TokenPolicy)
    transforms: Transforms = field(default_factory=Transforms)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    summary: str = ""
    paper: str = ""

    def __post_init__(self):
        # It stands in headings, tables and front matter of cards, and in names of files.
        if not self.name.isprintable() or len(self.name) > 500 or set(self.name) & set("`|<>"):
            raise RecipeError(f"name={self.name[:60]!r} is no name of a recipe: use one line without any of ` | < >.")
        base = self._base
        for pattern, override in self.layers.items():
            if not isinstance(pattern, str) or not _LAYER_PATTERN.match(pattern):
                raise RecipeError(
                    f"layer pattern {pattern!r} is not understood: write layers as '0-1', '3,5' or '-1', "
                    "and heads after a slash, as in '2/0-1'."
                )
            layers, _, heads = pattern.partition("/")
            # The number of layers is not known yet; any large one shows whether the pattern can be read at all.
            _indices(layers, 1 << 20, pattern)
            if heads:
                _indices(heads, None, pattern)
                if isinstance(override, Mapping) and "transforms" in override:
                    raise RecipeError(
                        f"layers[{pattern!r}] gives heads transforms of their own, and the heads of a layer share "
                        f"them: write the pattern without heads, as {layers!r}."
                    )
            self._overridden(base, pattern, override)

    @cached_property
    def _base(self) -> HeadSpec:
        return HeadSpec(key=self.key, value=self.value, tokens=self.tokens, transforms=self.transforms)

    @staticmethod
    def _overridden(spec: HeadSpec, pattern: str, override: Mapping[str, Any]) -> HeadSpec:
        where = f"layers[{pattern!r}]"
        if not isinstance(override, Mapping) or not override:
            raise RecipeError(f"{where} is empty: give it {', '.join(map(repr, _PARTS))}, or remove it.")
        refuse_unknown(override, _PARTS, where)
        parts = {"tokens": spec.tokens, "transforms": spec.transforms}
        if "transforms" in override:
            own = build_transforms(override["transforms"], f"{where}.transforms")
            given = override["transforms"]
            parts["transforms"] = Transforms(
                **{side: getattr(own if side in given else spec.transforms, side) for side in ("key", "value")}
            )
        if "tokens" in override:
            if not isinstance(override["tokens"], Mapping):
                raise RecipeError(
                    f"{where}.tokens is {override['tokens']!r}, not a mapping: write it as '{{window: 64}}'."
                )
            parts["tokens"] = build(TokenPolicy, spec.tokens.to_dict() | dict(override["tokens"]), f"{where}.tokens")
        for side in ("key", "value"):
            parts[side] = getattr(spec, side)
            if side in override:
                parts[side] = merge_codec(parts[side], override[side], f"{where}.{side}")
        return HeadSpec(**parts)

    def for_head(self, layer: int, head: int, num_layers: int) -> HeadSpec:
        """Return what KV head ``head`` of layer ``layer`` gets; later patterns win over earlier ones."""
        spec = self._base
        for pattern, override in self.layers.items():
            layers, _, heads = pattern.partition("/")
            named = layer in _indices(layers, num_layers, pattern)
            if named and (not heads or head in _indices(heads, None, pattern)):
                spec = self._overridden(spec, pattern, override)
        return spec

    def head_groups(self, layer: int, heads: int, num_layers: int) -> tuple[tuple[HeadSpec, tuple[int, ...]], ...]:
        """The KV heads of a layer that are stored alike, in order of their first head."""
        groups: dict[HeadSpec, list[int]] = {}
        for head in range(heads):
            groups.setdefault(self.for_head(layer, head, num_layers), []).append(head)
        return tuple((spec, tuple(own)) for spec, own in groups.items())

    def check_patterns(self, num_layers: int, heads_of: Mapping[int, int]) -> None:
        """Refuse a pattern that names no quantizable layer. ``heads_of``: KV heads by quantizable layer index."""
        for pattern in self.layers:
            layers, _, heads = pattern.partition("/")
            hit = [i for i in _indices(layers, num_layers, pattern) if i in heads_of]
            if heads:
                hit = [i for i in hit if any(h < heads_of[i] for h in _indices(heads, None, pattern))]
            if not hit:
                known = f"layers {min(heads_of)} to {max(heads_of)}" if heads_of else "no layer"
                raise RecipeError(
                    f"layer pattern {pattern!r} matches nothing: this model has {known} with a quantizable cache."
                )

    def to_dict(self) -> dict[str, Any]:
        """Canonical form: every setting that counts, in a fixed order."""
        data = {
            "name": self.name,
            "summary": self.summary,
            "paper": self.paper,
            "tokens": self.tokens.to_dict(),
            "key": self.key.to_dict(),
            "value": self.value.to_dict(),
            "transforms": self.transforms.to_dict(),
            "layers": {p: {k: dict(v) for k, v in o.items()} for p, o in self.layers.items()},
        }
        return {k: v for k, v in data.items() if v not in ("", {}) or k in ("key", "value")}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100)

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical form without name, summary and paper: equal hashes store equal bytes."""
        data = {k: v for k, v in self.to_dict().items() if k not in ("name", "summary", "paper")}
        if "layers" in data:
            # The order of the patterns decides who wins, so it is part of the identity.
            data["layers"] = list(data["layers"].items())
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @property
    def is_bound_to_positions(self) -> bool:
        """True if some part is fitted to keys after RoPE, and so suits the positions of the calibration text alone."""
        base = self._base
        heads = [base, *(self._overridden(base, pattern, own) for pattern, own in self.layers.items())]
        return any(head.is_bound_to_positions for head in heads)

    @property
    def is_exact(self) -> bool:
        """True if nothing is quantized anywhere (the fp16 control)."""
        return self._base.is_exact and not any("key" in o or "value" in o for o in self.layers.values())

    def override(self, settings: Mapping[str, Any]) -> "Recipe":
        """Return a copy with dotted settings replaced, e.g. ``{"key.bits": 4, "layers.0-1.key.bits": 8}``.

        If it stores other bytes, its name says what was changed, ``kivi2+key.bits=4``, and its summary, which was
        written for another recipe, gives way to that.
        """
        data = self.to_dict()
        for dotted, value in settings.items():
            parts = dotted.split(".")
            if parts[0] == "layers" and len(parts) == 4:
                layer = data.setdefault("layers", {}).setdefault(parts[1], {})
                layer.setdefault(parts[2], {})[parts[3]] = value
            elif parts[0] in ("key", "value") and len(parts) == 2:
                target = {parts[1]: value}
                data[parts[0]] = (
                    merge_codec(getattr(self, parts[0]), target, dotted).to_dict()
                    if parts[1] == "codec"
                    else {**data[parts[0]], **target}
                )
            elif parts[0] in ("tokens", "transforms") and len(parts) == 2:
                data.setdefault(parts[0], {})[parts[1]] = value
            else:
                raise RecipeError(
                    f"setting {dotted!r} is not understood: use key.*, value.*, tokens.*, transforms.key or "
                    "layers.PATTERN.key.*, for example key.bits=4."
                )
        changed = parse_recipe(data, source=self.name)
        if changed.hash == self.hash:
            return changed
        told = [f"{dotted}={_setting_text(value)}" for dotted, value in settings.items()]
        name = f"{self.name}{',' if '+' in self.name else '+'}{','.join(told)}"
        return dataclasses.replace(changed, name=name, summary=f"{self.name} with {', '.join(told)}")


def _setting_text(value: Any) -> str:
    """A setting's value as a name can hold it: YAML's words, on one line and without spaces."""
    return re.sub(r"\s+", "", value if isinstance(value, str) else json.dumps(value, default=str))


def _indices(text: str, count: int | None, pattern: str) -> set[int]:
    """Expand '0-1,5,-1'; a leading minus counts from the end when ``count`` is known."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part)
        if not match or (count is None and part.startswith("-")):
            raise RecipeError(f"layer pattern {pattern!r} is not understood at {part!r}: write '0-1', '3,5' or '-1'.")
        first = int(match[1])
        if first < 0:
            if match[2]:
                raise RecipeError(f"layer pattern {pattern!r}: a range cannot start from the end; list the layers.")
            first += count
        last = int(match[2]) if match[2] else first
        if last < first:
            raise RecipeError(f"layer pattern {pattern!r}: {part!r} runs backwards; write the smaller number first.")
        found.update(range(first, last + 1))
    return found


def numbers_text(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5': a pattern that names these layers or heads."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_recipe(data: Any, source: str) -> Recipe:
    """Build a recipe from plain data. ``source`` names it in error messages."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"recipe {source!r} is not a mapping: see 'kvq recipes show kivi2' for the form.")
    known = *(f.name for f in dataclasses.fields(Recipe)), CONTEXTS
    refuse_unknown(data, known, f"recipe {source!r}")
    for name in ("name", "key", "value"):
        if name not in data:
            raise RecipeError(f"recipe {source!r} lacks {name!r}: see 'kvq recipes show kivi2' for the form.")
    for name in ("name", "summary", "paper"):
        if not isinstance(data.get(name, ""), str):
            raise RecipeError(f"recipe {source!r}: {name} is {data[name]!r}, not text: put it in quotes.")
    layers = data.get("layers") or {}
    if not isinstance(layers, Mapping):
        raise RecipeError(
            f"recipe {source!r}: layers is {layers!r}, not a mapping of patterns: write '\"0-1\": {{...}}'."
        )
    recipe = Recipe(
        name=data["name"],
        summary=data.get("summary", ""),
        paper=data.get("paper", ""),
        key=parse_codec(data["key"], f"recipe {source!r}: key"),
        value=parse_codec(data["value"], f"recipe {source!r}: value"),
        tokens=build(TokenPolicy, data.get("tokens") or {}, f"recipe {source!r}: tokens"),
        transforms=build_transforms(data.get("transforms") or {}, f"recipe {source!r}: transforms"),
        layers={str(p): o for p, o in layers.items()},
    )
    if CONTEXTS in data and (data[CONTEXTS] == CALIBRATED) != recipe.is_bound_to_positions:
        told = f"leave {CONTEXTS} out" if not recipe.is_bound_to_positions else f"write '{CONTEXTS}: {CALIBRATED}'"
        raise RecipeError(f"recipe {source!r}: {CONTEXTS} is {data[CONTEXTS]!r}, its steps say otherwise: {told}.")
    return recipe


def load_recipe(name_or_path: "str | Path | Recipe") -> Recipe:
    """Load a shipped recipe by name, or a recipe file by path; a Recipe is returned as it is."""
    if isinstance(name_or_path, Recipe):
        return name_or_path
    text = str(name_or_path)
    if text in list_recipes():
        source = recipe_text(text)
    elif Path(text).is_file():
        try:
            source = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {text!r} cannot be read: {error}.") from None
    elif text.endswith((".yaml", ".yml")) or "/" in text:
        raise RecipeError(f"recipe file {text!r} does not exist: check the path, or use a shipped recipe by name.")
    else:
        raise RecipeError(f"unknown recipe {text!r}.{suggest(text, list_recipes())}")
    return parse_recipe(read_yaml(source, f"recipe file {text!r}"), source=text)
