"""What a calibration has to do, cut into numbered batches, and how the parts of several processes are joined."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from kvq.calib.needs import check_needs
from kvq.calib.observe import Batch, LayerPlan
from kvq.calib.observers.reservoir import choose_windows
from kvq.calib.observers.tokens import window_priorities
from kvq.calib.ranks import Ranks
from kvq.calib.run_state import Layers, RunState
from kvq.calib.stats import config_data
from kvq.calib.tree import Node, Tree
from kvq.errors import DataError, UnsupportedModelError
from kvq.models.describe import ModelSpec

_LONE = 4
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Windows of one model, to be measured batch by batch.

    tokens      int64 [N, T].  valid  bool [N, T] or None.
    needs       what is measured.  batch_size  windows of a forward.
    priority    int64 [N], and ``kept`` bool [N]: the windows that the reservoir keeps.
    capacities  bytes of the reservoir of each layer.
    dtype       of the model.
    """

    spec: ModelSpec
    tokens: torch.Tensor
    valid: torch.Tensor | None
    needs: frozenset[str]
    batch_size: int
    seed: int
    dtype: torch.dtype
    priority: torch.Tensor
    kept: torch.Tensor
    capacities: Mapping[int, int]

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        tokens: torch.Tensor,
        valid: torch.Tensor | None,
        needs: frozenset[str],
        *,
        batch_size: int,
        seed: int,
        dtype: torch.dtype,
        reservoir_bytes: int,
    ) -> "Job":
        """Raises DataError for arguments that cannot be measured."""
        if tokens.ndim != 2 or not tokens.numel():
            raise DataError(f"token windows have shape {tuple(tokens.shape)}: give at least one window, as [N, T].")
        if valid is not None and (valid.shape != tokens.shape or valid.dtype != torch.bool):
            raise DataError(f"valid is {valid.dtype} {tuple(valid.shape)}: give bool of shape {tuple(tokens.shape)}.")
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size} is not a number of windows: use 1 or more.")
        priority = window_priorities(tokens, valid, seed)
        kept, capacities = torch.zeros(len(tokens), dtype=torch.bool), {}
        if "reservoir" in check_needs(needs):
            lengths = torch.full((len(tokens),), tokens.shape[1]) if valid is None else valid.sum(1)
            kept, capacities = _reservoir(spec, lengths, priority, dtype, reservoir_bytes)
        return cls(
            spec=spec, tokens=tokens, valid=valid, needs=needs, batch_size=batch_size, seed=seed, dtype=dtype,
            priority=priority, kept=kept, capacities=capacities,
        )  # fmt: skip

    @property
    def lone(self) -> torch.Tensor:
        """A few tokens alone, int64 [P, 1], from which is learned what layers show (``kvq.calib.forward.look``)."""
        return self.tokens[:_LONE, :1] if self.valid is None else self.tokens[self.valid][:_LONE, None]

    @property
    def batches(self) -> range:
        return range(-(-len(self.tokens) // self.batch_size))

    def rows(self, number: int) -> range:
        """The windows of a batch."""
        return range(len(self.tokens))[number * self.batch_size : (number + 1) * self.batch_size]

    def batch(self, number: int) -> Batch:
        rows = slice(self.rows(number).start, self.rows(number).stop)
        tokens, valid = self.tokens[rows], None if self.valid is None else self.valid[rows]
        if valid is not None:
            # Columns that are padding in every row cost time and change nothing.
            used = valid.any(0).nonzero().flatten()
            columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
            tokens, valid = tokens[:, columns], valid[:, columns]
            valid = None if bool(valid.all()) else valid
        return Batch(
            tokens=tokens,
            valid=valid,
            priority=self.priority[rows],
            kept=tuple(self.kept[rows].nonzero().flatten().tolist()),
            first=rows.start,
        )

    def identity(self, *more: Any) -> str:
        """Hash of everything that decides the statistics beyond the model; ``more`` is added to it."""
        facts = [sorted(self.needs), self.batch_size, self.seed, str(self.dtype), self.capacities, more]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for tensor in (self.tokens, self.valid):
            digest.update(b"-" if tensor is None else tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def run_job(
    job: Job,
    ranks: Ranks,
    state: RunState | None,
    measure: Callable[[Batch], Layers],
    progress: Progress | None = None,
) -> Layers | None:
    """All batches of a job measured and joined: every process does its share, and the first gets the result.

    What ``state`` holds is not done again. ``progress`` is called with (windows done, windows in all) after each batch,
    and first with what was there.
    """
    done = state.load() if state and ranks.is_first else {}
    nodes: list[Node] = ranks.agree(list(done))
    finished = Tree(join_layers)
    finished.nodes = dict.fromkeys(nodes)
    mine = list(ranks.share(finished.missing(job.batches)))
    tree = Tree(join_layers)
    tree.nodes = done

    def run() -> dict[Node, Layers]:
        _run(job, measure, mine, tree, state, progress or (lambda done, total: None))
        return tree.nodes

    parts = ranks.gather(run)
    if not parts:
        return None
    for part in parts[1:]:
        for node, layers in part.items():
            tree.add(node, layers)
    return tree.total()


def _run(job: Job, measure, mine: list[int], tree: Tree[Layers], state: RunState | None, progress: Progress) -> None:
    """Measure the batches ``mine`` into the tree, which may hold others already."""
    total = sum(len(job.rows(number)) for number in job.batches if not tree.missing([number]) or number in mine)
    done = total - sum(len(job.rows(number)) for number in mine)
    progress(done, total)
    try:
        for number in mine:
            tree.add((0, number), measure(job.batch(number)))
            done += len(job.rows(number))
            progress(done, total)
            if state:
                state.save_now_and_then(tree)
    except KeyboardInterrupt:
        if state and tree.nodes:
            state.save(tree)
        raise


def refuse_missing(plans: Mapping[int, LayerPlan]) -> None:
    """Raise UnsupportedModelError for the first need that some layer cannot give."""
    for index, plan in sorted(plans.items()):
        for need, why in sorted(plan.missing.items()):
            raise UnsupportedModelError(f"{need!r} of layer {index} cannot be measured: {why}")


def state_of(folder: str | Path | None, job: Job, config: PretrainedConfig, *more: Any) -> RunState | None:
    """The resumable state of a job, or None without a folder; ``more``: what else makes it another run."""
    return RunState(folder, job.identity(config_data(config), *more)) if folder else None


def join_layers(left: Layers, right: Layers) -> Layers:
    return {index: layer.merge(right[index]) for index, layer in left.items()}


def _reservoir(spec: ModelSpec, lengths: torch.Tensor, priority: torch.Tensor, dtype: torch.dtype, capacity: int):
    """Which windows are kept, and what each layer's part of the capacity is."""
    # float64 is kept as float32.
    itemsize = min(dtype.itemsize, 4)
    token = {la.index: (spec.num_heads + 2 * la.kv_heads) * la.head_dim * itemsize for la in spec.full_layers}
    total = sum(token.values())
    kept = choose_windows(priority, [int(n) * total for n in lengths], capacity)
    if not bool(kept.any()):
        first = int(lengths[int(priority.argmin())]) * total
        raise DataError(
            f"a reservoir of {capacity / 1e6:,.0f} MB has no room for one window, which takes {first / 1e6:,.0f} MB: "
            "allow more, or use shorter windows."
        )
    # As many tokens as were chosen fit exactly, in every layer.
    tokens = capacity // total
    return kept, {index: tokens * size for index, size in token.items()}
