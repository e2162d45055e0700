"""Search a model's mixed-precision recipe: measure sensitivities, allocate bits, verify on other text."""

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from kvq.calib.stats import Stats
from kvq.errors import DataError, RecipeError, suggest
from kvq.eval.lm_head import hidden_states
from kvq.eval.measured_bits import measured_bits
from kvq.eval.result import installed_versions
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
from kvq.recipe import Recipe
from kvq.searching.allocate import SOLVER_SECONDS, Allocation, allocate, least_bits
from kvq.searching.assemble import recipe_of
from kvq.searching.deadline import CHOOSING, CONFIRMING, FITTING, MEASURING, REFINING, Deadline
from kvq.searching.journal import Journal, identity_hash
from kvq.searching.sensitivity import Entry, Sensitivity
from kvq.searching.space import Space, expand, load_space
from kvq.searching.text_split import Text, cut_text
from kvq.searching.variants import Variants
from kvq.searching.verify import METRICS, Measured, Verifier

logger = logging.getLogger(__name__)

# Of the time limit, what one allocation may take.
SOLVER_SHARE = 0.02
UNIFORM_CANDIDATES = 2
FRONT_POINTS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a search, beside model, statistics and text.

    budgets         bits per number, keys and values averaged: asymptotic, or of a filled cache at ``tokens`` tokens.
    metric          ``kl`` or ``top1``: what is minimised.
    floors          what the recipe must keep on unseen text (``verify.FLOORS``).
    seq_len         tokens of a window: far more than the exact window of the policies, which else hides most damage.
    windows         of the text that sensitivities are measured on; verify_windows: of each part that verifies.
    anchors         options measured for each side of each layer; the others are interpolated.
    heads           measure head shares, and give heads options of their own.
    refine          rounds in which what an allocation chose by interpolation is measured, and allocated again.
    time_limit      seconds of the whole run: measuring stops at a share of it; what was found is verified and given.
    """

    budgets: tuple[float, ...]
    metric: str = "kl"
    floors: Mapping[str, float] = field(default_factory=dict)
    tokens: int | None = None
    seed: int = 0
    seq_len: int = 2048
    windows: int = 1
    verify_windows: int = 4
    anchors: int = 3
    heads: bool = True
    refine: int = 4
    time_limit: float | None = None

    def __post_init__(self):
        if not self.budgets or min(self.budgets) <= 0:
            raise DataError(f"budget={self.budgets!r} is not a number of bits: use for example 2.5.")
        if self.metric not in METRICS:
            raise DataError(f"unknown metric {self.metric!r}.{suggest(self.metric, METRICS)}")
        for name in ("windows", "verify_windows"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)} is not a number of windows: use 1 or more.")
        if self.anchors < 2:
            raise DataError(f"anchors={self.anchors} leaves nothing to interpolate between: use 2 or more.")
        if self.time_limit is not None and self.time_limit <= 0:
            raise DataError(f"time_limit={self.time_limit:g} leaves no time: use a positive number of seconds.")

    def identity(self) -> dict[str, Any]:
        """What decides each measured number; budgets, floors, windows and time choose among them."""
        return {name: getattr(self, name) for name in ("tokens", "seed", "seq_len", "verify_windows", "anchors")}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that was measured on the choosing part. ``allocation`` is None for a uniform one."""

    recipe: Recipe
    how: str
    bits: float
    predicted: float
    measured: Measured | None = None
    allocation: Allocation | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget: the chosen candidate, measured again on text that did not choose it, and what it was chosen from."""

    budget: float
    chosen: Candidate
    confirmed: Measured
    uniform: Candidate | None
    uniform_confirmed: Measured | None
    filled_bits: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found. ``front``: allocations over the range of bits, measured on the choosing part.

    complete   False if the time limit cut it: the same call goes on where it was.
    """

    settings: Settings
    points: tuple[Point, ...]
    front: tuple[Candidate, ...]
    table: tuple[Entry, ...]
    left_out: Mapping[str, str]
    facts: Mapping[str, Any]
    seconds: float
    complete: bool = True


def search(
    model: str | Path,
    settings: Settings,
    *,
    stats: Stats | None = None,
    data: str | Path = "builtin",
    verify_data: str | Path | None = None,
    space: Mapping[str, Any] | None = None,
    journal: Path | None = None,
    names: Callable[[float], str] = lambda budget: f"auto-{budget:g}",
    progress: Callable[[str, int, int], None] | None = None,
) -> Search:
    """Search a recipe for every budget.

    stats         statistics of the model, for options whose transforms need them.
    data          text of the sensitivities and of the choice; verify_data: text that confirms (None: a part of data).
    space         a search space as plain data (``kvq.searching.space``); None: the default.
    journal       file to go on from, and to keep what is found in.
    progress      called with (stage, done, total).

    Raises DataError for a text that is too short, a budget or floor that cannot be met or a time limit that ends before
    every option was tried; RecipeError for a space without options; CheckpointError for another model's statistics.
    """
    if importlib.util.find_spec("scipy") is None:
        raise DataError("a search needs scipy: pip install 'kvq-toolkit[search]'.")
    deadline = Deadline(settings.time_limit)
    folder = resolve_model(model)
    spec = describe(load_config(folder))
    fingerprint = weights_fingerprint(folder)
    if stats is not None:
        stats.check_model(spec, fingerprint)
    chosen = dict(space) if space is not None else load_space()
    tokenizer = load_tokenizer(folder)
    text = cut_text(tokenizer, data, verify_data, settings)
    facts = {
        "model": model if isinstance(model, str) and not Path(model).exists() else folder.resolve().name,
        "weights_fingerprint": fingerprint,
        "stats": stats.provenance() if stats else None,
        "text": text.identity,
        "space": chosen,
        "settings": settings.identity(),
        "versions": installed_versions("scipy"),
    }
    facts["statistics_saw_the_text"] = _saw(stats, text.identity)
    if facts["statistics_saw_the_text"]:
        logger.warning(
            "The statistics are of the text that confirms, so that transforms have seen it: use --verify-data."
        )
    expanded = expand(chosen, spec, stats, sees_exact_tokens=settings.tokens is not None)
    # More windows go on where fewer ended.
    same = {**facts, "text": {**text.identity, "search": {**text.identity["search"], "windows": None}}}
    log = Journal(journal, identity_hash(same))
    loaded = load_model(folder)
    facts |= {"dtype": str(loaded.dtype).removeprefix("torch."), "device": loaded.device.type, "mode": "stream"}
    try:
        return _Run(
            loaded, spec, stats, folder, expanded, settings, text, log, names, progress, facts, deadline
        ).result()
    finally:
        log.close()


def _saw(stats: Stats | None, identity: Mapping[str, Mapping[str, Any]]) -> bool:
    """True if the statistics were made of the text that confirms."""
    own = identity.get("verify", identity["search"])["documents_sha256"]
    return stats is not None and stats.data is not None and stats.data.text_sha256 == own


class _Run:
    def __init__(
        self,
        model,
        spec: ModelSpec,
        stats,
        folder,
        space: Space,
        settings,
        text: Text,
        log,
        names,
        progress,
        facts,
        deadline: Deadline,
    ):
        self.deadline, self.complete = deadline, True
        self.model, self.spec, self.settings, self.text, self.log = model, spec, settings, text, log
        self.names, self.progress, self.facts = names, progress or (lambda *_: None), facts
        self.variants = Variants(space, spec, stats, folder, partial(self._late(FITTING), 0.0))
        self.left_out = dict(self.variants.left_out)
        self.sensitivity = Sensitivity(
            model,
            self.variants,
            text.measuring,
            log,
            anchors=settings.anchors,
            heads=settings.heads,
            tokens=settings.tokens,
            metric=settings.metric,
        )
        self.verifier = Verifier(model, spec, stats, folder, log)

    def result(self) -> Search:
        settings = self.settings
        self._reserve()
        late = self.sensitivity.run(self._late(MEASURING), lambda *done: self.progress("Measuring", *done))
        self.left_out |= dict.fromkeys(late, "time limit")
        if settings.heads and not self.sensitivity.heads_used:
            self.left_out["heads"] = "not measured, so that the heads of a layer are stored alike"
        self.table = self._refined()
        by_budget = {budget: self._candidates(budget) for budget in settings.budgets}
        front = self._front()
        # Each budget's first candidate is measured at any rate, so those come first.
        ranked = [c.recipe for row in zip_longest(*by_budget.values()) for c in row if c is not None]
        every = ranked + [c.recipe for c in front]
        found = self._measure("choosing", every, self.text.choosing, CHOOSING, least=len(by_budget))
        by_budget = {b: _measured(rows, found) for b, rows in by_budget.items()}
        chosen = {b: self._choose(b, rows) for b, rows in by_budget.items()}
        confirming = [c.recipe for pair in zip(*chosen.values()) for c in pair if c is not None]
        confirmed = self._measure("confirming", confirming, self.text.confirming, CONFIRMING, least=len(chosen))
        points = tuple(self._point(b, *chosen[b], by_budget[b], confirmed) for b in settings.budgets)
        for point in points:
            self._hold_floors(point.budget, point.confirmed)
        return Search(
            settings=settings,
            points=points,
            front=tuple(_measured(front, found)),
            table=tuple(self.table),
            left_out=self.left_out,
            facts={
                **self.facts,
                "prefix_reuse": bool(self.log.found["reuse"]),
                "windows_used": self.sensitivity.windows_used,
                "heads_measured": self.sensitivity.heads_used,
                "refining_rounds": self.settings.refine,
            },
            seconds=self.log.seconds,
            complete=self.complete,
        )

    def _reserve(self) -> None:
        """Keep time for the least that verifies: a window of each part, one recipe a budget and the exact model."""
        if self.deadline.limit is not None:
            start = time.monotonic()
            hidden_states(self.model, self.text.choosing[:1])
            self.deadline.reserve = 2 * (1 + len(self.settings.budgets)) * (time.monotonic() - start)

    def _refined(self) -> list[Entry]:
        """The table once no allocation chooses what is interpolated, or time or rounds are over."""
        for done in range(self.settings.refine):
            if self._late(REFINING)(0.0):
                self.left_out[f"rounds {done + 1} to {self.settings.refine} of refining"] = "time limit"
                break
            self.progress("Refining", done, self.settings.refine)
            table = self.sensitivity.table()
            ways = (False, True) if self.sensitivity.heads_used else (False,)
            allocations = [self._allocate(table, budget, way) for budget in self.settings.budgets for way in ways]
            entries = {choice.entry: None for allocation in allocations for choice in allocation.choices}
            if not self.sensitivity.refine(entries, self._late(REFINING)):
                break
        return self.sensitivity.table()

    def _allocate(self, table: Sequence[Entry], budget: float, by_head: bool) -> Allocation:
        seconds = self.deadline.part(SOLVER_SHARE, SOLVER_SECONDS)
        return allocate(table, self.variants.layers, budget, by_head=by_head, seconds=seconds)

    def _late(self, share: float) -> Callable[[float], bool]:
        """Says that work of so many seconds would end after a share of the time limit, and remembers that it did."""

        def late(ahead: float) -> bool:
            passed = self.deadline.passed(share, ahead)
            self.complete &= not passed
            return passed

        return late

    def _measure(
        self, part: str, recipes: Sequence[Recipe], windows: torch.Tensor, share: float, least: int
    ) -> dict[str, Measured]:
        self.deadline.reserve = 0.0 if part == "confirming" else self.deadline.reserve / 2
        title = {"choosing": "Choosing", "confirming": "Confirming"}[part]
        found = self.verifier.measure(
            part, recipes, windows, lambda *done: self.progress(title, *done), self._late(share), least
        )
        used = min(own.windows for own in found.values())
        if used < len(windows):
            self.left_out[f"{len(windows) - used} of {len(windows)} windows of {part}"] = "time limit"
        if lost := len({recipe.hash for recipe in recipes} - set(found)):
            self.left_out[f"{part} of {lost} of {len(recipes)} recipes"] = "time limit"
        return found

    def bits(self, recipe: Recipe) -> float:
        """Stored bits per number, as the budget counts them."""
        plan = self.verifier.plan(recipe)
        if self.settings.tokens is None:
            return plan.bits_per_element
        return measured_bits(plan, self.settings.tokens, self.spec.dtype)

    def _allocated(self, budget: float, name: str, by_head: bool) -> Candidate:
        """The allocation under a budget whose recipe keeps it in stored bytes."""
        wanted = budget
        for _ in range(8):
            allocation = self._allocate(self.table, wanted, by_head)
            how = "by layer and head" if by_head else "by layer"
            summary = f"Found by kvq search for {self.facts['model']} at {budget:g} bits: bits {how} where they matter"
            recipe = recipe_of(allocation, self.variants.space, self.variants.layers, name, summary)
            bits = self.bits(recipe)
            if bits <= budget + 1e-9:
                return Candidate(
                    recipe=recipe, how=how, bits=bits, predicted=allocation.predicted, allocation=allocation
                )
            # Shared sections and page sizes depend on what stands beside an option, which the sum does not know.
            wanted -= (bits - budget) * 1.05 + 1e-6
        raise DataError(
            f"no recipe keeps budget={budget:g} once its bytes are counted (the smallest has {bits:.3f}): raise it."
        )

    def _candidates(self, budget: float) -> list[Candidate]:
        name = self.names(budget)
        found = [self._allocated(budget, name, by_head=False)]
        if self.sensitivity.heads_used:
            try:
                found.append(self._allocated(budget, name, by_head=True))
            # What a recipe cannot say of single heads, such as a calibrated codec beside transforms.
            except RecipeError as error:
                self.left_out[f"heads at {budget:g} bits"] = str(error)
        return [*found, *self._uniform(budget)]

    def _uniform(self, budget: float) -> list[Candidate]:
        """The best pairs of options for all layers alike, by prediction."""
        sums: dict[tuple[str, str], list[float]] = {}
        layers = self.variants.layers
        total = sum(layer.kv_heads * layer.head_dim for layer in layers.values())
        for entry in self.sensitivity.table(everything=True):
            if entry.policy == 0:
                layer = layers[entry.layer]
                row = sums.setdefault((entry.side, entry.option), [0.0, 0.0])
                row[0] += entry.bits * layer.kv_heads * layer.head_dim / total
                row[1] += entry.damage
        pairs = [
            (sums["key", key.name][1] + sums["value", value.name][1], key, value)
            for key in self.variants.space.of("key")
            for value in self.variants.space.of("value")
            if (sums["key", key.name][0] + sums["value", value.name][0]) / 2 <= budget + 1e-9
        ]
        found = []
        for predicted, key, value in sorted(pairs, key=lambda pair: pair[0]):
            recipe = key.recipe(self.variants.space.tokens[0], value)
            bits = self.bits(recipe)
            if bits <= budget + 1e-9:
                found.append(Candidate(recipe=recipe, how="uniform", bits=bits, predicted=predicted))
            if len(found) == UNIFORM_CANDIDATES:
                break
        return found

    def _front(self) -> list[Candidate]:
        """Allocations by layer at even steps from a tenth above the least to a fifth above the largest budget."""
        budgets = self.settings.budgets
        low, high = least_bits(self.table, self.variants.layers) * 1.1, max(budgets) * 1.2
        steps = [low * (high / low) ** (i / (FRONT_POINTS - 1)) for i in range(FRONT_POINTS)] if high > low else []
        found = []
        for budget in steps:
            if self._late(REFINING)(0.0):
                self.left_out[f"front at {budget:.2f} bits"] = "time limit"
                continue
            try:
                found.append(self._allocated(budget, f"front-{budget:.2f}", by_head=False))
            except DataError as error:
                self.left_out[f"front at {budget:.2f} bits"] = str(error)
        return found

    def _choose(self, budget: float, rows: Sequence[Candidate]) -> tuple[Candidate, Candidate | None]:
        """The best candidate that keeps the floors, and the best uniform one."""
        metric, floors = self.settings.metric, self.settings.floors
        ranked = sorted(rows, key=lambda c: c.measured.better(metric))
        kept = [c for c in ranked if not c.measured.missed(floors)]
        if not kept:
            self._hold_floors(budget, ranked[0].measured)
        return kept[0], next((c for c in ranked if c.how == "uniform"), None)

    def _hold_floors(self, budget: float, measured: Measured) -> None:
        for name, value in measured.missed(self.settings.floors).items():
            raise DataError(
                f"no recipe of at most {budget:g} bits keeps {name}={self.settings.floors[name]:g} on unseen text (the "
                f"best has {value:.4f}): raise the budget, or change the floor."
            )

    def _point(self, budget, chosen: Candidate, uniform: Candidate | None, rows, confirmed) -> Point:
        plan = self.verifier.plan(chosen.recipe)
        if uniform is not None and uniform.recipe.hash not in confirmed:
            uniform = None
        return Point(
            budget=budget,
            chosen=chosen,
            confirmed=confirmed[chosen.recipe.hash],
            uniform=uniform,
            uniform_confirmed=confirmed[uniform.recipe.hash] if uniform else None,
            filled_bits=measured_bits(plan, self.settings.seq_len, self.spec.dtype),
            candidates=tuple(rows),
        )


def _measured(rows: Sequence[Candidate], found: Mapping[str, Measured]) -> list[Candidate]:
    """Candidates with what was measured, without those that time left unmeasured."""
    return [replace(c, measured=found[c.recipe.hash]) for c in rows if c.recipe.hash in found]
