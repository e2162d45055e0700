"""Calibrate a model larger than memory: one decoder layer at a time, hidden states between layers on disk.

A layer is loaded once and all windows go through it, so that memory holds one layer's weights, one batch and the
layer's statistics. The layer is run by the model's own decoder with every other layer skipped, so that masks, rotary
embeddings and whatever else a family prepares are its own.

The state folder holds a file for each finished layer and the hidden states that enter the next one. A layer is finished
when its file is there, which is written last.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from kvq.calib.data import DataIdentity
from kvq.calib.forward import LOOK_POSITIONS, Look, plan_layers, run
from kvq.calib.job import Job, assemble, missing_of, refuse_missing
from kvq.calib.observe import Observer
from kvq.calib.ranks import Ranks
from kvq.calib.shell import Shell
from kvq.calib.spill import Spill
from kvq.calib.stats import LayerStats, Stats
from kvq.calib.tree import Node, Tree
from kvq.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


def collect_by_layer(
    shell: Shell,
    job: Job,
    state_folder: str | Path,
    *,
    strict: bool = False,
    progress=None,
    ranks: Ranks = Ranks(),  # noqa: B008
    model_name: str = "",
    weights_fingerprint: str = "",
    data: DataIdentity | None = None,
) -> Stats | None:
    """Measure a model layer by layer; arguments and statistics are those of ``collect``.

    state_folder   for hidden states and finished layers, and to continue from; remove it when the result is safe.
    progress       called with (windows through layers done, windows times layers).

    Raises UnsupportedModelError for a family whose layers take more from each other than hidden states.
    """
    mine = list(ranks.share(job.batches))
    files = LayerFiles(Path(state_folder), job.identity(weights_fingerprint, ranks.world, "by layer"), ranks.rank)
    parts = ranks.gather(lambda: _Sweep(shell, job, mine, files, strict, progress).run())
    if not parts:
        return None
    layers = {}
    for index in parts[0][0]:
        tree: Tree[LayerStats] = Tree(LayerStats.merge)
        for nodes, _ in parts:
            for node, part in nodes.get(index, {}).items():
                tree.add(node, part)
        layers[index] = tree.total()
    return assemble(shell.model.config, layers, parts[0][1], model_name, weights_fingerprint, data)


class LayerFiles:
    """What is on disk of one process's sweep: ``layer-{rank}-{i}.safetensors`` and ``hidden-{rank}-{i}.bin``."""

    def __init__(self, folder: Path, run: str, rank: int):
        self.folder, self.run, self.rank = folder, run, rank
        folder.mkdir(exist_ok=True)
        marker = folder / f"run-{rank}"
        if not marker.exists() or marker.read_text() != run:
            if any(self.folder.glob(f"*-{rank}-*")):
                logger.warning("Starting over: %s belongs to a run with other arguments.", folder.name)
            self.clear()
            marker.write_text(run)

    def clear(self) -> None:
        for path in self.folder.glob(f"*-{self.rank}-*"):
            path.unlink()

    def hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{self.rank}-{index}.bin"

    def layer(self, index: int) -> Path:
        return self.folder / f"layer-{self.rank}-{index}.safetensors"

    def finished(self) -> int:
        """How many layers are finished, from the first on."""
        count = 0
        while self.layer(count).exists():
            count += 1
        return count

    def save(self, index: int, nodes: dict[Node, LayerStats], missing: dict[str, str], facts: dict[str, str]) -> None:
        numbered = Stats(layers=dict(enumerate(nodes.values())), model="", model_fingerprint="", missing=missing)
        numbered.save(self.layer(index), extra={"run": self.run, "nodes": json.dumps(list(nodes)), **facts})

    def load(self, index: int) -> tuple[dict[Node, LayerStats], dict[str, str], dict[str, str]]:
        """Nodes, what is missing and the facts of a finished layer."""
        stats, metadata = Stats.load_with_metadata(self.layer(index))
        nodes = [tuple(node) for node in json.loads(metadata["nodes"])]
        return dict(zip(nodes, stats.layers.values(), strict=True)), dict(stats.missing), metadata


class _Sweep:
    """One process's batches through all layers."""

    def __init__(self, shell: Shell, job: Job, mine: list[int], files: LayerFiles, strict: bool, progress):
        self.shell, self.job, self.mine, self.files = shell, job, mine, files
        self.strict, self.progress = strict, progress
        self.measured = {layer.index for layer in job.spec.cached_layers}
        # The lone tokens go through the layers before the windows, at each of the positions to look at.
        self.inputs = [(job.lone, None, torch.full((1, 1), position)) for position in LOOK_POSITIONS]
        self.inputs += [(b.tokens, b.valid, b.positions) for b in map(job.batch, mine)]
        self.shapes = [tuple(tokens.shape) for tokens, _, _ in self.inputs]
        self.windows = sum(len(job.rows(number)) for number in mine)
        # Families differ in whether a layer returns its hidden states alone or first in a tuple.
        self.in_tuple = False

    def run(self) -> tuple[dict[int, dict[Node, LayerStats]], dict[str, str]]:
        """Nodes of every measured layer, and what they lack."""
        start, count = self.files.finished(), len(self.shell.layers)
        if start:
            self.in_tuple = self.files.load(start - 1)[2]["in_tuple"] == "True"
        elif not self.files.hidden(0).exists():
            self._embed()
        self._tell(start * self.windows)
        for index in range(start, count):
            with self.shell.layer(index):
                self._layer(index)
        found, missing = {}, {}
        for index in sorted(self.measured):
            found[index], lacking, _ = self.files.load(index)
            missing |= lacking
        return found, missing

    def _tell(self, done: int) -> None:
        if self.progress:
            self.progress(done, len(self.shell.layers) * self.windows)

    def _embed(self) -> None:
        """Write what enters the first layer."""
        spill = None
        with self.shell.embeddings(), torch.inference_mode():
            for number, (tokens, valid, positions) in enumerate(self.inputs):
                states = self._entering(tokens, valid, positions)
                if spill is None:
                    spill = Spill.create(self.files.hidden(0), self.shapes, states.shape[-1], states.dtype)
                spill.write(number, states)
        spill.finish()

    def _layer(self, index: int) -> None:
        """Run and measure all batches through one layer, and write what leaves it."""
        last = index == len(self.shell.layers) - 1
        before = Spill.open(self.files.hidden(index), self.shapes, self.shell.dtype)
        plans, left = self._look(index, before)
        if self.strict:
            refuse_missing(plans)
        after = None if last else Spill.create(self.files.hidden(index + 1), self.shapes, before.width, before.dtype)
        tree: Tree[LayerStats] = Tree(LayerStats.merge)
        try:
            for position, states in enumerate(left if after else ()):
                after.write(position, states)
            for position, number in enumerate(self.mine, start=len(left)):
                observer = Observer(self.job.batch(number), plans)
                states = self._through(index, before.read(position), *self.inputs[position], observer)
                if after:
                    after.write(position, states)
                if index in plans:
                    tree.add((0, number), observer.result()[index])
                done = sum(shape[0] for shape in self.shapes[len(left) : position + 1])
                self._tell(index * self.windows + done)
        except BaseException:
            if after:
                after.abandon()
            raise
        finally:
            before.close()
        if after:
            after.finish()
        self.files.save(index, tree.nodes, missing_of(plans), {"in_tuple": str(self.in_tuple)})
        self.files.hidden(index).unlink()

    def _look(self, index: int, before: Spill):
        """What the layer lets be measured ({} for one that is not), and the lone tokens as they leave it."""
        looks = tuple(Look([index]) for _ in LOOK_POSITIONS)
        left = [self._through(index, before.read(i), *self.inputs[i], watcher) for i, watcher in enumerate(looks)]
        if not bool(left[0].isfinite().all()):
            self._refuse_other_inputs(index, before.read(0))
        if index not in self.measured:
            return {}, left
        return plan_layers(self.job.spec, looks, self.job.needs, self.job.capacities), left

    def _refuse_other_inputs(self, index: int, lone: torch.Tensor) -> None:
        """NaN stands in for the embeddings, which only the first layer may see: do zeros instead make all well?"""
        left = self._through(index, lone, *self.inputs[0], Look([index]), standing_in=0.0)
        if bool(left.isfinite().all()):
            raise UnsupportedModelError(
                f"{self.job.spec.model_type!r} cannot be calibrated layer by layer: its layer {index} takes more than "
                "the hidden states of the one before; leave --layer-by-layer and --memory-limit out."
            )

    def _entering(self, tokens, valid, positions) -> torch.Tensor:
        """Hidden states that enter the first layer."""
        box = []

        def take(module, args, kwargs):
            box.append(args[0] if args else kwargs["hidden_states"])
            raise _Done

        hook = self.shell.layers[0].register_forward_pre_hook(take, with_kwargs=True)
        try:
            with contextlib.suppress(_Done):
                run(self.shell.model, Look([]), tokens, valid, positions, device=self.shell.device)
        finally:
            hook.remove()
        if box[0].ndim != 3:
            raise UnsupportedModelError(
                f"{self.job.spec.model_type!r} cannot be calibrated layer by layer: its hidden states have "
                f"{box[0].ndim} dimensions; leave --layer-by-layer and --memory-limit out."
            )
        return box[0]

    @torch.inference_mode()
    def _through(self, index, states, tokens, valid, positions, watcher, standing_in=float("nan")) -> torch.Tensor:
        """Hidden states [B, T, C] through one layer, which ``watcher`` sees."""
        states = states.to(self.shell.device)
        box = []

        def give(module, args, kwargs):
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        def take(module, args, output):
            self.in_tuple = isinstance(output, tuple)
            box.append(output[0] if self.in_tuple else output)
            raise _Done

        layer = self.shell.layers[index]
        hooks = [layer.register_forward_pre_hook(give, with_kwargs=True), layer.register_forward_hook(take)]
        with self._skipping(index):
            try:
                embeddings = torch.full_like(states, standing_in)
                with contextlib.suppress(_Done):
                    run(self.shell.model, watcher, tokens, valid, positions, embeddings, self.shell.device)
            finally:
                for hook in hooks:
                    hook.remove()
        return box[0]

    @contextlib.contextmanager
    def _skipping(self, index: int) -> Iterator[None]:
        """Layers before ``index`` hand on what they are given."""
        skipped = list(self.shell.layers[:index])
        for layer in skipped:
            layer.forward = self._handed_on
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward

    def _handed_on(self, hidden_states, *args, **kwargs):
        return (hidden_states,) if self.in_tuple else hidden_states


class _Done(Exception):
    """Ends a forward once the wanted layer has run."""
