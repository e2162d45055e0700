"""Are statistics those of the model in a folder?"""

from pathlib import Path

from kvq.calib.data import tokenizer_hash
from kvq.calib.stats import Stats
from kvq.errors import CheckpointError
from kvq.models.describe import ModelSpec
from kvq.models.resolve import load_tokenizer, weights_fingerprint


def check_stats(stats: Stats, spec: ModelSpec, folder: Path, *, other_weights: bool = False) -> None:
    """Compare shape, weights and tokenizer with those of a checkpoint; ``spec`` describes it.

    other_weights   weights may differ, and only these.

    Raises CheckpointError if statistics are of another model. A folder without a readable tokenizer, and statistics of
    a caller's own tokens, are not compared in that.
    """
    # First what costs nothing.
    stats.check_model(spec)
    stats.check_model(spec, None if other_weights else weights_fingerprint(folder), _tokenizer_of(stats, folder))


def _tokenizer_of(stats: Stats, folder: Path) -> str | None:
    if stats.data is None:
        return None
    try:
        return tokenizer_hash(load_tokenizer(folder))
    except CheckpointError:
        return None
