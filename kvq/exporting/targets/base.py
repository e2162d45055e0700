"""What a target is: the form in which an export is written, and for whom."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.cache import CachePlan
from kvq.exporting.checkpoint import PROVENANCE, quantization_of, to_json
from kvq.exporting.fold_check import FoldCheck
from kvq.models.describe import ModelSpec
from kvq.transforms.fold_plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export, the same for every target.

    source       the model's folder; config: its config.json as plain data.
    model        the model as ``describe`` sees it; plan: of the model as the target sees it (``Target.view``).
    artefacts    what calibration made for the plan.
    companions   tokenizer, generation and processor files, by name.
    provenance   where all this comes from.
    licence      the licence fields of the source's model card.
    folder       name of the folder that is written, for commands in the card.
    weights      fingerprint of the weights that are written (of the source's before they are).
    folds        transforms that they have taken over; check: what was compared, None before that and without folds.
    """

    source: Path
    config: Mapping[str, Any]
    model: ModelSpec
    plan: CachePlan
    artefacts: Mapping[str, torch.Tensor]
    companions: Mapping[str, bytes]
    provenance: Mapping[str, Any]
    licence: Mapping[str, str]
    folder: str
    weights: str
    folds: FoldPlan
    check: FoldCheck | None

    @property
    def quantized(self) -> Mapping[str, Any] | None:
        """The source's own ``quantization_config``; None for unquantized weights."""
        return quantization_of(self.config)

    def origin(self, target: str) -> dict[str, bytes]:
        """The file that says where an export comes from, by its name."""
        return {PROVENANCE: to_json(dict(sorted({**self.provenance, "target": target}.items())))}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of the target table (``kvq.exporting.targets.TARGETS``).

    name, summary   for the command line and the documents.
    engines         engines that load the folder, as ``kvq.exporting.engines`` knows them, the main one first.
    formats         quant_method of a source's weights (None: unquantized) -> quant_method that is written.
    contents        every file except weights, companions and manifest, by name. Raises RecipeError or CheckpointError
                    for what the target cannot express.
    weights         name in the export -> file of the source.
    sliding         True if the cache of sliding-window layers is quantized too.
    hash_limit      larger files have no hash in the manifest, in bytes.
    """

    name: str
    summary: str
    engines: tuple[str, ...]
    formats: Mapping[str | None, str]
    contents: Callable[["Target", Job], dict[str, bytes]]
    weights: Callable[[Path], dict[str, Path]]
    sliding: bool = True
    hash_limit: float = math.inf
