"""A model without weights, into which one decoder layer at a time is loaded from the shards.

transformers can offload to disk (``device_map``), but then every forward reads every layer again, matrix by matrix.
Here a layer is read once and all windows go through it. Names, conversions and types of weights are the business of
transformers' own loader, which is given only the tensors of the layer.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from kvq.errors import CheckpointError, UnsupportedModelError
from kvq.models.decoder import decoder_layers
from kvq.models.resolve import check_weights, load_config, read_header
from kvq.models.skeleton import without_weights


class Shell:
    """``model`` has the shapes of a checkpoint and no weights; buffers such as rotary frequencies are real.

    dtype    of the weights once loaded.  device   where they are loaded to.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str):
        self.folder = Path(folder)
        self.dtype, self.device = dtype, torch.device(device)
        config = load_config(self.folder)
        self.model: PreTrainedModel = without_weights(config, dtype)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)
        layers = decoder_layers(self.model)
        if layers is None:
            raise _refusal(config.model_type, "its decoder has no plain list of layers")
        # Readers of another layer's keys need both layers at a time.
        if getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
            raise _refusal(config.model_type, "some of its layers read another layer's keys and values")
        self.layers = layers
        parts = {module: name for name, module in self.model.named_modules()}
        self._in_layer = re.compile(rf"(?:^|\.){re.escape(parts[layers].rpartition('.')[2])}\.(\d+)\.")
        self._embedding = f"{parts[self.model.get_input_embeddings()].rpartition('.')[2]}.weight"
        self._files, self._shapes = {}, {}
        for file in check_weights(self.folder):
            for tensor, entry in read_header(file).items():
                if tensor != "__metadata__":
                    self._files[tensor], self._shapes[tensor] = file, entry["shape"]
        # Norms and position embeddings beside the layers are small, and the decoder may touch them in every forward.
        self._load([name for name in self._files if self._is_small(name)])

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """The weights of one decoder layer are there inside the block."""
        self._load([name for name in self._files if self._index(name) == index])
        with self._until_dropped(self.layers[index], f"layer {index}"):
            yield

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """The token embeddings are there inside the block."""
        self._load([name for name in self._files if self._is_embedding(name)])
        with self._until_dropped(self.model.get_input_embeddings(), "the token embeddings"):
            yield

    def _index(self, name: str) -> int | None:
        found = self._in_layer.search(name)
        return int(found[1]) if found else None

    def _is_embedding(self, name: str) -> bool:
        return self._index(name) is None and name.endswith(self._embedding)

    def _is_small(self, name: str) -> bool:
        # The head has the shape of the embeddings, and is never run.
        shape = list(self.model.get_input_embeddings().weight.shape)
        return self._index(name) is None and self._shapes[name] != shape

    @contextmanager
    def _until_dropped(self, module: torch.nn.Module, what: str) -> Iterator[None]:
        lacking = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if lacking:
            raise CheckpointError(
                f"model {self.folder.name!r} lacks weights of {what}, first {lacking[0]!r}: download it again."
            )
        try:
            yield
        finally:
            _drop_weights(module)

    def _load(self, names: list[str]) -> None:
        files: dict[Path, list[str]] = {}
        for name in names:
            files.setdefault(self._files[name], []).append(name)
        # pread, because pages of a mapped file count as this process's memory.
        opened = [safe_open(file, framework="pt", backend="pread") for file in files]
        slices = {n: handle.get_slice(n) for handle, own in zip(opened, files.values()) for n in own}
        convert_and_load_state_dict_in_model(
            model=self.model,
            state_dict=slices,
            load_config=LoadStateDictConfig(
                dtype=self.dtype,
                dtype_plan=self.model._get_dtype_plan(self.dtype),
                device_map={"": self.device},
                weight_mapping=get_model_conversion_mapping(self.model),
            ),
        )


def _drop_weights(whole: torch.nn.Module) -> None:
    for module in whole.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                empty = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                setattr(module, name, empty)


def _refusal(model_type: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model_type!r} cannot be calibrated layer by layer: {reason}; leave --layer-by-layer and --memory-limit out."
    )
