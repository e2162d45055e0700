"""From recipe and model to what each layer stores: codecs, transforms, flush rules, page layouts, and their bytes."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from kvq.cache.policy import flush_rule
from kvq.cache.tail import HEADROOM
from kvq.codecs import Codec, CodecSpec
from kvq.errors import RecipeError, UnsupportedModelError
from kvq.heads import HeadSpec
from kvq.models.architecture import Attention, describe_attention
from kvq.models.describe import LayerSpec, ModelSpec
from kvq.models.rope import Rope, rope_of
from kvq.pages.flush import FlushRule
from kvq.pages.layout import SIDES, PageLayout
from kvq.recipe import Recipe
from kvq.transforms import Chain, Transforms, TransformSpec, build_chain
from kvq.transforms.frame import FRAME_TOKENS, Frame, block_origins
from kvq.transforms.rope_bias import RopeOffset


@dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """KV heads of one layer that are stored alike: their indices, codecs, rules and page layout.

    chains   transforms of keys and values; everything that is stored, exact tokens included, is in their basis.
    frame    set if the codec sees keys elsewhere than where exact ones are stored: relative to their block, before the
             rotary embedding, without the rotated bias of their projection, or with fewer channels. ``enter`` leads to
             the codec, ``leave`` back from it. value_frame: the same of values.
    by_head  every head has page tables and lengths of its own, and pages hold one head: heads may then keep different
             tokens. Raises RecipeError where heads share numbers, or where their numbers depend on the head.
    """

    heads: tuple[int, ...]
    head_dim: int
    sinks: int
    codecs: Mapping[str, Codec]
    rules: Mapping[str, FlushRule]
    layout: PageLayout
    chains: Mapping[str, Chain]
    frame: Frame | RopeOffset | None = None
    value_frame: Frame | None = None
    by_head: bool = False

    def __post_init__(self):
        own = isinstance(self.frame, RopeOffset) or any(
            frame is not None and bool(frame.chain) for frame in self.frames
        )
        names_heads = own or any(codec.names_heads for codec in self.codecs.values())
        if self.by_head and len(self.heads) > 1 and (names_heads or self.layout.shared_bytes):
            raise RecipeError(
                f"heads {self.heads} share numbers, or each has static ones of its own, so they cannot be stored by "
                "head: make each a group, or choose codecs that see one head (no permute, no group of a whole token, "
                "no calibrated ranges of channels)."
            )

    def round_trip(self, side: str, x: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the cache gives back for x [B, K, t, D], whole blocks from the body on, in the basis of the chain.

        positions   [B or 1, t] rotary positions, which matter in a frame. ``dtype``: of what is decoded.
        """
        codec, frame = self.codecs[side], self.frame if side == "key" else self.value_frame
        if frame is None:
            return codec.decode(codec.encode(x), dtype)
        origins = block_origins(positions, frame.block)
        return frame.leave(codec.decode(codec.encode(frame.enter(x, origins)), dtype), origins)

    def predicted_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of one sequence of ``tokens`` tokens: whole pages, exact tokens and their headroom.

        ``itemsize``: bytes per number of the model's dtype.
        """
        numbers = len(self.heads) * self.head_dim
        pages = -(-max(rule.packed(tokens) for rule in self.rules.values()) // self.layout.page_tokens)
        total = pages * (self.layout.record_bytes * len(self.heads) + self.layout.shared_bytes)
        for rule in self.rules.values():
            exact = max(0, tokens - self.sinks) - rule.packed(tokens)
            total += (exact + HEADROOM + self.sinks) * numbers * itemsize
        return total

    @property
    def frames(self) -> tuple[Frame | RopeOffset | None, Frame | None]:
        """Of keys and of values."""
        return self.frame, self.value_frame

    @property
    def loses(self) -> bool:
        """Whether pages hold fewer channels than the model's, or channels of all heads together."""
        return any(isinstance(frame, Frame) and frame.loses for frame in self.frames)

    @property
    def bits_per_element(self) -> float:
        """Asymptotic bits per number of the model: what a full page costs, padding included, both sides averaged."""
        return self.layout.bits_per_element(len(self.heads)) * self.layout.key.head_dim / self.head_dim


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What a recipe does to a model: head groups by layer index; a layer that is absent keeps its plain cache.

    chains   by layer and side, the transforms of all KV heads of the layer, those in a frame of keys left out.
    framed   by layer and side, how many of the last transforms leave exact tokens alone.
    folded   likewise, how many of the first transforms the model's weights have taken over; what is absent is 0.
    """

    recipe: Recipe
    model: ModelSpec
    layers: Mapping[int, tuple[HeadGroup, ...]]
    chains: Mapping[int, Mapping[str, Chain]] = field(default_factory=dict)
    folded: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    framed: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def predicted_bytes(self, tokens: int, itemsize: int | None = None) -> int:
        """Cache bytes of one sequence of ``tokens`` tokens over all layers, plain and sliding ones included."""
        itemsize = itemsize or self.model.dtype.itemsize
        total = 0
        for layer in self.model.layers:
            if layer.index in self.layers:
                total += sum(group.predicted_bytes(tokens, itemsize) for group in self.layers[layer.index])
            else:
                kept = tokens if layer.window is None else min(tokens, layer.window - 1)
                total += 2 * kept * layer.kv_heads * layer.head_dim * itemsize
        return total

    def elements(self, tokens: int) -> int:
        """Numbers that an exact cache of the full-attention layers would hold."""
        return sum(2 * tokens * layer.kv_heads * layer.head_dim for layer in self.model.full_layers)

    @property
    def needs_positions(self) -> bool:
        """True if some keys are stored in a frame that positions decide."""
        return any(group.frame is not None for groups in self.layers.values() for group in groups)

    def transforms_of(self, layer: int, side: str) -> tuple[TransformSpec, ...]:
        """Of a layer that is quantized, folded ones and those in a frame included."""
        return getattr(self.recipe.for_head(layer, 0, len(self.model.layers)).transforms, side)

    @property
    def has_transforms(self) -> bool:
        return any(self.transforms_of(layer, side) for layer in self.layers for side in SIDES)

    @property
    def bits_per_element(self) -> float:
        """Asymptotic bits per number over the full-attention layers; exact ones count 16, as what they are
        compared with."""
        total, numbers = 0.0, 0
        for layer in self.model.full_layers:
            size = layer.kv_heads * layer.head_dim
            groups = self.layers.get(layer.index, ())
            stored = sum(len(g.heads) * layer.head_dim * g.bits_per_element for g in groups)
            total += stored if groups else size * 16
            numbers += size
        return total / numbers


def make_plan(
    recipe: Recipe,
    model: ModelSpec,
    artefacts: Mapping[str, torch.Tensor] | None = None,
    folded: Mapping[int, Mapping[str, int]] | None = None,
) -> CachePlan:
    """Resolve a recipe against a model.

    artefacts   tensors by name that calibration made for the recipe (see ``kvq.calib.artefacts``).
    folded      transforms that the model's weights have taken over, as ``kvq.transforms.fold_plan`` decided.

    Raises RecipeError for a pattern that matches nothing, a group that does not divide, a transform that this model
    does not undo, or missing artefacts.
    """
    # While transformers loads a model, what is made without a device would be made on the meta device.
    with torch.device("cpu"):
        return _make_plan(recipe, model, artefacts or {}, folded or {})


def _make_plan(recipe: Recipe, model: ModelSpec, artefacts, folded) -> CachePlan:
    count = len(model.layers)
    recipe.check_patterns(count, {layer.index: layer.kv_heads for layer in model.full_layers})
    layers, chains, framed = {}, {}, {}
    ropes = _ropes(model)
    for layer in model.full_layers:
        groups = recipe.head_groups(layer.index, layer.kv_heads, count)
        if any(spec.is_exact for spec, _ in groups) and len(groups) > 1:
            raise RecipeError(
                f"layer {layer.index} mixes exact and quantized heads: keep the whole layer exact, or give its heads "
                "8 bits."
            )
        if not groups[0][0].is_exact:
            # The heads of a layer share their transforms.
            transforms = groups[0][0].transforms
            _refuse_inexact(transforms, model, layer.index)
            whole = {
                side: build_chain(
                    getattr(transforms, side),
                    layer.head_dim,
                    _of_side(artefacts, layer.index, side),
                    folded.get(layer.index, {}).get(side, 0),
                )
                for side in SIDES
            }
            framed[layer.index] = {side: groups[0][0].codec_steps(side) for side in SIDES}
            outside = {side: len(whole[side].steps) - framed[layer.index][side] for side in SIDES}
            inside = {side: Chain(whole[side].steps[outside[side] :]) for side in SIDES}
            chains[layer.index] = {side: replace(c, steps=c.steps[: outside[side]]) for side, c in whole.items()}
            layers[layer.index] = tuple(
                _head_group(spec, heads, layer, codecs, chains[layer.index], inside, ropes)
                for number, (spec, alike) in enumerate(groups)
                for heads, codecs in _stored_alike(spec, alike, layer, number, artefacts)
            )
    return CachePlan(recipe=recipe, model=model, layers=layers, chains=chains, folded=folded, framed=framed)


def check_transforms(recipe: Recipe, model: ModelSpec) -> None:
    """Refuse a recipe with a transform that this model does not undo or has nothing for, before anything is measured.

    Raises RecipeError or UnsupportedModelError.
    """
    for layer in model.full_layers:
        spec = recipe.for_head(layer.index, 0, len(model.layers))
        if spec.is_exact:
            continue
        _refuse_inexact(spec.transforms, model, layer.index)
        if not any(getattr(spec.transforms, side) for side in SIDES):
            continue
        found = describe_attention(model.config).get(layer.index)
        for side in SIDES if found else ():
            for step in getattr(spec.transforms, side):
                if step.lacking(found):
                    raise UnsupportedModelError(step.lacking(found))


def _refuse_inexact(transforms: Transforms, model: ModelSpec, index: int) -> None:
    """Refuse a step where attention does not undo it."""
    # Readers add again what a step in a frame of keys has taken away.
    chains = {side: getattr(transforms, side) for side in SIDES}
    steps = [(side, step) for side, own in chains.items() for step in own[: len(own) - transforms.codec_steps(side)]]
    if not steps:
        return
    layer = describe_attention(model.config).get(index) or Attention(index=index)
    for side, step in steps:
        reason = step.inexact(side, layer)
        if reason:
            raise RecipeError(
                f"transform {step.kind!r} of {side}s is not exact for {model.model_type!r}, whose layer {index} has "
                f"{reason}: remove it from the recipe."
            )


def _stored_alike(
    spec: HeadSpec, alike: tuple[int, ...], layer: LayerSpec, number: int, artefacts: Mapping[str, torch.Tensor]
) -> Iterator[tuple[tuple[int, ...], dict[str, Codec]]]:
    """(heads, codecs by side) of what is stored together of the heads ``alike``, group ``number`` of the layer.

    A codec has one static scale, so heads with scales of their own are stored as groups of one.
    """
    dims = {side: spec.stored_dim(side, layer.head_dim) for side in SIDES}
    needed = {side: getattr(spec, side).artefacts(dims[side], len(alike)) for side in SIDES}
    own = {side: _codec_artefacts(getattr(spec, side), needed[side], side, layer, number, artefacts) for side in SIDES}
    if spec.has_head_scales and any(part.joint for parts in needed.values() for part in parts.values()):
        raise RecipeError(
            f"layer {layer.index} has one scale a head and places of channels of all its heads (permute), and heads "
            "with scales of their own are stored apart: use granularity tensor."
        )
    parts = [(head,) for head in alike] if spec.has_head_scales else [alike]
    for heads in parts:
        places = [alike.index(head) for head in heads]
        codecs = {}
        for side in SIDES:
            given = {w: tensor[places] if needed[side][w].by_head else tensor for w, tensor in own[side].items()}
            try:
                codecs[side] = getattr(spec, side).build(dims[side], given, len(heads))
            except RecipeError as error:
                raise RecipeError(f"{error}{_smaller_group(getattr(spec, side), side, dims[side])}") from None
        yield heads, codecs


def _smaller_group(spec: CodecSpec, side: str, head_dim: int) -> str:
    """How to set the largest group of channels that divides the head, if that is what a codec lacks."""
    group = getattr(spec, "group", None)
    fits = [g for g in (64, 32, 16) if head_dim % g == 0]
    if getattr(spec, "axis", "token") != "token" or not isinstance(group, int) or not head_dim % group or not fits:
        return ""
    return f" (--set {side}.group={fits[0]})"


def _codec_artefacts(spec: CodecSpec, needed, side: str, layer: LayerSpec, number: int, artefacts):
    """What calibration made for the codec of these heads, by what it is."""
    found = {}
    for what in needed:
        name = artefact_name(layer.index, side, what, number)
        if name not in artefacts:
            raise RecipeError(_missing(spec, side, layer.index))
        found[what] = artefacts[name]
    return found


def _head_group(
    spec: HeadSpec, heads: tuple[int, ...], layer: LayerSpec, codecs, chains, inside: Mapping[str, Chain], ropes
) -> HeadGroup:
    chains = {side: chain.of_heads(heads) for side, chain in chains.items()}
    page_tokens = max(codec.page_tokens for codec in codecs.values())
    return HeadGroup(
        heads=heads,
        head_dim=layer.head_dim,
        sinks=spec.tokens.sinks,
        codecs=codecs,
        rules={side: flush_rule(getattr(spec, side), spec.tokens) for side in SIDES},
        layout=PageLayout(key=codecs["key"].layout(page_tokens), value=codecs["value"].layout(page_tokens)),
        chains=chains,
        frame=_frame(spec, chains["key"], inside["key"], ropes, layer, heads),
        value_frame=_plain_frame(inside["value"], layer, heads),
    )


def _ropes(model: ModelSpec) -> Callable[[int], Rope | None]:
    """The rotary embedding of a layer's keys; None where keys are left as they are (SmolLM3, Cohere 2, EXAONE 4)."""

    @functools.cache
    def rope() -> Rope:
        return rope_of(model.config)

    def of(layer: int) -> Rope | None:
        attention = describe_attention(model.config).get(layer)
        return None if attention is not None and not attention.rotary else rope()

    return of


def _frame(spec: HeadSpec, chain: Chain, inside: Chain, ropes, layer: LayerSpec, heads) -> Frame | RopeOffset | None:
    """chain: the steps of exact keys; inside: those in the frame."""
    if spec.frame_tokens is not None:
        rope = ropes(layer.index)
        own = {"heads": len(heads), "head_dim": layer.head_dim, "chain": inside.of_heads(heads)}
        return Frame(rope=rope, block=spec.frame_tokens, **own) if rope or inside else None
    if inside:
        return _plain_frame(inside, layer, heads)
    biases = [step.offset for step in chain.steps if step.offset is not None]
    rope = ropes(layer.index) if biases else None
    return RopeOffset(rope, chain, biases[0]) if rope else None


def _plain_frame(inside: Chain, layer: LayerSpec, heads) -> Frame | None:
    """Of values, or of keys that stay rotated."""
    own = {"heads": len(heads), "head_dim": layer.head_dim, "chain": inside.of_heads(heads)}
    return Frame(rope=None, block=FRAME_TOKENS, **own) if inside else None


def _of_side(artefacts: Mapping[str, torch.Tensor], layer: int, side: str) -> dict[str, torch.Tensor]:
    """Artefacts of one layer and side, by what they are."""
    prefix = f"layers.{layer}.{side}."
    return {name.removeprefix(prefix): tensor for name, tensor in artefacts.items() if name.startswith(prefix)}


def artefact_name(layer: int, side: str, what: str, group: int = 0) -> str:
    """Name of a codec's artefact: ``layers.{i}.key.{what}``, or ``layers.{i}.key.group1.{what}`` for the heads that are
    the layer's second group.
    """
    own = f"group{group}." if group else ""
    return f"layers.{layer}.{side}.{own}{what}"


def _missing(spec: CodecSpec, side: str, layer: int) -> str:
    if spec.hint:
        unit = " ".join(f"{side}.{spec.hint}" for side in SIDES)
        return (
            f"{side}.scale=calibrated needs statistics of this model, and layer {layer} has none: run 'kvq calibrate "
            f"MODEL -o STATS' and pass --stats STATS, or set {unit}."
        )
    return (
        f"the {side} codec needs what calibration learns of this model, and layer {layer} has none: run 'kvq calibrate "
        "MODEL --for RECIPE -o STATS' and pass --stats STATS."
    )
