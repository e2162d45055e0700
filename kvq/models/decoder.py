"""The part of a causal model that owns its decoder layers, whatever the family calls it."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from kvq.models.describe import text_config
from kvq.progress import is_heard, tell


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The module that owns the decoder layers and builds a cache if it is given none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = decoder if decoder is not None and decoder is not model else model.base_model
    if found is model:
        # Llama 4 names a part that its text-only model has not.
        found = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    return found


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The list of the decoder layers; None if there is no such list."""
    count = text_config(model.config).num_hidden_layers
    for module in decoder_of(model).children():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    return None


@contextmanager
def telling(model: PreTrainedModel, forwards: int, steps: int = 1) -> Iterator[None]:
    """While it is open, every decoder layer that has run tells its share of ``forwards`` forwards, which are ``steps``
    steps of the work that is shown (``kvq.progress``)."""
    layers = decoder_layers(model) if is_heard() else None
    ran = itertools.count(1)

    def heard(module, args, output) -> None:
        tell(steps * min(1.0, next(ran) / (forwards * len(layers))))

    hooks = [layer.register_forward_hook(heard) for layer in layers or ()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
