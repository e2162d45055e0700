"""The statistics file: one safetensors file with what calibration measured and where it came from.

Tensors are named ``layers.{i}.{need}.{tensor}``, such as ``layers.3.key.range.absmax`` ([kv_heads, head_dim]); needs
are those of ``kvq/calib/needs.py``, tensors those of ``kvq/calib/observers``. What other modules learned is stored
beside them as ``fits.{name}.{tensor}``. The metadata holds the format version (``kvq_stats``), the provenance and a
SHA-256 over everything else, so an altered file is noticed. The same statistics give the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from kvq.calib.data import DataIdentity
from kvq.calib.file import read_file, write_file
from kvq.calib.needs import WINDOW_NEEDS
from kvq.calib.observers import STORED, Statistic
from kvq.errors import CheckpointError, DataError
from kvq.models.describe import ModelSpec, describe

STATS_VERSION = "2"


@dataclass(frozen=True)
class LayerStats(Mapping[str, Statistic]):
    """One layer's statistics by need: ``layer["key.range"].absmax``."""

    parts: Mapping[str, Statistic]

    def __getitem__(self, need: str) -> Statistic:
        if need not in self.parts:
            raise DataError(
                f"the statistics hold no {need!r}: run 'kvq calibrate' again with --for RECIPE, or with --full."
            )
        return self.parts[need]

    def get(self, need: str, default: Any = None) -> Statistic | Any:
        return self.parts.get(need, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, need: object) -> bool:
        return need in self.parts

    def merge(self, other: "LayerStats") -> "LayerStats":
        if self.parts.keys() != other.parts.keys():
            odd = min(self.parts.keys() ^ other.parts.keys())
            raise DataError(f"only one of two statistics holds {odd!r}, so they cannot be joined: calibrate again.")
        return LayerStats({need: part.merge(other.parts[need]) for need, part in self.parts.items()})

    def cpu(self) -> "LayerStats":
        return LayerStats({need: part.cpu() for need, part in self.parts.items()})


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What another module learned for this model, such as rotations found by gradients.

    tensors   by name.  facts   plain JSON data: how it was made.
    """

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Calibration statistics of one model.

    layers                by layer index; only layers with a full cache.
    model                 name for people; no folder of a machine.
    model_fingerprint     ``describe(config).fingerprint``.
    config                the model's config as plain data, so that a file can be read without the model.
    weights_fingerprint   ``kvq.models.resolve.weights_fingerprint``; empty if unknown.
    data                  what the tokens were; None if the caller brought its own.
    versions              package name -> version, of the run that measured.
    missing               need -> why this model cannot give it.
    token_texts           token id -> its text, for tokens that the statistics name.
    fits                  name -> what other modules learned; empty after a calibration.
    """

    layers: Mapping[int, LayerStats]
    model: str
    model_fingerprint: str
    config: Mapping[str, Any] = field(default_factory=dict)
    weights_fingerprint: str = ""
    data: DataIdentity | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    token_texts: Mapping[int, str] = field(default_factory=dict)
    fits: Mapping[str, Fit] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """What every full-attention layer holds."""
        held = [set(layer.parts) for layer in self.layers.values()]
        # Sliding-window layers hold less than the others, whenever those hold more than a window has.
        most = max(map(len, held), default=0)
        full = [parts for parts in held if not (parts <= WINDOW_NEEDS and len(parts) < most)]
        return frozenset(set.intersection(*full)) if full else frozenset()

    def spec(self) -> ModelSpec:
        """The model's description, from its stored config. Raises CheckpointError if none was stored."""
        if not self.config:
            raise CheckpointError(f"the statistics of {self.model!r} hold no config: run 'kvq calibrate' again.")
        settings = dict(self.config)
        return describe(AutoConfig.for_model(settings.pop("model_type"), **settings))

    def check_model(
        self, spec: ModelSpec, weights_fingerprint: str | None = None, tokenizer_sha256: str | None = None
    ) -> None:
        """Raise CheckpointError if these are another model's statistics.

        Weights and tokenizer are compared only where both are known.
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
        if tokenizer_sha256 and self.data and self.data.tokenizer_sha256 != tokenizer_sha256:
            raise CheckpointError(
                f"the statistics of {self.model!r} were measured with another tokenizer than this model's: run 'kvq "
                "calibrate' on it."
            )

    def with_fit(self, name: str, fit: Fit) -> "Stats":
        """The same statistics with one more fit; a fit of the same name is replaced."""
        if not name or "." in name:
            raise DataError(f"{name!r} is no name of a fit: use one word without dots.")
        return replace(self, fits={**self.fits, name: fit})

    def merge(self, other: "Stats") -> "Stats":
        """Statistics of both runs together, which must be of one model and of different text.

        Raises CheckpointError if they are of different models, and DataError for what cannot be joined.
        """
        alike = ("model_fingerprint", "weights_fingerprint")
        if (
            any(getattr(self, name) != getattr(other, name) for name in alike)
            or self.layers.keys() != other.layers.keys()
        ):
            raise CheckpointError(
                f"statistics of {self.model!r} and of {other.model!r} are of different models and cannot be joined."
            )
        for name in sorted({*self.fits, *other.fits}):
            raise DataError(f"fit {name!r} was learned from one run and cannot be joined: join first, then learn.")
        layers = {i: layer.merge(other.layers[i]) for i, layer in self.layers.items()}
        data = self.data.join(other.data) if self.data and other.data else None
        return replace(
            self,
            layers=layers,
            data=data,
            missing={**self.missing, **other.missing},
            token_texts={**self.token_texts, **other.token_texts},
        )

    def provenance(self) -> dict[str, object]:
        """Where the statistics come from, as plain data."""
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
        write_file(Path(path), *self.to_parts(extra))

    def to_parts(self, extra: Mapping[str, str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and metadata of the file."""
        tensors, facts = {}, {}
        for index, layer in sorted(self.layers.items()):
            for need, part in sorted(layer.items()):
                facts.setdefault(str(index), {})[need] = part.facts()
                tensors |= {f"layers.{index}.{need}.{name}": x for name, x in part.tensors().items()}
        for fit_name, fit in self.fits.items():
            tensors |= {f"fits.{fit_name}.{name}": x for name, x in fit.tensors.items()}
        metadata = {
            "kvq_stats": STATS_VERSION,
            "provenance": json.dumps(self.provenance(), sort_keys=True),
            "config": json.dumps(dict(self.config), sort_keys=True),
            "layers": json.dumps(facts, sort_keys=True),
            "missing": json.dumps(dict(self.missing), sort_keys=True),
            "token_texts": json.dumps({str(i): text for i, text in sorted(self.token_texts.items())}),
            "fits": json.dumps({name: dict(fit.facts) for name, fit in self.fits.items()}, sort_keys=True),
        }
        return tensors, {**metadata, **(extra or {})}

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read a statistics file.

        Raises CheckpointError if it is missing, truncated, altered, of another format version, or something else.
        """
        return cls.load_with_metadata(path)[0]

    @classmethod
    def load_with_metadata(cls, path: str | Path) -> tuple["Stats", dict[str, str]]:
        """Read a statistics file and all of its metadata; raises as ``load`` does."""
        tensors, metadata = read_file(Path(path), STATS_VERSION)
        try:
            return cls.from_parts(tensors, metadata), metadata
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"statistics file {Path(path).name!r} cannot be understood: calibrate again."
            ) from None

    @classmethod
    def from_parts(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> "Stats":
        """Inverse of ``to_parts``."""
        provenance = json.loads(metadata["provenance"])
        data = provenance.pop("data")
        layers = {
            int(index): LayerStats(
                {
                    need: STORED[need.rpartition(".")[2]].restore(_named(tensors, f"layers.{index}.{need}."), facts)
                    for need, facts in parts.items()
                }
            )
            for index, parts in json.loads(metadata["layers"]).items()
        }
        return cls(
            layers=dict(sorted(layers.items())),
            data=DataIdentity(**data) if data else None,
            config=json.loads(metadata["config"]),
            missing=json.loads(metadata["missing"]),
            token_texts={int(i): text for i, text in json.loads(metadata["token_texts"]).items()},
            fits={
                name: Fit(tensors=_named(tensors, f"fits.{name}."), facts=facts)
                for name, facts in json.loads(metadata["fits"]).items()
            },
            **provenance,
        )


def config_data(config: PretrainedConfig) -> dict[str, Any]:
    """A config as plain data, without names of folders of this machine."""
    data = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"):
        data.pop(name, None)
    return {"model_type": config.model_type} | data


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
