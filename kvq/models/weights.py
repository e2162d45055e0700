"""Single tensors of a checkpoint folder, read when they are asked for."""

from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kvq.errors import CheckpointError
from kvq.models.names import TensorNames
from kvq.models.resolve import check_weights, read_header


class Weights:
    """Tensors of the checkpoint in ``folder`` by the names of the text model."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {
            name: file for file in check_weights(self.folder) for name in read_header(file) if name != "__metadata__"
        }

    @cached_property
    def _names(self) -> TensorNames:
        return TensorNames(self._files)

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor in float32, None if the checkpoint has none of this name or does not hold it as numbers.

        Raises CheckpointError if its file cannot be read.
        """
        found = self._names.find(name)
        if found is None:
            return None
        try:
            with safe_open(self._files[found], framework="pt") as file:
                tensor = file.get_tensor(found)
        except (OSError, SafetensorError):
            raise CheckpointError(
                f"tensor {found!r} of {self.folder.name!r} cannot be read: copy or download the model again."
            ) from None
        # Quantized weights are read by what made them.
        return tensor.float() if tensor.is_floating_point() and tensor.element_size() > 1 else None
