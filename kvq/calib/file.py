"""Statistics on disk: a safetensors file whose bytes are fixed by its contents, written whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

from kvq.atomic import write_whole
from kvq.errors import CheckpointError
from kvq.models.resolve import read_header


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: after any failure the old file, or none, is there. Raises CheckpointError if it fails."""
    try:
        write_whole(path, _serialized(tensors, metadata))
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
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    # Through bytes, because numpy has no bfloat16.
    return memoryview(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def _serialized(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]):
    """Pieces of a safetensors file with its metadata in a fixed order; the library's own order changes from run to run.

    Tensors are laid out as the library does: by falling size of their items, then by name.
    """
    metadata = dict(metadata) | {"sha256": _digest(tensors, metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    # An empty model of the layout, so that types are named by the library and no data is held twice.
    shapes = {name: torch.empty(0, dtype=tensors[name].dtype) for name in order}
    plain = save(shapes)
    types = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": types[name]["dtype"], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data to begin at a multiple of 8 bytes.
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name in order:
        yield _bytes(tensors[name])
