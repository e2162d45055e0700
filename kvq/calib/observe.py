"""Turn what one forward shows of a batch into statistics by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kvq.calib.attention import AttentionOptions, probe_weights, received_weights
from kvq.calib.observers import Histogram, JointMoments, Massive, Moments, Range, Reservoir, Sinks, Statistic
from kvq.calib.observers.sinks import PROBES
from kvq.calib.observers.tokens import real_tokens
from kvq.calib.stats import LayerStats
from kvq.calib.watch import Watcher
from kvq.errors import DataError
from kvq.models.rope import Rope
from kvq.transforms.frame import FRAME_TOKENS

_ON_TENSORS = {"range": Range, "histogram": Histogram, "moments": Moments, "joint_moments": JointMoments}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows of one forward.

    tokens     int64 [B, T].  valid  bool [B, T], False for padding, or None.
    priority   int64 [B]: ``window_priorities``.
    kept       rows that the reservoir keeps.
    first      number of the first window, for messages.
    """

    tokens: torch.Tensor
    valid: torch.Tensor | None
    priority: torch.Tensor
    kept: tuple[int, ...] = ()
    first: int = 0

    @property
    def positions(self) -> torch.Tensor:
        """int64 [B or 1, T]; each row counts its own tokens, so padding on the left does not move them."""
        if self.valid is None:
            return torch.arange(self.tokens.shape[1]).unsqueeze(0)
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)

    @property
    def windows(self) -> str:
        return f"windows {self.first} to {self.first + len(self.tokens) - 1}"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is measured on one layer.

    needs      as in ``kvq/calib/needs.py``.
    rope       its rotary embedding; None: its keys are not rotated, so they are the same before and after.
    missing    need -> why this layer cannot give it.
    capacity   bytes of its reservoir.
    """

    needs: frozenset[str]
    rope: Rope | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    capacity: int = 0

    def on(self, tensor: str) -> list[str]:
        return sorted(need for need in self.needs if need.startswith(f"{tensor}."))


class Observer(Watcher):
    """Measures one batch, told by ``kvq.calib.watch``."""

    def __init__(self, batch: Batch, layers: Mapping[int, LayerPlan]):
        self.batch = batch
        self.layers = layers
        self._parts: dict[int, dict[str, Statistic]] = {}
        self._sides: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hidden: dict[int, Massive] = {}
        # Sums that are NaN or infinite if anything was, looked at in the end: a look waits for the device.
        self._sums: list[tuple[int, str, torch.Tensor]] = []

    def saw_cache(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys after RoPE and values [B, K, T, D], as a layer gives them to its cache."""
        if index in self.layers:
            self._cache(index, key, value)

    def saw_attention(self, index: int, query: torch.Tensor, options: AttentionOptions) -> None:
        """Queries after RoPE [B, H, T, D] that read the keys of a layer; called again by layers that share them."""
        if index in self._sides:
            self._attention(index, query, options)

    def saw_hidden(self, index: int, hidden: torch.Tensor) -> None:
        """Hidden states [B, T, C] that enter a layer."""
        if index in self.layers and "massive" in self.layers[index].needs:
            tokens, valid = self.batch.tokens.to(hidden.device), self._valid(hidden)
            part = Massive.observe(hidden, tokens, valid, self.batch.priority)
            self._sums.append((index, "hidden states", part.channel_peak.sum()))
            self._hidden[index] = part

    def result(self) -> dict[int, LayerStats]:
        """What was measured, on the CPU.

        Raises DataError naming the first layer whose numbers are not finite.
        """
        self._check()
        for index, part in self._hidden.items():
            self._parts[index]["massive"] = part
        return {index: LayerStats(parts).cpu() for index, parts in sorted(self._parts.items())}

    def _cache(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._parts[index] = {}
        self._sides[index] = key, value
        self._measure(index, "key", "keys", key)
        self._measure(index, "value", "values", value)
        plan, positions = self.layers[index], self.batch.positions
        origins = {"key_pre": positions, "key_page": positions - positions % FRAME_TOKENS}
        for tensor, own in origins.items():
            if plan.on(tensor):
                self._measure(index, tensor, "keys", _turned_back(key, plan.rope, own))

    def _attention(self, index: int, query: torch.Tensor, options: AttentionOptions) -> None:
        plan, batch = self.layers[index], self.batch
        key, value = self._sides[index]
        valid = self._valid(query)
        if plan.on("query"):
            self._measure(index, "query", "queries", query, kv_heads=key.shape[1])
        if plan.on("query_pre"):
            before = _turned_back(query, plan.rope, batch.positions)
            self._measure(index, "query_pre", "queries", before, kv_heads=key.shape[1])
        if "value.weighted_moments" in plan.needs:
            weights = received_weights(query, key, valid, options)
            clean = value if valid is None else torch.where(valid[:, None, :, None], value, 0.0)
            self._add(index, "value.weighted_moments", Moments.observe(clean, weights))
        if "sinks" in plan.needs:
            weights, counts = probe_weights(query, key, valid, options, PROBES)
            self._add(index, "sinks", Sinks.observe(weights, key, value, batch.tokens, valid, batch.priority, counts))
        # A layer that only reads another's keys adds nothing to its reservoir.
        if "reservoir" in plan.needs and "reservoir" not in self._parts[index]:
            chosen = {"rows": batch.kept, "priority": batch.priority, "capacity": plan.capacity}
            part = Reservoir.observe(query, key, value, valid, scaling=options.scaling, **chosen)
            self._add(index, "reservoir", part)

    def _check(self) -> None:
        if self._sums:
            finite = torch.stack([total.cpu() for _, _, total in self._sums]).isfinite().tolist()
            for (index, what, _), good in zip(self._sums, finite):
                if not good:
                    raise DataError(
                        f"layer {index} gives {what} that are NaN or Inf in {self.batch.windows}: load the model in "
                        "bfloat16 or float32, or check its weights."
                    )

    def _measure(self, index: int, tensor: str, what: str, x: torch.Tensor, kv_heads: int | None = None) -> None:
        x = real_tokens(x, self._valid(x))
        if f"{tensor}.range" not in self.layers[index].needs:
            self._sums.append((index, what, x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).double()))
        for need in self.layers[index].on(tensor):
            kind = _ON_TENSORS.get(need.rpartition(".")[2])
            if kind is not None:
                part = kind.observe(x)
                if kind is Range:
                    self._sums.append((index, what, part.sum.sum()))
                self._add(index, need, part.grouped(kv_heads) if kv_heads else part)

    def _add(self, index: int, need: str, part: Statistic) -> None:
        parts = self._parts[index]
        parts[need] = parts[need].merge(part) if need in parts else part

    def _valid(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.batch.valid is None else self.batch.valid.to(x.device)


def _turned_back(key: torch.Tensor, rope: Rope | None, positions: torch.Tensor) -> torch.Tensor:
    """Keys or queries [B, K, T, D] turned back by ``positions`` [B or 1, T], in float32 or wider."""
    if rope is None:
        return key
    positions = positions.to(key.device)
    if key.device.type != "cpu":
        return rope.inverse(key, positions)
    # Row by row, so that what the model's function makes on the way stays in the CPU's cache.
    places = positions.expand(len(key), -1)
    return torch.cat([rope.inverse(key[row : row + 1], places[row : row + 1]) for row in range(len(key))])
