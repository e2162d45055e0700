"""One forward of a model's decoder over a batch, watched; and what its layers let be measured."""

import functools
import inspect
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from kvq.calib.attention import AttentionOptions
from kvq.calib.needs import WINDOW_NEEDS
from kvq.calib.observe import Batch, LayerPlan, Observer
from kvq.calib.stats import LayerStats
from kvq.calib.watch import Watcher, watch
from kvq.errors import UnsupportedModelError
from kvq.models.decoder import decoder_of, telling
from kvq.models.describe import ModelSpec
from kvq.models.rope import Rope, rope_of

# Keys at these positions tell whether and how keys are rotated.
LOOK_POSITIONS = (0, 7)
_TURNED = ("key_pre.", "key_page.", "query_pre.")
_WEIGHTED = ("value.weighted_moments", "sinks")


def measure(model: PreTrainedModel, batch: Batch, layers: Mapping[int, LayerPlan]) -> dict[int, LayerStats]:
    """Statistics of one batch by layer, on the CPU. Raises DataError for numbers that are not finite."""
    observer = Observer(batch, layers)
    with telling(model, 1, len(batch.tokens)):
        run(model, observer, batch.tokens, batch.valid, batch.positions)
    return observer.result()


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    watcher: Watcher,
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    positions: torch.Tensor,
) -> None:
    """Run the decoder over tokens [B, T], and show it to ``watcher``.

    The decoder alone: logits of a large vocabulary cost more than the measuring.
    """
    device = model.get_input_embeddings().weight.device
    decoder = decoder_of(model)
    inputs = {"input_ids": tokens.to(device)}
    if valid is not None:
        inputs["attention_mask"] = valid.long().to(device)
    # Families without positions (ALiBi) do not take them.
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        inputs["position_ids"] = positions.expand(len(tokens), -1).to(device)
    with watch(model, watcher) as cache:
        decoder(**inputs, past_key_values=cache, use_cache=True)


class Look(Watcher):
    """A watcher that notes what each layer shows."""

    def __init__(self, indices):
        self.layers = dict.fromkeys(indices)
        self.keys: dict[int, torch.Tensor] = {}
        self.options: dict[int, AttentionOptions] = {}
        self.hidden: dict[int, int] = {}

    def saw_cache(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.keys[index] = key

    def saw_attention(self, index: int, query: torch.Tensor, options: AttentionOptions) -> None:
        self.options[index] = options

    def saw_hidden(self, index: int, hidden: torch.Tensor) -> None:
        self.hidden[index] = hidden.ndim


def look(model: PreTrainedModel, tokens: torch.Tensor, indices) -> tuple[Look, Look]:
    """Two forwards of lone tokens [P, 1], at position 0 and at a later one.

    A lone token attends to itself with the same weight wherever it stands, so both forwards have the same hidden states
    and their keys differ by the rotary embedding alone.
    """
    looks = Look(indices), Look(indices)
    for watcher, position in zip(looks, LOOK_POSITIONS):
        run(model, watcher, tokens, None, torch.full((1, 1), position))
    return looks


def plan_layers(
    spec: ModelSpec, looks: tuple[Look, Look], needs: frozenset[str], capacities: Mapping[int, int]
) -> dict[int, LayerPlan]:
    """What can be measured on each layer that the looks saw, of what is needed. ``capacities``: of reservoirs, in
    bytes. Of sliding-window layers only ``WINDOW_NEEDS``.

    Raises UnsupportedModelError if a layer never wrote to its cache.
    """
    near, far = looks
    plans = {}
    windows = {layer.index for layer in spec.layers if layer.kind == "sliding"}
    ropes = functools.cache(lambda: rope_of(spec.config))
    for index in near.layers:
        if index not in near.keys:
            raise UnsupportedModelError(
                f"layer {index} of this {spec.model_type!r} never wrote to the cache it was given, so its keys and "
                "values cannot be measured: this model cannot be calibrated."
            )
        if index in windows:
            if needs & WINDOW_NEEDS:
                plans[index] = LayerPlan(needs=needs & WINDOW_NEEDS)
            continue
        rope, missing = None, _unseen(near, index)
        if any(need.startswith(_TURNED) for need in needs):
            rope, why = _rotation(spec, near.keys[index], far.keys[index], ropes)
            # Why queries are not seen at all is said first.
            missing = missing | dict.fromkeys(_TURNED, why) | missing if why else missing
        plans[index] = LayerPlan(
            needs=frozenset(need for need in needs if not _reason(missing, need)),
            rope=rope,
            missing={need: _reason(missing, need) for need in needs if _reason(missing, need)},
            capacity=capacities.get(index, 0),
        )
    return plans


def _rotation(spec: ModelSpec, near: torch.Tensor, far: torch.Tensor, ropes) -> tuple[Rope | None, str]:
    """The rotary embedding between the keys of the same tokens at LOOK_POSITIONS, or why it is not known."""
    tolerance = 1e-3 if near.dtype in (torch.float32, torch.float64) else 3e-2
    near, far = near.double(), far.double()

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return float((a - b).norm()) <= tolerance * float(b.norm())

    if same(far, near):
        return None, ""
    try:
        rope = ropes()
    except UnsupportedModelError as error:
        return None, str(error)
    positions = [torch.full((1, 1), position, device=near.device) for position in LOOK_POSITIONS]
    if same(rope.inverse(far, positions[1]), rope.inverse(near, positions[0])):
        return rope, ""
    return None, f"keys of {spec.model_type!r} are changed after RoPE, so it cannot be undone."


def _unseen(near: Look, index: int) -> dict[str, str]:
    """Beginnings of needs that a layer does not show, and why."""
    missing = {}
    if near.hidden.get(index) != 3:
        missing["massive"] = "the decoder layers of this model do not take plain hidden states."
    if index not in near.options:
        why = "the attention of this model does not go through the attention interface of transformers."
        return missing | dict.fromkeys(("query.", "query_pre.", "reservoir", *_WEIGHTED), why)
    if near.options[index].unknown:
        why = f"the attention of this model takes {near.options[index].unknown[0]!r}, which changes its weights."
        missing |= dict.fromkeys(_WEIGHTED, why)
    return missing


def _reason(missing: Mapping[str, str], need: str) -> str:
    return next((why for start, why in missing.items() if need.startswith(start)), "")
