"""Run a model over token windows and measure the keys and values that its cache receives.

Keys and values are seen in the cache's ``update``: there they are post-RoPE, in every model family, whatever computes
the attention. The model is not changed; it is only handed a cache that measures.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from kvq.calib.data import DataIdentity
from kvq.calib.observers import observe
from kvq.calib.stats import LayerStats, Stats
from kvq.errors import CheckpointError, DataError, UnsupportedModelError
from kvq.models.describe import ModelSpec, describe

SAVE_SECONDS = 30.0

logger = logging.getLogger(__name__)


class ObservingCache(DynamicCache):
    """A DynamicCache that measures what the layers in ``wanted`` give it, and otherwise behaves like one.

    ``seen``    LayerStats by layer index, of everything given so far.
    ``valid``   bool [B, T], False for padding, or None. It fits one forward.
    """

    def __init__(self, config: PretrainedConfig, wanted: frozenset[int], valid: torch.Tensor | None = None):
        super().__init__(config=config)
        self.wanted = wanted
        self.valid = valid
        self.seen: dict[int, LayerStats] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx in self.wanted:
            valid = self.valid.to(key_states.device) if self.valid is not None else None
            _merge_into(self.seen, layer_idx, LayerStats(observe(key_states, valid), observe(value_states, valid)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def collect(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    resume_path: str | Path | None = None,
    model_name: str = "",
    weights_fingerprint: str = "",
    data: DataIdentity | None = None,
) -> Stats:
    """Measure post-RoPE keys and values by head and channel over token windows int64 [N, T].

    valid         bool [N, T], False for padding on either side; None: no padding.
    batch_size    windows a forward; the model's head is not run.
    progress      called with (windows done, windows in all) after each batch, and first with what was resumed.
    resume_path   where the state is kept while this runs: written every 30 seconds and when interrupted, removed at
                  the end. The same call then continues and gives the same statistics to the bit. A file of another
                  call is not used, with a warning.
    model_name, weights_fingerprint, data   provenance, as in Stats.

    Raises DataError if activations are NaN or Inf, UnsupportedModelError if the model has no cache to measure.
    """
    _check_arguments(windows, valid, batch_size)
    spec = describe(model.config)
    empty = Stats(
        layers={},
        model=model_name or spec.model_type,
        model_fingerprint=spec.fingerprint,
        weights_fingerprint=weights_fingerprint,
        data=data,
        versions={package: version(package) for package in ("kvq-toolkit", "torch", "transformers")},
    )
    partial = _Partial(resume_path, empty, _identity(model, windows, valid, batch_size)) if resume_path else None
    done, layers = partial.load() if partial else (0, {})
    total = len(windows)
    if progress:
        progress(done, total)
    try:
        while done < total:
            batch = slice(done, min(done + batch_size, total))
            seen = _measure(model, spec, windows[batch], None if valid is None else valid[batch], batch)
            # One assignment: an interrupt leaves the state before or after this batch, never between.
            done, layers = batch.stop, _merged(layers, seen)
            if progress:
                progress(done, total)
            if partial and done < total:
                partial.save_now_and_then(done, layers)
    except KeyboardInterrupt:
        if partial:
            partial.save(done, layers)
        raise
    if partial:
        partial.path.unlink(missing_ok=True)
    return _with_layers(empty, layers)


def _check_arguments(windows: torch.Tensor, valid: torch.Tensor | None, batch_size: int) -> None:
    if windows.ndim != 2 or not windows.numel():
        raise DataError(f"token windows have shape {tuple(windows.shape)}: give at least one window, as [N, T].")
    if valid is not None and (valid.shape != windows.shape or valid.dtype != torch.bool):
        raise DataError(f"valid is {valid.dtype} {tuple(valid.shape)}: give bool of shape {tuple(windows.shape)}.")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is not a number of windows: use 1 or more.")


@torch.inference_mode()
def _measure(
    model: PreTrainedModel, spec: ModelSpec, tokens: torch.Tensor, valid: torch.Tensor | None, rows: slice
) -> dict[int, LayerStats]:
    """Statistics of one batch [B, T] by layer, on the CPU."""
    inputs = {"input_ids": tokens.to(model.device)}
    if valid is not None:
        # Each row counts its own tokens, so that padding on the left does not move the rotary positions.
        inputs["attention_mask"] = valid.long().to(model.device)
        inputs["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0).to(model.device)
    wanted = frozenset(layer.index for layer in spec.full_layers)
    cache = ObservingCache(model.config, wanted, valid)
    # The decoder alone: logits of a large vocabulary cost more than the measuring.
    model.get_decoder()(**inputs, past_key_values=cache, use_cache=True)
    silent = wanted - cache.seen.keys()
    if silent:
        raise UnsupportedModelError(
            f"layer {min(silent)} of this {spec.model_type!r} never wrote to the cache it was given, so its keys and "
            "values cannot be measured: this model cannot be calibrated."
        )
    for index, layer in sorted(cache.seen.items()):
        for side in ("key", "value"):
            if not getattr(layer, side).is_finite:
                raise DataError(
                    f"layer {index} gives {side}s that are NaN or Inf in windows {rows.start} to {rows.stop - 1}: load "
                    "the model in bfloat16 or float32, or check its weights."
                )
    return {index: layer.cpu() for index, layer in cache.seen.items()}


def _merge_into(layers: dict[int, LayerStats], index: int, seen: LayerStats) -> None:
    layers[index] = layers[index].merge(seen) if index in layers else seen


def _merged(layers: dict[int, LayerStats], seen: dict[int, LayerStats]) -> dict[int, LayerStats]:
    merged = dict(layers)
    for index, layer in seen.items():
        _merge_into(merged, index, layer)
    return merged


def _with_layers(empty: Stats, layers: dict[int, LayerStats]) -> Stats:
    facts = {name: value for name, value in vars(empty).items() if name != "layers"}
    return Stats(layers=dict(sorted(layers.items())), **facts)


def _identity(model: PreTrainedModel, windows: torch.Tensor, valid: torch.Tensor | None, batch_size: int) -> str:
    """Hash of everything that decides the statistics beyond their provenance."""
    digest = hashlib.sha256(f"{batch_size} {model.dtype} {tuple(windows.shape)}".encode())
    for tensor in (windows, valid):
        digest.update(b"-" if tensor is None else tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Partial:
    """The state of an unfinished run, as a statistics file with two more entries of metadata."""

    def __init__(self, path: str | Path, empty: Stats, identity: str):
        self.path = Path(path)
        self.empty = empty
        facts = json.dumps([empty.provenance(), identity], sort_keys=True)
        self.run = hashlib.sha256(facts.encode()).hexdigest()
        self.saved_at = time.monotonic()

    def load(self) -> tuple[int, dict[int, LayerStats]]:
        """Windows done and what they gave: (0, {}) if there is no file of the same run."""
        if not self.path.exists():
            return 0, {}
        try:
            stats, metadata = Stats.load_with_metadata(self.path)
        except CheckpointError as error:
            logger.warning("Starting over: the unfinished run cannot be continued (%s)", error)
            return 0, {}
        if metadata.get("run") != self.run:
            logger.warning("Starting over: %s belongs to a run with other arguments.", self.path.name)
            return 0, {}
        return int(metadata["windows_done"]), dict(stats.layers)

    def save(self, done: int, layers: dict[int, LayerStats]) -> None:
        _with_layers(self.empty, layers).save(self.path, extra={"run": self.run, "windows_done": str(done)})
        self.saved_at = time.monotonic()

    def save_now_and_then(self, done: int, layers: dict[int, LayerStats]) -> None:
        if time.monotonic() - self.saved_at >= SAVE_SECONDS:
            self.save(done, layers)
