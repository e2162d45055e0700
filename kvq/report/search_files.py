"""The files of a search: a recipe for each budget, its evidence, and one picture of the front."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvq.atomic import check_writable, write_atomically
from kvq.errors import CheckpointError, DataError
from kvq.searching.outcome import Search
from kvq.searching.search_evidence import evidence, front_rows, recipe_text


@dataclass(frozen=True)
class SearchFiles:
    """shared: recipe file of all budgets together, which names what stands beside it. recipes: by budget."""

    shared: Path
    recipes: dict[float, Path]

    @classmethod
    def of(cls, out: str | Path, budgets: Sequence[float]) -> "SearchFiles":
        """Names from ``mine-{budget}.yaml``. Raises CheckpointError, before any work, if they cannot be written."""
        text = str(out)
        if len(set(budgets)) > 1 and "{budget}" not in text:
            raise CheckpointError("several budgets need a name each: write for example 'mine-{budget}.yaml'.")
        recipes = {budget: Path(text.replace("{budget}", f"{budget:g}")) for budget in budgets}
        for path in recipes.values():
            if path.suffix not in (".yaml", ".yml"):
                raise CheckpointError(f"{text!r} is no recipe file: end it in .yaml.")
            check_writable(path)
        if importlib.util.find_spec("matplotlib") is None:
            raise DataError("the picture of a search's front needs matplotlib: pip install 'kvq-toolkit[search]'.")
        return cls(Path(text.replace("{budget}", "all")), recipes)

    @property
    def journal(self) -> Path:
        return _beside(self.shared, ".journal.sqlite")

    def name(self, budget: float) -> str:
        return self.recipes[budget].stem

    def write(self, found: Search, command: Sequence[str]) -> None:
        """Write what was found, pictures and evidence first, so that no recipe stands without them."""
        # matplotlib takes a while, and a search that fails needs none.
        from kvq.report.drawing import png
        from kvq.report.pareto import pareto_figure, pareto_page

        front = front_rows(found)
        figure = pareto_figure(front)
        write_atomically(_beside(self.shared, ".front.png"), png(figure))
        write_atomically(_beside(self.shared, ".front.html"), pareto_page(front, figure))
        for point in found.points:
            path = self.recipes[point.budget]
            proof = _beside(path, ".evidence.json")
            write_atomically(proof, json.dumps(evidence(found, point, command), default=str) + "\n")
            write_atomically(path, recipe_text(point.chosen.recipe, point, proof.name))
        # Of a search that was cut, the journal stays: the same call goes on.
        if found.complete:
            self.journal.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.stem + ending)
