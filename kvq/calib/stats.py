"""The statistics file: one safetensors file with what calibration measured and where it came from.

Tensors are named ``layers.{i}.key.{min,max,absmax,sum,sum_squares}`` and ``layers.{i}.value...``, [kv_heads, head_dim].
``absmax`` follows from min and max and is written for other readers. The metadata holds the format version
(``kvq_stats``), the provenance and a SHA-256 over everything else, so an altered file is noticed. The same statistics
give the same bytes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

from kvq.calib.data import DataIdentity
from kvq.calib.observers import ChannelStats
from kvq.errors import CheckpointError
from kvq.models.describe import ModelSpec
from kvq.models.resolve import read_header

STATS_VERSION = "1"
_STORED = ("min", "max", "sum", "sum_squares")


@dataclass(frozen=True)
class LayerStats:
    """One layer's statistics: keys after RoPE, and values, as the cache sees them."""

    key: ChannelStats
    value: ChannelStats

    def merge(self, other: "LayerStats") -> "LayerStats":
        return LayerStats(self.key.merge(other.key), self.value.merge(other.value))

    def cpu(self) -> "LayerStats":
        return LayerStats(self.key.cpu(), self.value.cpu())


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Calibration statistics of one model.

    layers                by layer index; only layers with a full cache.
    model                 name for people; no folder of a machine.
    model_fingerprint     ``describe(config).fingerprint``.
    weights_fingerprint   ``kvq.models.resolve.weights_fingerprint``; empty if unknown.
    data                  what the tokens were; None if the caller brought its own.
    versions              package name -> version, of the run that measured.
    """

    layers: Mapping[int, LayerStats]
    model: str
    model_fingerprint: str
    weights_fingerprint: str = ""
    data: DataIdentity | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def check_model(self, spec: ModelSpec, weights_fingerprint: str | None = None) -> None:
        """Raise CheckpointError if these are another model's statistics.

        The weights are compared only where both fingerprints are known.
        """
        if self.model_fingerprint != spec.fingerprint:
            raise CheckpointError(
                f"the statistics are of {self.model!r}, a model of another shape than this {spec.model_type!r}: run "
                "'kvq calibrate' on this model."
            )
        if weights_fingerprint and self.weights_fingerprint and self.weights_fingerprint != weights_fingerprint:
            raise CheckpointError(
                f"the statistics are of {self.model!r} with other weights than this model's: run 'kvq calibrate' on it."
            )

    def provenance(self) -> dict[str, object]:
        """Everything but the tensors, as plain data."""
        return {
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "weights_fingerprint": self.weights_fingerprint,
            "data": self.data.to_dict() if self.data else None,
            "versions": dict(self.versions),
        }

    def save(self, path: str | Path, extra: Mapping[str, str] | None = None) -> None:
        """Write the file atomically: after any failure the old file, or none, is there. ``extra``: more metadata.

        Raises CheckpointError if it cannot be written.
        """
        counts = {str(i): [layer.key.count, layer.value.count] for i, layer in sorted(self.layers.items())}
        metadata = {
            "kvq_stats": STATS_VERSION,
            "provenance": json.dumps(self.provenance(), sort_keys=True),
            "counts": json.dumps(counts),
            **(extra or {}),
        }
        _write_atomically(Path(path), _serialize(self._tensors(), metadata))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"layers.{i}.{side}.{name}": getattr(getattr(layer, side), name).contiguous().cpu()
            for i, layer in self.layers.items()
            for side in ("key", "value")
            for name in (*_STORED, "absmax")
        }

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read a statistics file.

        Raises CheckpointError if it is missing, truncated, altered, of another format version, or something else.
        """
        return cls.load_with_metadata(path)[0]

    @classmethod
    def load_with_metadata(cls, path: str | Path) -> tuple["Stats", dict[str, str]]:
        """Read a statistics file and all of its metadata; raises as ``load`` does."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"statistics file {str(path)!r} does not exist: make it with 'kvq calibrate'.")
        metadata = read_header(path).get("__metadata__", {})
        version = metadata.get("kvq_stats")
        if version is None:
            raise CheckpointError(f"{path.name!r} is not a statistics file: make one with 'kvq calibrate'.")
        if version != STATS_VERSION:
            raise CheckpointError(
                f"statistics file {path.name!r} has format {version!r} and this kvq reads {STATS_VERSION!r}: run "
                "'kvq calibrate' again, or install the kvq that wrote it."
            )
        altered = CheckpointError(f"statistics file {path.name!r} has been altered: run 'kvq calibrate' again.")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if metadata.pop("sha256") != _digest(tensors, metadata):
                raise altered
            return cls._from_parts(tensors, metadata), metadata
        except (KeyError, TypeError, ValueError, OSError, safetensors.SafetensorError):
            raise altered from None

    @classmethod
    def _from_parts(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> "Stats":
        layers = {}
        for index, counts in json.loads(metadata["counts"]).items():
            sides = [
                ChannelStats(count=count, **{name: tensors[f"layers.{index}.{side}.{name}"] for name in _STORED})
                for side, count in zip(("key", "value"), counts)
            ]
            layers[int(index)] = LayerStats(*sides)
        provenance = json.loads(metadata["provenance"])
        data = provenance.pop("data")
        return cls(layers=layers, data=DataIdentity(**data) if data else None, **provenance)


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _serialize(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with its metadata in a fixed order; the library's own order changes from run to run."""
    metadata = metadata | {"sha256": _digest(tensors, metadata)}
    plain = save(dict(tensors))
    end = 8 + int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(plain[8:end])
    head = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data to begin at a multiple of 8 bytes.
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + plain[end:]


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"statistics file {str(path)!r} cannot be written ({error.strerror or error}): free space or choose "
            "another place."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
