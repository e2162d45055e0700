"""An allocation as an ordinary recipe: what most layers have as its base, the rest as overrides by layer and head."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kvq.codecs import CodecSpec
from kvq.heads import HeadSpec
from kvq.models.describe import LayerSpec
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe, numbers_text
from kvq.searching.allocate import Allocation
from kvq.searching.space import Option, Space
from kvq.transforms import build_transforms


def recipe_of(allocation: Allocation, space: Space, layers: Mapping[int, LayerSpec], name: str, summary: str) -> Recipe:
    """The recipe that gives every layer and head what the allocation says."""
    heads = {(i, h): {} for i, layer in layers.items() for h in range(layer.kv_heads)}
    tokens, count = {}, max(layers) + 1
    for choice in allocation.choices:
        tokens[choice.entry.layer] = space.tokens[choice.entry.policy]
        for head in choice.heads:
            heads[choice.entry.layer, head][choice.entry.side] = space.named(choice.entry.side, choice.entry.option)
    base = {side: Counter(own[side] for own in heads.values()).most_common(1)[0][0] for side in SIDES}
    base_tokens = Counter(tokens.values()).most_common(1)[0][0]
    overrides: list[tuple[int, str, dict[str, Any]]] = []
    for index, layer in layers.items():
        own = {h: heads[index, h] for h in range(layer.kv_heads)}
        common = {side: Counter(o[side] for o in own.values()).most_common(1)[0][0] for side in SIDES}
        whole = _override(base, common)
        if tokens[index] != base_tokens:
            whole["tokens"] = tokens[index].to_dict()
        if whole:
            overrides.append((index, "", whole))
        parts = defaultdict(list)
        for head, options in own.items():
            part = {s: _whole_codec(base[s].codec, common[s].codec, options[s].codec) for s in SIDES}
            part = {side: codec for side, codec in part.items() if codec}
            if part:
                parts[repr(part)].append((head, part))
        overrides += [(index, numbers_text([h for h, _ in rows]), rows[0][1]) for rows in parts.values()]
    recipe = Recipe(
        name=name,
        summary=summary,
        tokens=base_tokens,
        transforms=build_transforms({side: list(base[side].chain) for side in SIDES}, name),
        layers=_patterns(overrides),
        **{side: base[side].codec for side in SIDES},
    )
    for (index, head), own in heads.items():
        chains = build_transforms({side: list(own[side].chain) for side in SIDES}, name)
        wanted = HeadSpec(key=own["key"].codec, value=own["value"].codec, tokens=tokens[index], transforms=chains)
        assert recipe.for_head(index, head, count) == wanted, (index, head)
    return recipe


def _override(base: Mapping[str, Option], own: Mapping[str, Option]) -> dict[str, Any]:
    """What turns ``base`` into ``own``, as a layer's override; {} if nothing does."""
    found: dict[str, Any] = {}
    for side in SIDES:
        codec = _codec_override(base[side].codec, own[side].codec)
        if codec:
            found[side] = codec
    chains = {side: [dict(step) for step in own[side].chain] for side in SIDES if own[side].chain != base[side].chain}
    if chains:
        found["transforms"] = chains
    return found


def _codec_override(base: CodecSpec, own: CodecSpec) -> dict[str, Any]:
    before, after = base.to_dict(), own.to_dict()
    if before["codec"] != after["codec"]:
        return after
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    # A setting that only the base has is taken away.
    return changed | {name: None for name in before if name not in after}


def _whole_codec(base: CodecSpec, common: CodecSpec, own: CodecSpec) -> dict[str, Any]:
    """Every setting of a head's codec: the override must make sense on the base alone, and on the layer's."""
    if own == common:
        return {}
    after = own.to_dict()
    return after | {name: None for before in (base, common) for name in before.to_dict() if name not in after}


def _patterns(overrides: Sequence[tuple[int, str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Overrides by pattern, layers with the same one together; those of heads after those of layers."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    bodies: dict[tuple, dict[str, Any]] = {}
    for index, heads, body in sorted(overrides, key=lambda row: bool(row[1])):
        key = (heads, repr(body))
        alike[key].append(index)
        bodies[key] = body
    return {
        numbers_text(indices) + (f"/{heads}" if heads else ""): bodies[heads, body]
        for (heads, body), indices in alike.items()
    }
