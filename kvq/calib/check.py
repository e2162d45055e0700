"""Are statistics those of a model? Only then do they give a recipe its artefacts."""

from pathlib import Path

import torch

from kvq.calib.artefacts import fit_artefacts
from kvq.calib.data import tokenizer_hash
from kvq.calib.stats import Stats
from kvq.errors import CheckpointError
from kvq.models.describe import ModelSpec
from kvq.models.resolve import load_tokenizer, weights_fingerprint
from kvq.recipe import Recipe


def check_stats(stats: Stats, spec: ModelSpec, folder: Path, *, other_weights: bool = False) -> None:
    """Compare shape, weights and tokenizer with those of a checkpoint; ``spec`` describes it.

    other_weights   weights may differ, and only these.

    Raises CheckpointError if statistics are of another model. A folder without a readable tokenizer, and statistics of
    a caller's own tokens, are not compared in that.
    """
    # First what costs nothing.
    stats.check_model(spec)
    stats.check_model(spec, None if other_weights else weights_fingerprint(folder), _tokenizer_of(stats, folder))


def checked_artefacts(
    recipe: Recipe, spec: ModelSpec, stats: Stats | str | Path | None, folder: Path | None
) -> dict[str, torch.Tensor] | None:
    """What statistics, or their file, give a recipe on the model in ``folder``; None without statistics.

    folder   None for a model whose checkpoint is not known: only its shape is compared then.
    """
    if stats is None:
        return None
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    if folder is None:
        stats.check_model(spec)
    else:
        check_stats(stats, spec, folder)
    return fit_artefacts(recipe, spec, stats, folder)


def _tokenizer_of(stats: Stats, folder: Path) -> str | None:
    if stats.data is None:
        return None
    try:
        return tokenizer_hash(load_tokenizer(folder))
    except CheckpointError:
        return None
