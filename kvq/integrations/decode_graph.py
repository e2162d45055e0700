"""Decoding by a recorded step: on CUDA, ``generate`` records the forward of one token and replays it.

Where the device steps alone (``kvq.cache.device_step``), a forward of one token does the same to the same memory each
time, so a CUDA graph of it makes the next tokens, and the host only counts along. It is recorded anew when a row takes
another page. Whatever a graph could not do is done by the model as always, and the reason is said once.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from kvq.cache import packed_layers
from kvq.errors import first_line
from kvq.models.describe import text_config
from kvq.models.rope import moving_type

logger = logging.get_logger(__name__)

# Inputs of a forward that differ from step to step, in shapes that do not.
_STEP_INPUTS = ("input_ids", "position_ids", "cache_position")
# What a forward may give.
_OUTPUTS = {"logits", "past_key_values"}

# Runs a function, or not, while what it does to a device is recorded: gives what replays it, and what it returned.
Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def record_on_cuda(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process go on with work of their own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = run()
    return graph.replay, found


# By type of device.
RECORDERS: dict[str, Recorder] = {"cuda": record_on_cuda}


class _CannotRecord(Exception):
    """The text says why."""


def why_no_graph(model: PreTrainedModel) -> str | None:
    """Why a model's steps cannot be replayed, whatever its cache, or None."""
    if "forward" in vars(model):
        return "the model's forward was replaced"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model lies on several devices"
    own = {hook.id for hook in model.kvq.hooks}
    for name, module in model.named_modules():
        if {*module._forward_hooks, *module._forward_pre_hooks} - own or hasattr(module, "_hf_hook"):
            return f"module {name or type(module).__name__!r} has a hook, which a graph would leave out"
    kind = moving_type(text_config(model.config))
    return f"RoPE of the type {kind!r} changes with the text's length" if kind else None


def why_no_steps(cache: Any) -> str | None:
    """Why a cache that has made a step cannot make the next one by itself, or None."""
    layers = packed_layers(cache)
    if len(layers) < len(cache.layers):
        return "layers that keep plain tensors grow with every token"
    if any(layer.real is not None for layer in layers):
        return "rows of different length need masks, which grow with every token"
    if any(layer.observers for layer in layers):
        return "a layer has observers, which a graph would leave out"
    for layer in layers:
        for store in layer.stores:
            if store.positions is not None:
                return "positions of keys that stand in a frame are counted on the host"
            if store.step is None:
                serving = store.serving(layer.dtype)
                reasons = (serving.no_triton, serving.two_passes, *serving.no_pack.values())
                return next(filter(None, reasons), "the host decides over tokens of this cache")
    return None


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """What transformers puts around the decoding loop of sampling and greedy search, with graphs where they serve."""
    with type(model)._optimize_model_for_decode(model):
        recorder = RECORDERS.get(model.device.type) if model.kvq.graphs and not torch.is_grad_enabled() else None
        reason = why_no_graph(model) if recorder else None
        if recorder is None or reason is not None:
            _say(reason)
            yield
            return
        graph = DecodeGraph(model.forward, recorder)
        model.forward = functools.wraps(model.forward)(functools.partial(graph.forward))
        try:
            yield
        finally:
            del model.forward


def _say(reason: str | None) -> None:
    if reason is not None:
        logger.warning_once(f"kvq: decoding runs without a CUDA graph: {reason}.")


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A step: of what it is, where its inputs lie, what repeats it, and what it gives each time."""

    of: tuple
    inputs: dict[str, torch.Tensor]
    replay: Callable[[], None]
    output: ModelOutput


class DecodeGraph:
    """A model's forward while one cache decodes.

    eager    the model's own forward.
    replays  steps that were replayed; records: how often a step was recorded.
    """

    def __init__(self, eager: Callable[..., ModelOutput], record: Recorder):
        self.eager, self.record = eager, record
        self.replays = self.records = 0
        self._is_refused = False
        self._recorded: _Recorded | None = None

    def forward(self, *args, **kwargs) -> ModelOutput:
        """As ``eager``."""
        cache, tensors = kwargs.get("past_key_values"), None if args or self._is_refused else _step_inputs(kwargs)
        if tensors is None:
            self._recorded = None
            return self.eager(*args, **kwargs)
        steps = _steps(cache)
        if not steps or any(step.grows_next for step in steps):
            self._recorded = None
            found = self.eager(*args, **kwargs)
            self._refuse(why_no_steps(cache))
            return found
        settings = {name: value for name, value in kwargs.items() if name not in (*_STEP_INPUTS, "attention_mask")}
        shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        of = [(step, step.renewals) for step in steps], settings, shapes
        recorded = self._recorded
        if recorded is None or recorded.of != of:
            # Its memory is free for the next one.
            self._recorded = recorded = None
            try:
                self._recorded = recorded = self._record(cache, tensors, settings, of)
            except (_CannotRecord, RuntimeError) as error:
                # Nothing has run on the device, and what the host counted is taken back.
                self._refuse(first_line(error))
                return self.eager(*args, **kwargs)
        else:
            for name, buffer in recorded.inputs.items():
                buffer.copy_(tensors[name])
            for layer in packed_layers(cache):
                layer.follow()
        recorded.replay()
        self.replays += 1
        # The next replay overwrites it.
        output = recorded.output
        return type(output)(**{**output, "logits": output["logits"].clone()})

    def _refuse(self, reason: str | None) -> None:
        """Not while this generation lasts, if there is a reason: it does not go away between two of its tokens."""
        self._is_refused = reason is not None
        _say(reason)

    def _record(
        self, cache: Any, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], of: tuple
    ) -> "_Recorded":
        if reason := why_no_steps(cache):
            raise _CannotRecord(reason)
        inputs = {name: x.clone() for name, x in tensors.items()}
        counted = [(layer, layer.length) for layer in packed_layers(cache)]
        stepped = [(owner, owner.steps) for step in _steps(cache) for owner in (step, step.counters)]
        try:
            # Rows are alike, so a mask says no more than causality.
            replay, output = self.record(functools.partial(self.eager, **inputs, **settings))
            if set(output) - _OUTPUTS:
                raise _CannotRecord(f"its forward gives {', '.join(sorted(set(output) - _OUTPUTS))} too")
        except BaseException:
            for layer, length in counted:
                layer.length = length
            for owner, steps in stepped:
                owner.steps = steps
            raise
        self.records += 1
        return _Recorded(of=of, inputs=inputs, replay=replay, output=output)


def _step_inputs(kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """Of a forward of one token a row, what differs from step to step; None of any other forward."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    layers = packed_layers(kwargs.get("past_key_values"))
    if not layers or not isinstance(ids, torch.Tensor) or ids.shape[1] != 1:
        return None
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        return None
    found = {name: kwargs[name] for name in _STEP_INPUTS if kwargs.get(name) is not None}
    rest = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)} - {*found, "attention_mask"}
    return None if rest else found


def _steps(cache: Any) -> list[Any]:
    """The ``DeviceStep`` of every store of a cache; none at all if one of them is not stepping."""
    found = [store.step for layer in packed_layers(cache) for store in layer.stores]
    return [] if any(step is None for step in found) else found
