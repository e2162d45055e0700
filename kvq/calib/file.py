"""Statistics on disk: a safetensors file whose bytes are fixed by its contents, written whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch

from kvq.atomic import write_whole
from kvq.errors import CheckpointError
from kvq.models.resolve import read_header
from kvq.models.stored import serialized, tensor_bytes


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: after any failure the old file, or none, is there. Raises CheckpointError if it fails."""
    try:
        write_whole(path, serialized(tensors, {**metadata, "sha256": _digest(tensors, metadata)}))
    except OSError as error:
        raise CheckpointError(
            f"statistics file {str(path)!r} cannot be written ({error.strerror or error}): free space or choose "
            "another place."
        ) from None


def read_file(path: Path, version: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata. Raises CheckpointError if the file is missing, altered, of another version or kind."""
    if not path.is_file():
        raise CheckpointError(f"statistics file {str(path)!r} does not exist: make it with 'kvq calibrate'.")
    metadata = read_header(path).get("__metadata__", {})
    found = metadata.get("kvq_stats")
    if found is None:
        raise CheckpointError(f"{path.name!r} is not a statistics file: make one with 'kvq calibrate'.")
    if found != version:
        raise CheckpointError(
            f"statistics file {path.name!r} has format {found!r} and this kvq reads {version!r}: run 'kvq calibrate' "
            "again, or install the kvq that wrote it."
        )
    altered = CheckpointError(f"statistics file {path.name!r} has been altered: run 'kvq calibrate' again.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if metadata.pop("sha256") != _digest(tensors, metadata):
            raise altered
        return tensors, metadata
    except (KeyError, TypeError, ValueError, OSError, safetensors.SafetensorError):
        raise altered from None


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
