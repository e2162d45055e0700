"""What an unfinished calibration keeps on disk, so that it continues where it was stopped, at any moment.

A folder with one statistics file for each node of the tree of batches (``kvq.calib.tree``), written whole or not at all
(``kvq.calib.file``). What is there is what was done, so there is no list that could disagree with it.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvq.calib.file import read_file, write_file
from kvq.calib.stats import STATS_VERSION, LayerStats, Stats
from kvq.calib.tree import Node, Tree, covered
from kvq.errors import CheckpointError

# Saving takes at most this share of the time.
SAVE_SHARE = 0.05

Layers = Mapping[int, LayerStats]

logger = logging.getLogger(__name__)


class RunState:
    """The nodes of one run in ``folder``. Those of another run are removed, with a warning.

    run   hash of everything that decides the statistics.
    """

    def __init__(self, folder: str | Path, run: str):
        self.folder = Path(folder)
        self.run = run
        self._cost, self._saved_at = 0.0, 0.0

    def load(self) -> dict[Node, Layers]:
        """Finished nodes; none is part of another."""
        found: dict[Node, Layers] = {}
        for path in sorted(self.folder.glob("part-*.safetensors"), key=lambda p: -_node(p)[0]):
            node = _node(path)
            # An interrupted save may leave a node beside the larger one that it went into.
            if any(covered(node).start in covered(larger) for larger in found):
                continue
            try:
                stats, metadata = Stats.load_with_metadata(path)
            except CheckpointError as error:
                logger.warning("Starting over: the unfinished run cannot be continued (%s)", error)
                return self._emptied()
            if metadata.get("run") != self.run:
                logger.warning("Starting over: %s belongs to a run with other arguments.", self.folder.name)
                return self._emptied()
            found[node] = dict(stats.layers)
        return found

    def save(self, tree: Tree[Layers]) -> None:
        """Write the nodes that are not on disk yet, then remove those that went into them."""
        start = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for node, layers in tree.nodes.items():
                path = self._path(node)
                if not path.exists():
                    empty = Stats(layers=layers, model="", model_fingerprint="")
                    empty.save(path, extra={"run": self.run})
        except CheckpointError:
            self._remove_if_empty()
            raise
        for path in self.folder.glob("part-*.safetensors"):
            node = _node(path)
            if node not in tree.nodes and any(covered(node).start in covered(larger) for larger in tree.nodes):
                path.unlink(missing_ok=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start

    def save_now_and_then(self, tree: Tree[Layers]) -> None:
        """Save if the time since the last save allows it."""
        if time.monotonic() - self._saved_at >= self._cost / SAVE_SHARE:
            self.save(tree)

    def _emptied(self) -> dict[Node, Layers]:
        # Of what else is in the folder, everything knows its own run.
        for path in self.folder.glob("part-*.safetensors"):
            path.unlink(missing_ok=True)
        return {}

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, node: Node) -> Path:
        level, index = node
        return self.folder / f"part-{level}-{index}.safetensors"


def save_learned(path: Path, run: str, tensors: Mapping[str, torch.Tensor], facts: Any) -> None:
    """Keep what was learned in the run ``run``: tensors, and facts as plain data. Raises CheckpointError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors, {"kvq_stats": STATS_VERSION, "run": run, "facts": json.dumps(facts)})


def saved_learned(path: Path, run: str) -> tuple[dict[str, torch.Tensor], Any] | None:
    """What ``save_learned`` kept in an interrupted call of the same run; None if there is nothing of it."""
    try:
        tensors, metadata = read_file(path, STATS_VERSION)
    except CheckpointError:
        return None
    return (tensors, json.loads(metadata["facts"])) if metadata.get("run") == run else None


def _node(path: Path) -> Node:
    level, index = re.fullmatch(r"part-(\d+)-(\d+)", path.stem).groups()
    return int(level), int(index)
