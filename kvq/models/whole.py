"""Does a checkpoint hold the model that its config tells of? From names and shapes alone, before anything is loaded."""

from pathlib import Path

from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from kvq.errors import CheckpointError, UnsupportedModelError
from kvq.models.architecture import meta_model
from kvq.models.names import TensorNames
from kvq.models.stored import tensors_of


def check_whole(folder: Path, config: PretrainedConfig) -> None:
    """Raise CheckpointError if tensors of decoder layers are missing, or stored in other shapes than the config says.

    Loading finds that too, with every weight read. Left to it are checkpoints whose tensors transformers converts
    (names and shapes are then not the model's): quantized weights, and types with a mapping of their own.
    """
    kinds = {config.model_type, config.get_text_config().model_type}
    if hasattr(config, "quantization_config") or any(map(get_checkpoint_conversion_mapping, kinds)):
        return
    try:
        model = meta_model(config.get_text_config())
    except UnsupportedModelError:
        # What cannot be built here is described by its config alone, and refused where it is loaded.
        return
    stored = tensors_of(folder)
    names = TensorNames(stored)
    for name, tensor in model.named_parameters():
        if ".layers." not in name:
            continue
        found = names.find(name)
        if found is None:
            raise CheckpointError(
                f"model {folder.name!r} lacks the weight {name!r} that its config tells of: copy or download it again."
            )
        if stored[found].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"weight {found!r} of model {folder.name!r} has the shape {list(stored[found].shape)}, its config says "
                f"{list(tensor.shape)}: they belong to different models."
            )
