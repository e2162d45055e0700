"""See queries, keys, values and hidden states of a model while it runs, in any family, and leave the model as it was.

Keys and values are seen in the cache's ``update``: there they are after RoPE, whatever computes the attention. Queries
are seen in the attention function: transformers looks it up by name for every call, and inside ``watch`` that look-up
answers with a function that shows its arguments to the observer and then calls the model's own. Neither the name of the
implementation nor the mask changes.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel

from kvq.calib.attention import AttentionOptions
from kvq.models.decoder import decoder_layers

# What a model may pass to attention that changes its weights in a way not known here.
UNKNOWN_OPTIONS = ("position_bias", "indices")


class Watcher:
    """What ``watch`` tells, of no interest here: ``kvq.calib.observe.Observer`` says what the tensors are.

    layers   by index, those whose hidden states are shown.
    """

    layers: Mapping[int, Any] = MappingProxyType({})

    def saw_cache(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        pass

    def saw_attention(self, index: int, query: torch.Tensor, options: AttentionOptions) -> None:
        pass

    def saw_hidden(self, index: int, hidden: torch.Tensor) -> None:
        pass


class ObservingCache(DynamicCache):
    """A DynamicCache that shows the observer what it is given, and otherwise behaves like one. It fits one forward."""

    def __init__(self, config: PretrainedConfig, observer: Watcher):
        super().__init__(config=config)
        self.observer = observer
        # The tensors that attention is given, so that it can be told whose they are: some layers read another's.
        self.owners: dict[int, tuple[int, torch.Tensor]] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self.observer.saw_cache(layer_idx, key_states, value_states)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.owners[id(keys)] = layer_idx, keys
        return keys, values


@contextmanager
def watch(model: PreTrainedModel, observer: Watcher) -> Iterator[ObservingCache]:
    """Show ``observer`` what one forward of ``model`` with the yielded cache computes."""
    cache = ObservingCache(model.config, observer)
    modules = {id(module) for module in model.modules()}
    lookup = AttentionInterface.get_interface

    def observed_lookup(self, *args, **kwargs):
        return functools.partial(_observed, observer, cache, modules, lookup(self, *args, **kwargs))

    hooks = [
        layer.register_forward_pre_hook(functools.partial(_hidden, observer, index), with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model) or ())
        if index in observer.layers
    ]
    AttentionInterface.get_interface = observed_lookup
    try:
        yield cache
    finally:
        AttentionInterface.get_interface = lookup
        for hook in hooks:
            hook.remove()


def _observed(observer: Watcher, cache: ObservingCache, modules: set[int], own, module, query, key, *args, **kwargs):
    owner, _ = cache.owners.get(id(key), (None, None))
    if id(module) in modules and owner is not None:
        scaling = kwargs.get("scaling")
        observer.saw_attention(
            owner,
            query,
            AttentionOptions(
                scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
                softcap=kwargs.get("softcap"),
                sink_logits=kwargs.get("s_aux"),
                unknown=tuple(name for name in UNKNOWN_OPTIONS if kwargs.get(name) is not None),
            ),
        )
    return own(module, query, key, *args, **kwargs)


def _hidden(observer: Watcher, index: int, module, args, kwargs) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(hidden, torch.Tensor):
        observer.saw_hidden(index, hidden)
