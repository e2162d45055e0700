"""Measure whole recipes on text that the search did not use, and judge them by metric and floors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvq.cache import CachePlan, make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.stats import Stats
from kvq.errors import DataError, suggest
from kvq.eval.likelihood import Windows, score_windows
from kvq.eval.paired import mean_of
from kvq.models.describe import ModelSpec
from kvq.recipe import Recipe
from kvq.searching.journal import Journal
from kvq.searching.text_split import Part

# Metrics that a floor may name: +1 for those that must not fall below it, -1 for those that must not rise above.
FLOORS = {"top1": 1, "kl": -1, "delta_nll": -1}
METRICS = ("kl", "top1")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A recipe on some windows: KL (nats a token), share of unchanged top-1 tokens, loss over the exact model's (nats).

    Standard errors over windows; None for one window.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    delta_nll: float
    delta_nll_stderr: float | None
    tokens: int
    windows: int

    def better(self, metric: str) -> float:
        """A number that is less for a better recipe."""
        return self.kl if metric == "kl" else -self.top1

    @classmethod
    def pooled(cls, parts: Sequence["Measured"]) -> "Measured":
        """Of several texts together; errors as of texts that are independent."""
        tokens = sum(part.tokens for part in parts)
        shares = [part.tokens / tokens for part in parts]

        def error(name: str) -> float | None:
            own = [getattr(part, name) for part in parts]
            return None if None in own else math.hypot(*(share * e for share, e in zip(shares, own)))

        means = {n: sum(s * getattr(p, n) for s, p in zip(shares, parts)) for n in ("kl", "top1", "delta_nll")}
        errors = {name: error(name) for name in ("kl_stderr", "delta_nll_stderr")}
        return cls(**means, **errors, tokens=tokens, windows=sum(part.windows for part in parts))

    def missed(self, floors: Mapping[str, float]) -> dict[str, float]:
        """Floors that are not kept, with what was measured."""
        return {
            name: getattr(self, name)
            for name, bound in floors.items()
            if FLOORS[name] * (getattr(self, name) - bound) < 0
        }


def parse_floors(texts: Sequence[str]) -> dict[str, float]:
    """``top1=0.95`` to {"top1": 0.95}. Raises DataError for an unknown metric or no number."""
    floors = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in FLOORS:
            raise DataError(f"floor {text!r} names no metric.{suggest(name, FLOORS)}")
        try:
            floors[name] = float(value)
        except ValueError:
            raise DataError(f"floor {text!r} has no number: write for example top1=0.95.") from None
    return floors


class Verifier:
    """Measures recipes; every (part, recipe, window) is one job of the journal."""

    def __init__(
        self, model: PreTrainedModel, spec: ModelSpec, stats: Stats | None, folder: Path | None, journal: Journal
    ):
        self.model, self.spec, self.stats, self.folder, self.journal = model, spec, stats, folder, journal
        self._plans: dict[str, CachePlan] = {}

    def plan(self, recipe: Recipe) -> CachePlan:
        if recipe.hash not in self._plans:
            tensors = fit_artefacts(recipe, self.spec, self.stats, self.folder) if self.stats is not None else None
            self._plans[recipe.hash] = make_plan(recipe, self.spec, tensors)
        return self._plans[recipe.hash]

    def measure(
        self,
        part: str,
        recipes: Sequence[Recipe],
        windows: Part,
        progress: Callable[[int, int], None] | None = None,
        late: Callable[[float], bool] = lambda ahead: False,
        least: int = 1,
    ) -> dict[str, Measured]:
        """Results by recipe hash; ``part`` names the windows.

        late     says that there is no time for work of so many seconds. Then fewer windows are measured; of the first
                 one the first ``least`` recipes at any rate, and those that are not measured on it have no result.
        """
        hashes = list(dict.fromkeys(recipe.hash for recipe in recipes))
        plans = {recipe.hash: self.plan(recipe) for recipe in recipes}
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in hashes}
        took, count = 0.0, len(windows.windows)
        for number in range(count):
            if progress:
                progress(number, count)
            jobs = {name: f"{part}/{number}/{name}" for name in hashes}
            new = {name: plans[name] for name in hashes if jobs[name] not in self.journal.found}
            if new:
                if number and late(took):
                    break
                before = self.journal.seconds
                needed = len(hashes) if number else sum(name in new for name in hashes[:least])
                score = partial(self._score, new, windows.window(number), partial(_cut, late, needed))
                self.journal.do_together([jobs[name] for name in new], score)
                took = self.journal.seconds - before
            hashes = [name for name in hashes if jobs[name] in self.journal.found]
            for name in hashes:
                rows[name].append(self.journal.found[jobs[name]])
        if progress:
            progress(count, count)
        return {name: _pooled(rows[name]) for name in hashes}

    def _score(
        self, plans: Mapping[str, CachePlan], window: Windows, late: Callable[[int], bool]
    ) -> list[dict[str, Any]]:
        """One window's means under each plan, as plain data; of the first plans if it got late."""
        (found,) = score_windows(self.model, plans, window, "stream", late=late)
        return [
            {
                "kl": float(score.kl.double().mean()),
                "top1": float(score.agrees.double().mean()),
                "delta_nll": float((score.losses.double() - score.baseline_losses.double()).mean()),
                "tokens": len(score.kl),
            }
            for score in (found[name] for name in plans if name in found)
        ]


def _cut(late: Callable[[float], bool], needed: int, done: int) -> bool:
    return done >= needed and late(0.0)


def _pooled(rows: Sequence[Mapping[str, Any]]) -> Measured:
    """Windows have equal numbers of tokens."""
    kl, top1, loss = (mean_of([row[name] for row in rows]) for name in ("kl", "top1", "delta_nll"))
    return Measured(
        kl=kl.value,
        kl_stderr=kl.stderr,
        top1=top1.value,
        delta_nll=loss.value,
        delta_nll_stderr=loss.stderr,
        tokens=sum(row["tokens"] for row in rows),
        windows=len(rows),
    )
