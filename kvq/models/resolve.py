"""From a name to a checkpoint folder that can be trusted, and from the folder to a model.

``resolve_model`` finds or fetches the folder, ``check_weights`` proves by the headers that no weight file is cut off,
``weights_fingerprint`` identifies the weights, and the ``load_*`` functions turn the usual failures of transformers
into errors of kvq.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvq.errors import CheckpointError, KvqError, ModelNotFoundError, UnsupportedModelError, first_line, one_line
from kvq.models.builtin import BUILTIN, builtin_model_dir
from kvq.models.config_numbers import check_numbers

INDEX_FILE = "model.safetensors.index.json"
# Bytes; the largest known have some hundred KiB.
LARGEST_CONFIG = 16 << 20
_HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "merges.txt", "tekken.json")
# What classes of transformers raise for a config that they cannot be built from, or weights that do not fit.
_LOADING_FAILS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    AttributeError,
)
_LOADING_FAILS += (AssertionError, SafetensorError)
_SAMPLES, _SAMPLE_BYTES = 16, 64 * 1024
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def resolve_model(name: str | Path, *, offline: bool = False) -> Path:
    """Return the checkpoint folder of ``name``: ``builtin``, a local folder, or a hub id (downloaded when needed).

    A name that looks like a path is never sent to the hub. ``offline`` (or the variable HF_HUB_OFFLINE) allows only
    what the hub cache holds. Weight files are not read here; see ``check_weights``.

    Raises ModelNotFoundError if there is no such model or it cannot be fetched, CheckpointError if the folder holds no
    config or no safetensors.
    """
    if name == BUILTIN:
        return builtin_model_dir()
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path, str(name))
    if path.is_file():
        raise ModelNotFoundError(f"model {str(name)!r} is a file: give the folder that holds its config.json.")
    if isinstance(name, Path) or looks_like_path(name):
        raise ModelNotFoundError(
            f"model folder {str(name)!r} does not exist: check the path, or give a hub id such as 'owner/name'."
        )
    return _checked_folder(_from_hub(name, offline), name)


def checkpoint_of(model: PreTrainedModel | PretrainedConfig) -> Path | None:
    """The folder that a model, or its config, was loaded from; None if it was made in memory or is no longer there."""
    try:
        return resolve_model(model.name_or_path, offline=True) if model.name_or_path else None
    except KvqError:
        return None


def looks_like_path(name: str) -> bool:
    """True for a name that can only be a local path: it starts with ``.``, ``~`` or ``/``, or has two slashes."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or Path(name).is_absolute()


def _from_hub(name: str, offline: bool) -> Path:
    try:
        # Weights in sub-folders (original/, onnx/) are other formats of the same model.
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*"], local_files_only=offline
        )
    except HFValidationError:
        raise ModelNotFoundError(
            f"model {name!r} is neither a folder nor a hub id: check the path, write 'owner/name', or use {BUILTIN!r}."
        ) from None
    except GatedRepoError:
        raise ModelNotFoundError(
            f"model {name!r} is gated on the hub: accept its terms there and log in with 'hf auth login'."
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"model {name!r} is neither a local folder nor on the hub: check the spelling, or log in if it is private."
        ) from None
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        why = (
            "the network is switched off" if offline or huggingface_hub.constants.HF_HUB_OFFLINE else first_line(error)
        )
        raise ModelNotFoundError(
            f"model {name!r} is not on disk and cannot be fetched from the hub ({why}): give a local folder, or try "
            "again with a network."
        ) from None
    return Path(folder)


def _checked_folder(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model folder {name!r} holds no config.json: give the folder that save_pretrained wrote."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"model {name!r} holds only pickled weights ({pickles[0]}): these can run code and are not read; load "
                "it with transformers where you trust it and save_pretrained() it as safetensors."
            )
        raise CheckpointError(f"model {name!r} holds no *.safetensors weights: copy or download it again.")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, in order of name, as transformers would choose them."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{INDEX_FILE} is not a readable shard index: copy or download the model again."
        ) from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"weight file {name!r} of {INDEX_FILE} is missing: copy or download the model again.")
    return [folder / name for name in names]


def check_weights(folder: Path) -> list[Path]:
    """Check every weight file by its header alone and return the files; reads no weights.

    Raises CheckpointError naming the first file that is missing, truncated or no safetensors file.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"folder {Path(folder).name!r} holds no *.safetensors weights: copy or download it again."
        )
    for file in files:
        read_header(file)
    return files


def read_header(file: Path) -> dict:
    """Return a safetensors file's header (tensor name -> dtype, shape, data_offsets) after checking it.

    Law: the tensors lie end to end, each as large as its shape says, and the last ends where the file ends.
    Raises CheckpointError naming the file.
    """
    file = Path(file)
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if length <= size - 8 else None
    except OSError as error:
        raise CheckpointError(f"{file.name!r} cannot be read ({error.strerror or error}): download it again.") from None
    if raw is None:
        raise _truncated(file, f"its header of {length:,} bytes does not fit in a file of {size:,} bytes")
    try:
        header = json.loads(raw)
        end = 0
        for begin, stop, want in sorted(_extent(entry) for name, entry in header.items() if name != "__metadata__"):
            if begin != end or stop - begin != want:
                raise ValueError
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file.name!r} is not a valid safetensors file: copy or download it again.") from None
    if size != 8 + length + end:
        raise _truncated(file, f"its header promises {8 + length + end:,} bytes and it has {size:,}")
    return header


def _extent(entry: dict) -> tuple[int, int, int]:
    begin, stop = entry["data_offsets"]
    return begin, stop, math.prod(entry["shape"]) * _ITEM_BITS[entry["dtype"]] // 8


def _truncated(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file.name!r} is truncated or altered: {why}; copy or download it again.")


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 that identifies the weights: each shard's size, header, and 16 evenly spaced samples of 64 KiB.

    Cheap at any size, the same for a copy or hard links in another folder. It tells models apart; an alteration
    between the samples goes unseen, and the same weights in other shards give another value.
    """
    digest = hashlib.sha256()
    for file in check_weights(folder):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(8)
            header = stream.read(int.from_bytes(head, "little"))
            digest.update(size.to_bytes(8, "little") + head + header)
            start = stream.tell()
            last = max(start, size - _SAMPLE_BYTES)
            for i in range(_SAMPLES):
                stream.seek(start + (last - start) * i // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_config(folder: Path) -> PretrainedConfig:
    """Load the config of a checkpoint folder; CheckpointError if unreadable, UnsupportedModelError if unknown."""
    folder = Path(folder)
    raw = read_config(folder)
    model_type = raw.get("model_type")
    check_numbers(raw, folder.name)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, KvqError):
            raise
        raise UnsupportedModelError(
            f"model type {model_type!r} of {folder.name!r} is not one this release of transformers can read "
            f"({first_line(error)}): update transformers; kvq never runs code from a model folder."
        ) from None
    # Its configs check themselves, and raise what they like.
    except Exception as error:
        raise CheckpointError(
            f"config.json of {folder.name!r} is refused by transformers ({one_line(error)}): mend it, or copy or "
            "download the model again."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The table in config.json as it stands. Raises CheckpointError if it is none, or too large or deep to be one."""
    path = Path(folder) / "config.json"
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise CheckpointError(
                f"config.json of {path.parent.name!r} has {path.stat().st_size:,} bytes, no config: copy or download "
                "the model again."
            )
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json of {path.parent.name!r} cannot be read: copy or download the model again.")
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; CheckpointError if it has none or it is broken."""
    folder = Path(folder)
    if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder.name!r} holds no tokenizer: copy tokenizer.json from the original model into it."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # The tokenizers library raises bare Exception for a file it cannot parse.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer of {folder.name!r} cannot be loaded ({first_line(error)}): copy its files again."
        ) from None


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict | None = None,
    offload_folder: Path | None = None,
    config: PretrainedConfig | None = None,
):
    """Load a causal model in eval mode.

    config   instead of the folder's own.
    device   None takes the GPU if there is one.
    device_map   spreads the model over several devices instead, as ``from_pretrained`` does (needs accelerate).
    offload_folder   for weights of modules on ``disk`` that are not in the files as the model takes them.
    dtype    None takes float32 on the CPU, where half precision is slow, and the checkpoint's dtype elsewhere.

    Raises CheckpointError for truncated, missing or mismatched weights.
    """
    folder = Path(folder)
    check_weights(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    given = {"attn_implementation": attn_implementation, "device_map": device_map, "config": config}
    if device_map is not None:
        given["offload_folder"] = offload_folder
    settings = {name: value for name, value in given.items() if value is not None}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    except KvqError:
        raise
    except _LOADING_FAILS as error:
        why = f"it names {error}, which is unknown" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"model {folder.name!r} cannot be loaded: {why}.") from None
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise CheckpointError(
            f"model {folder.name!r} lacks {len(missing)} of its weights, first {missing[0]!r}: download it again."
        )
    return (model if device_map is not None else model.to(device)).eval()
