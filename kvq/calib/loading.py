"""How a model is held in memory while it is calibrated, in the way that its size asks for."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvq.calib.collect import ALONE, RESERVOIR_BYTES
from kvq.calib.needs import DEFAULT_NEEDS
from kvq.calib.ranks import Ranks
from kvq.errors import DataError, UnsupportedModelError
from kvq.models.decoder import decoder_layers
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model
from kvq.models.stored import tensors_of
from kvq.recipe import Recipe

# Memory beside the weights that a limit leaves for: one batch's activations and the statistics.
_ROOM = 1.25


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to calibrate.

    needs, strict    what to measure, and whether to refuse what the model cannot give.
    batch_size       windows of a forward.  seed  of the windows that the reservoir keeps.
    reservoir_bytes  bytes of all reservoirs together.
    dtype            of the weights; None: float32 on the CPU, the checkpoint's on a GPU.
    device_map       as ``from_pretrained`` takes it, such as ``auto`` for several GPUs; None: one device.
    layer_by_layer   weights stay on the disk, and every forward reads one layer at a time. None: if they do not fit in
                     ``memory_limit``. Needs accelerate, as ``device_map`` does.
    memory_limit     bytes that the model may take, or None for no limit.
    recipes          whose codebooks are learned after the statistics (``kvq.calib.codebooks``).
    """

    needs: frozenset[str] = DEFAULT_NEEDS
    strict: bool = False
    batch_size: int = 8
    seed: int = 0
    reservoir_bytes: int = RESERVOIR_BYTES
    dtype: torch.dtype | None = None
    device_map: str | None = None
    layer_by_layer: bool | None = None
    memory_limit: int | None = None
    recipes: tuple[Recipe, ...] = ()

    @property
    def measuring(self) -> dict[str, Any]:
        """What ``collect`` takes of them."""
        names = ("needs", "strict", "batch_size", "seed", "reservoir_bytes")
        return {name: getattr(self, name) for name in names}


def load_for(
    folder: Path, options: Options, *, layer_by_layer: bool, state_folder: Path, ranks: Ranks = ALONE
) -> PreTrainedModel:
    """The model in ``folder``, where options want it.

    state_folder   for weights that the checkpoint's files do not hold as the model takes them.
    """
    spread = offload_map(load_config(folder), _device(ranks)) if layer_by_layer else options.device_map
    return load_model(
        folder,
        dtype=options.dtype,
        device=ranks.device,
        device_map=spread,
        offload_folder=state_folder / f"weights-{ranks.rank}",
    )


def by_layer(folder: Path, options: Options, ranks: Ranks = ALONE) -> bool:
    """Whether the model will be calibrated layer by layer. Raises DataError for options that exclude each other."""
    if options.device_map and (ranks.world > 1 or options.layer_by_layer or options.memory_limit):
        raise DataError(
            f"device_map={options.device_map!r} spreads the whole model, which excludes torchrun and layer by layer: "
            "leave one of them out."
        )
    if options.layer_by_layer is not None:
        return options.layer_by_layer
    if options.memory_limit is None:
        return False
    own = describe(load_config(folder)).dtype
    dtype = options.dtype or (torch.float32 if _device(ranks) == "cpu" else own)
    return weight_bytes(folder, dtype) * _ROOM > options.memory_limit


def offload_map(config: PretrainedConfig, device: str) -> dict[str, str]:
    """A ``device_map`` that leaves decoder layers and the head on the disk: a layer is read for its forward alone.

    Embeddings and what else stands beside them stay on ``device``. Raises UnsupportedModelError for a decoder without a
    plain list of layers.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layers = decoder_layers(model)
    if layers is None:
        raise UnsupportedModelError(
            f"{config.model_type!r} cannot be calibrated layer by layer: its decoder has no plain list of layers; "
            "leave --layer-by-layer and --memory-limit out."
        )
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    large = {*layers} if tied else {*layers, head}
    found: dict[str, str] = {}

    def place(module: torch.nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child not in large and large.intersection(child.modules()):
                place(child, f"{prefix}{name}.")
            else:
                found[prefix + name] = "disk" if child in large else device
        found.update((prefix + name, device) for name, _ in module.named_parameters(recurse=False))

    place(model, "")
    return found


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of all weights in a dtype, from the headers."""
    return sum(prod(tensor.shape) for tensor in tensors_of(folder).values()) * dtype.itemsize


def _device(ranks: Ranks) -> str:
    """Where ``load_model`` would put the model."""
    return ranks.device or ("cuda" if torch.cuda.is_available() else "cpu")
