"""A model of a config's shapes without weights: parameters on the meta device, buffers real."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model in eval mode. Buffers (rotary frequencies) are not in a checkpoint, so they are computed as always."""
    with _parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register, reset = torch.nn.Module.register_parameter, torch.nn.Linear.reset_parameters

    def on_meta(module, name, parameter):
        # One that is there already is shared, and stays the same object.
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            # transformers then draws no random numbers for it, which takes its time even without memory.
            parameter._is_hf_initialized = True
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    # Nor does torch draw any.
    torch.nn.Linear.reset_parameters = lambda module: None
    try:
        yield
    finally:
        torch.nn.Module.register_parameter, torch.nn.Linear.reset_parameters = register, reset
