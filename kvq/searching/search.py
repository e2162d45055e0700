"""Search a model's mixed-precision recipe: measure sensitivities, allocate bits, verify on other text."""

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kvq.calib.stats import Stats
from kvq.errors import DataError, RecipeError
from kvq.eval.lm_head import hidden_states
from kvq.eval.measured_bits import measured_bits
from kvq.eval.result import installed_versions
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
from kvq.recipe import Recipe
from kvq.searching.allocate import SOLVER_SECONDS, Allocation, allocate, least_bits
from kvq.searching.assemble import recipe_of
from kvq.searching.candidates import choose, hold_floors, measured, uniform_candidates
from kvq.searching.confirm import fitted_of, held_out, refitter
from kvq.searching.deadline import CHOOSING, CONFIRMING, FITTING, MEASURING, REFINING, Deadline
from kvq.searching.journal import Journal, identity_hash
from kvq.searching.outcome import Candidate, Point, Search, Settings
from kvq.searching.sensitivity import Entry, Sensitivity
from kvq.searching.space import Space, expand, load_space
from kvq.searching.text_split import Part, Text, cut_text
from kvq.searching.variants import Variants
from kvq.searching.verify import Measured, Verifier

logger = logging.getLogger(__name__)

# Of the time limit, what one allocation may take.
SOLVER_SHARE = 0.02
FRONT_POINTS = 4


def search(
    model: str | Path,
    settings: Settings,
    *,
    stats: Stats | None = None,
    data: Sequence[str | Path] = ("builtin",),
    verify_data: Sequence[str | Path] = (),
    space: Mapping[str, Any] | None = None,
    journal: Path | None = None,
    names: Callable[[float], str] = lambda budget: f"auto-{budget:g}",
    progress: Callable[[str, int, int], None] | None = None,
) -> Search:
    """Search a recipe for every budget.

    stats         statistics of the model, for options whose transforms need them.
    data          texts of the sensitivities and of the choice; verify_data: texts that confirm, filled up to two by
                  parts of ``data`` that nothing else reads (``kvq.searching.text_split``).
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
    if settings.context is not None and settings.context > spec.max_length:
        raise DataError(
            f"context={settings.context} is more than the {spec.max_length} tokens of this model: ask for less."
        )
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
    kept = [row | {"windows": row["windows"] | {"measuring": None}} for row in text.identity["search"]]
    same = {**facts, "text": {**text.identity, "search": kept}}
    log = Journal(journal, identity_hash(same))
    loaded = load_model(folder)
    facts |= {"dtype": str(loaded.dtype).removeprefix("torch."), "device": loaded.device.type, "mode": "stream"}
    try:
        return _Run(
            loaded, spec, stats, folder, expanded, settings, text, log, names, progress, facts, deadline
        ).result()
    finally:
        log.close()


def _saw(stats: Stats | None, identity: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """True if the statistics were made of a text that confirms."""
    if stats is None or stats.data is None:
        return False
    texts = [*identity["search"], *identity["verify"]]
    confirming = [row for row in texts if set(row["windows"]) - {"choosing", "measuring"}]
    return stats.data.text_sha256 in [row["documents_sha256"] for row in confirming]


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
        self._keep(parts=-1)
        found = self._measure("choosing", self.verifier, every, self.text.choosing, CHOOSING, least=len(by_budget))
        by_budget = {b: measured(rows, found) for b, rows in by_budget.items()}
        chosen = {b: choose(b, rows, settings) for b, rows in by_budget.items()}
        confirmed = self._confirmed([c.recipe for pair in zip(*chosen.values()) for c in pair if c is not None])
        points = tuple(self._point(b, *chosen[b], by_budget[b], confirmed) for b in settings.budgets)
        for point in points:
            hold_floors(point.budget, point.confirmed, settings.floors)
        return Search(
            settings=settings,
            points=points,
            front=tuple(measured(front, found)),
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
        self.forward_seconds, self.parts_left = 0.0, 1 + len(self.text.confirming)
        if self.deadline.limit is not None:
            start = time.monotonic()
            hidden_states(self.model, self.text.choosing.windows[:1])
            self.forward_seconds = time.monotonic() - start
            self._keep()

    def _keep(self, parts: int = 0) -> None:
        self.parts_left += parts
        self.deadline.reserve = self.parts_left * (1 + len(self.settings.budgets)) * self.forward_seconds

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
        self, part: str, verifier: Verifier, recipes: Sequence[Recipe], windows: Part, share: float, least: int
    ) -> dict[str, Measured]:
        title = "Choosing" if part == "choosing" else "Confirming"
        found = verifier.measure(part, recipes, windows, partial(self.progress, title), self._late(share), least)
        count = len(windows.windows)
        used = min((own.windows for own in found.values()), default=0)
        if used < count:
            self.left_out[f"{count - used} of {count} windows of {part}"] = "time limit"
        if lost := len({recipe.hash for recipe in recipes} - set(found)):
            self.left_out[f"{part} of {lost} of {len(recipes)} recipes"] = "time limit"
        return found

    def _confirmed(self, recipes: Sequence[Recipe]) -> dict[str, tuple[dict[str, Measured], dict[str, Measured]]]:
        """By text that chose nothing: results with the statistics given, and with those of the windows that chose."""
        found = {}
        for name, part in self.text.confirming.items():
            self._keep(parts=-1)
            least = len(self.settings.budgets)
            found[name] = self._measure(f"confirming {name}", self.verifier, recipes, part, CONFIRMING, least), {}
        fitted = fitted_of(recipes, self.spec) if self.verifier.stats is not None else []
        # Statistics take about twice a forward of each window.
        ahead = 2 * self.forward_seconds * len(self.text.choosing.windows)
        if fitted and self._late(CONFIRMING)(ahead):
            self.left_out["confirming with statistics of another text"] = "time limit"
        elif fitted:
            again = refitter(self.verifier, fitted, self.text.choosing.windows)
            for name, part in self.text.confirming.items():
                own = self._measure(f"refitted {name}", again, fitted, part, CONFIRMING, least=0)
                found[name] = found[name][0], own
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
        table = self.sensitivity.table(everything=True)
        return [*found, *uniform_candidates(table, self.variants.space, self.variants.layers, budget, self.bits)]

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

    def _point(
        self, budget: float, chosen: Candidate, uniform: Candidate | None, rows: Sequence[Candidate], confirmed
    ) -> Point:
        """What leads on every held-out text, whichever text its transforms were fitted to, else the uniform recipe."""
        texts = {name: held_out(chosen, uniform, *own) for name, own in confirmed.items()}
        if any(text.uniform is None for text in texts.values()):
            uniform = None
        confirmed = Measured.pooled([text.found for text in texts.values()])
        by_uniform = Measured.pooled([text.uniform for text in texts.values()]) if uniform else None
        lost = None
        led = all(text.is_led(self.settings.metric) for text in texts.values())
        if by_uniform is not None and not led and not by_uniform.missed(self.settings.floors):
            lost, chosen, confirmed = chosen, uniform, by_uniform
        if chosen is uniform:
            chosen = self._named(uniform, budget)
        plan = self.verifier.plan(chosen.recipe)
        return Point(
            budget=budget,
            chosen=chosen,
            confirmed=confirmed,
            uniform=uniform,
            uniform_confirmed=by_uniform,
            held_out=texts,
            lost=lost,
            filled_bits=measured_bits(plan, self.settings.seq_len, self.spec.dtype),
            candidates=tuple(rows),
        )

    def _named(self, uniform: Candidate, budget: float) -> Candidate:
        """A uniform recipe of the space as one that is written."""
        summary = f"Found by kvq search for {self.facts['model']} at {budget:g} bits: one way for all layers leads"
        return replace(uniform, recipe=replace(uniform.recipe, name=self.names(budget), summary=summary))
