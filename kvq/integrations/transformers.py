"""Make ``from_pretrained`` of a kvq export run on the packed cache, and ``save_pretrained`` write an export again.

transformers finds the two classes below under ``quant_method: kvq`` (registered by ``kvq.integrations.hook``).
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kvq.atomic import write_atomically
from kvq.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# This module is imported while transformers imports its quantizers, so what needs a model class is imported in the
# functions that run once a model is loaded.

NAME = "kvq"
CARD = "README.md"
_SNAPSHOTS = "snapshots"
_CONFIG_SOURCES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def register() -> None:
    """Register config and quantizer with transformers; safe to repeat."""
    if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(NAME)(KvqConfig)
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(NAME)(KvqQuantizer)


class KvqConfig(QuantizationConfigMixin):
    """An export's ``quantization_config``: the fields of ``kvq.exporting.checkpoint.FIELDS``, and no others.

    Raises CheckpointError for unknown or missing fields and for another format version.
    """

    def __init__(self, **fields):
        from kvq.exporting.checkpoint import check_config

        self.__dict__.update(check_config(fields))


class KvqQuantizer(HfQuantizer):
    """Leaves the weights alone and gives the loaded model its packed cache."""

    requires_calibration = True

    def __init__(self, quantization_config: KvqConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.wanted_attention: str | None = None
        self.plan = None
        # Files that save_pretrained writes again, by name.
        self.carried: dict[str, bytes] = {}

    def update_attn_implementation(self, config):
        """Note what the caller asked for; 5.17 does not call this, so 'sdpa' cannot be told from unset there."""
        self.wanted_attention = config._attn_implementation
        return config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """Read the side files before the weights: a broken export fails at once."""
        import torch

        from kvq.exporting.checkpoint import load_plan, read_side_files

        fields = self.quantization_config.to_dict()
        folder = export_folder(model.config.name_or_path, checkpoint_files)
        _fetch_side_files(folder, fields)
        # transformers builds the model on the meta device; what a plan holds is real (rotary tables, bases).
        with torch.device("cpu"):
            self.plan = load_plan(folder, fields, model.config)
        self.carried = read_side_files(folder, fields)
        if (folder / CARD).is_file():
            self.carried[CARD] = (folder / CARD).read_bytes()
        if checkpoint_files:
            _check_folder(folder, fields)

    def _process_model_after_weight_loading(self, model, **kwargs):
        import torch

        from kvq.cache import model_attention as attention
        from kvq.integrations import runtime

        attention.register()
        installed = runtime.install(model, self.plan)
        if self.wanted_attention in ("sdpa", "eager"):
            # An explicit wish, also of what a model would have by itself: it then reads dequantized tensors.
            model.set_attn_implementation(self.wanted_attention)
            installed.attention = self.wanted_attention
        # A partial over a module-level function survives deepcopy, which then holds the copy, and pickling.
        model.save_pretrained = functools.partial(save_export, model)
        # transformers refuses both for weights that are quantized, which these are not.
        model.half = functools.partial(torch.nn.Module.half, model)
        model.float = functools.partial(torch.nn.Module.float, model)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are full precision and training builds no packed cache."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All weights, and not adapters alone: what ``Trainer`` asks."""
        return True


def load(path: str | Path, **kwargs: Any) -> "PreTrainedModel":
    """``AutoModelForCausalLM.from_pretrained(path, **kwargs)`` for kvq exports only, a folder or a hub id.

    Raises CheckpointError if it is no kvq export or anything of it is missing or altered, ModelNotFoundError if there
    is no such model.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    from kvq.exporting.checkpoint import quantization_of
    from kvq.models.resolve import looks_like_path

    name = str(path)
    if not Path(name).is_dir() and (isinstance(path, Path) or looks_like_path(name)):
        raise ModelNotFoundError(f"model folder {name!r} does not exist: check the path, or give a hub id.")
    try:
        config, _ = PretrainedConfig.get_config_dict(name, **{k: kwargs[k] for k in _CONFIG_SOURCES if k in kwargs})
    except OSError:
        raise ModelNotFoundError(
            f"{name!r} holds no config.json that can be read: give the folder that 'kvq export' wrote, or a hub "
            "id that can be reached."
        ) from None
    if (quantization_of(config) or {}).get("quant_method") != NAME:
        raise CheckpointError(
            f"{name!r} is no kvq export: make one with 'kvq export {name} --recipe kivi2 -o DIR', or run this model "
            "inside kvq.quantized_cache(model, recipe)."
        )
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def export_folder(name_or_path: str, checkpoint_files: list[str] | None) -> Path:
    """The folder that the weights came from; it holds the side files too, or will once they are fetched."""
    if checkpoint_files:
        return Path(checkpoint_files[0]).parent
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    raise CheckpointError(
        f"the folder of {name_or_path!r} is not known, and a kvq export needs its side files: load it from its folder, "
        "without state_dict."
    )


def _fetch_side_files(folder: Path, fields: Mapping[str, Any]) -> None:
    """Download side files into a hub snapshot, at the revision that the weights came from."""
    from huggingface_hub import hf_hub_download

    if _SNAPSHOTS not in folder.parts:
        return
    at = len(folder.parts) - 1 - folder.parts[::-1].index(_SNAPSHOTS)
    repository, revision, inner = Path(*folder.parts[:at]), folder.parts[at + 1], folder.parts[at + 2 :]
    if not repository.name.startswith("models--"):
        return
    repo_id = repository.name.removeprefix("models--").replace("--", "/")
    for name in fields["files"]:
        if (folder / name).is_file():
            continue
        try:
            hf_hub_download(repo_id, "/".join((*inner, name)), revision=revision, cache_dir=repository.parent)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name!r} of {repo_id!r} is not in the hub cache and cannot be fetched ({type(error).__name__}): try "
                "again with a network, or download the whole repository."
            ) from None


def _check_folder(folder: Path, fields: Mapping[str, Any]) -> None:
    """Refuse weights other than the exported ones, and a folder that lost a file of its model."""
    from kvq.models.resolve import weights_fingerprint

    if weights_fingerprint(folder) != fields["weights_fingerprint"]:
        raise CheckpointError(
            f"the weights in {str(folder)!r} are not the ones that were exported: copy the whole folder again, or "
            "export the new weights."
        )
    # A hub snapshot holds only what was asked for so far.
    if _SNAPSHOTS in folder.parts:
        return
    for name in fields["copied"]:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{str(folder)!r} lacks {name!r}, which was exported with the model: copy the whole folder again, or "
                "repeat 'kvq export'."
            )


def save_export(model, save_directory, *args, **kwargs) -> None:
    """``save_pretrained`` of a loaded export: the same, with side files, shard index and the new weights' fingerprint.

    Loading the result gives the same model with the same cache.
    """
    if kwargs.pop("push_to_hub", False):
        raise CheckpointError(
            "save_pretrained(push_to_hub=True) would upload the model before its side files are written: use "
            "model.push_to_hub(name) instead."
        )
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    adapters_only = getattr(model, "_hf_peft_config_loaded", False)
    if adapters_only or not kwargs.get("is_main_process", True):
        return
    write_saved(Path(save_directory), model)


def write_saved(folder: Path, model) -> None:
    """Make an export out of what transformers has just saved in ``folder``. The config, which names all, comes last."""
    from kvq.exporting.checkpoint import shard_index, to_json
    from kvq.exporting.manifest import MANIFEST, QUICK_BYTES, build_manifest
    from kvq.models.describe import describe
    from kvq.models.resolve import INDEX_FILE, weights_fingerprint

    # That of an export that is overwritten: it must not vouch for what is written now.
    (folder / MANIFEST).unlink(missing_ok=True)
    carried = model.hf_quantizer.carried
    for name, content in carried.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    index = shard_index(folder)
    (folder / INDEX_FILE).write_bytes(index)
    fields = model.hf_quantizer.quantization_config.to_dict()
    fields["model_fingerprint"] = describe(model.config).fingerprint
    fields["weights_fingerprint"] = weights_fingerprint(folder)
    fields["copied"] = [name for name in fields["copied"] if (folder / name).is_file()]
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = fields
    # A vision-language config may have brought the fields in here.
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    write_atomically(folder / "config.json", to_json(config))
    # Only what belongs to the model: people also save into folders that hold other things, such as training state.
    names = {"config.json", INDEX_FILE, *carried, *fields["copied"], *json.loads(index)["weight_map"].values()}
    (folder / MANIFEST).write_bytes(build_manifest(folder, NAME, names=names, limit=QUICK_BYTES))


register()
