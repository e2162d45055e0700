"""How much each layer, side and head suffers from each option: measured at anchors, interpolated between them.

    scan      what leaves the changed layer, for every option: cheap, and enough to drop options that another one beats
              at no more bits.
    anchors   KL against the exact model through the whole rest of the model, for a few of the options that are left,
              from the smallest to the largest.
    heads     the same with one KV head quantized at a time, at one option: a head's share of its layer.

    refine   the same as anchors, for options that an allocation chose before they were measured.

The KL of another option follows from its scan: its error times the ratio of KL to error of the measured options next to
it, those of its own family if there are any. The table says of every number whether it was measured. A layer that a
time limit left unmeasured takes the ratios of the layers that were.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.errors import DataError
from kvq.heads import TokenPolicy
from kvq.pages.layout import SIDES
from kvq.recipe import numbers_text
from kvq.searching.journal import Journal
from kvq.searching.measure import Damage, Probe
from kvq.searching.space import Option
from kvq.searching.text_split import Part
from kvq.searching.variants import Variants

# Options whose error is within this factor of the best at no more bits stay: the scan is a proxy.
SLACK = 1.05
# Tokens of a window that the scan reads: of fewer, an exact window of 128 hides most.
SCAN_TOKENS = 1024
_TINY = 1e-30
# Likewise for the shares of heads, which only compare heads with each other.
HEAD_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One option on one side of one layer under one token policy.

    bits     per number, as the budget counts.
    error    of the scan.
    damage   KL in nats, or changed top-1 share, of the whole layer side; measured or interpolated.
    shares   of the damage by KV head, adding up to 1; empty if heads were not measured.
    """

    layer: int
    side: str
    policy: int
    option: str
    chain: str
    bits: float
    error: float
    damage: float
    measured: bool
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is decided together: one side of one layer under one token policy."""

    layer: int
    side: str
    policy: int

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.side}.{self.policy}"


class Sensitivity:
    """The jobs of the measuring, in order, and the table that they give.

    windows   what to measure on; anchors: options measured for each unit; heads: measure head shares too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        variants: Variants,
        windows: Part,
        journal: Journal,
        *,
        anchors: int = 4,
        heads: bool = True,
        tokens: int | None = None,
        metric: str = "kl",
    ):
        self.model, self.variants, self.windows, self.journal = model, variants, windows, journal
        self.anchors, self.metric = anchors, metric
        self.policies: Sequence[TokenPolicy] = variants.space.tokens
        self.units = [
            Unit(layer=i, side=s, policy=p) for i in variants.layers for s in SIDES for p, _ in enumerate(self.policies)
        ]
        self.heads = heads and any(layer.kv_heads > 1 for layer in variants.layers.values())
        self.bits = {
            (unit, option.name): variants.bits(option, self.policies[unit.policy], unit.layer, tokens)
            for unit in self.units
            for option in variants.space.of(unit.side)
        }
        self.refined: dict[Unit, list[str]] = {}
        self.windows_used, self.heads_used = 0, False
        self._probe: tuple[tuple[int, int], Probe] | None = None

    def run(self, late: Callable[[float], bool], progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Do the jobs; returns what was left out for want of time. ``late``: work of so many seconds is too much.

        Raises DataError if it is late before every option was scanned.
        """
        jobs = self._jobs()
        total = len(jobs)
        left_out: list[str] = []
        took: dict[str, float] = {}
        for done, (name, work, last) in enumerate(jobs):
            if progress:
                progress(done, total)
            kind, before = name.split("/")[0], self.journal.seconds
            if name not in self.journal.found and late(took.get(kind, 0.0)):
                if kind in ("reuse", "scan"):
                    raise DataError(
                        f"the time limit ended the search after {done} of {total} measurements: allow more time (what "
                        "is done is kept), or use a smaller space, shorter windows or fewer anchors."
                    )
                left_out.append(f"{total - done} of {total} measurements, for want of time")
                if foreseen := [i for i in self.variants.layers if not self._windows_of(i)]:
                    left_out.append(f"measuring of layers {numbers_text(foreseen)}, which is foreseen from others")
                break
            self.journal.do(name, work)
            took[kind] = self.journal.seconds - before or took.get(kind, 0.0)
            self.windows_used += last == "anchors"
            self.heads_used |= last == "heads"
        if progress:
            progress(total, total)
        return left_out

    def _jobs(self) -> list[tuple[str, Callable[[], object], str]]:
        """(name, work, what is complete once it is done)"""
        layers = _spread(list(self.variants.layers))
        jobs = [("reuse", lambda: self._probe_of(0).reuses(layers), "")]
        jobs += [(f"scan/{i}", lambda i=i: self._scan(i), "") for i in layers]
        jobs += self._round("anchors", 0, layers)
        if self.heads:
            jobs += self._round("heads", 0, layers)
        for window in range(1, len(self.windows.windows)):
            jobs += self._round("anchors", window, layers)
        return jobs

    def _round(self, kind: str, window: int, layers: list[int]):
        work = self._measure if kind == "anchors" else self._measure_heads
        return [(f"{kind}/{window}/{i}", lambda i=i: work(window, i), kind if i == layers[-1] else "") for i in layers]

    def _probe_of(self, window: int, tokens: int | None = None) -> Probe:
        own, positions = self.windows.windows[window : window + 1], self.windows.positions(window)
        length = min(tokens or own.shape[1], own.shape[1])
        key = (window, length)
        if self._probe is None or self._probe[0] != key:
            reuse = self.journal.found.get("reuse", True)
            at = None if positions is None else positions[:, :length]
            self._probe = (key, Probe(self.model, own[:, :length], reuse, at))
        return self._probe[1]

    def _scan(self, layer: int) -> dict[str, dict[str, float]]:
        """Errors by unit and option."""
        probe = self._probe_of(0, SCAN_TOKENS)
        return {
            unit.name: {o.name: probe.local_error(self._plan(o, unit)) for o in self.variants.space.of(unit.side)}
            for unit in self._units(layer)
        }

    def _plan(self, option: Option, unit: Unit, head: int | None = None):
        return self.variants.plan(option, self.policies[unit.policy], unit.layer, head)

    def errors(self, unit: Unit) -> dict[str, float]:
        return self.journal.found[f"scan/{unit.layer}"][unit.name]

    def front(self, unit: Unit) -> list[Option]:
        """Options that none beats at no more bits, by rising bits. All of them if the scan could not tell."""
        errors, best, found = self.errors(unit), math.inf, []
        options = sorted(self.variants.space.of(unit.side), key=lambda o: (self.bits[unit, o.name], errors[o.name]))
        for option in options:
            error = errors[option.name]
            if error != error or error < best * SLACK:
                found.append(option)
                best = min(best, error)
        return found

    def anchors_of(self, unit: Unit) -> list[Option]:
        """Options of the front that are measured: both ends, and others at even steps of bits."""
        front = self.front(unit)
        bits = [self.bits[unit, option.name] for option in front]
        if any(error != error for error in self.errors(unit).values()) or len(front) <= self.anchors:
            return front
        chosen = {0, len(front) - 1}
        for step in range(1, self.anchors - 1):
            # Steps of bits that grow: the steep part of the curve is at few bits.
            wanted = bits[0] * (bits[-1] / bits[0]) ** (step / (self.anchors - 1))
            chosen.add(min((i for i in range(len(front)) if i not in chosen), key=lambda i: abs(bits[i] - wanted)))
        return [front[i] for i in sorted(chosen)]

    def _units(self, layer: int) -> list[Unit]:
        return [unit for unit in self.units if unit.layer == layer]

    def _measure(self, window: int, layer: int) -> dict[str, dict[str, dict[str, float]]]:
        plans = {
            (unit.name, option.name): self._plan(option, unit)
            for unit in self._units(layer)
            for option in self.anchors_of(unit)
        }
        return self._damages(window, plans)

    def _measure_heads(self, window: int, layer: int) -> dict[str, dict[str, dict[str, float]]]:
        plans = {}
        for unit in self._units(layer):
            # Shares hardly depend on the token policy.
            if unit.policy == 0:
                option = self._middle(unit)
                for head in range(self.variants.layers[layer].kv_heads):
                    plans[unit.name, str(head)] = self._plan(option, unit, head)
        return self._damages(window, plans, HEAD_TOKENS)

    def _middle(self, unit: Unit) -> Option:
        anchors = self.anchors_of(unit)
        return anchors[(len(anchors) - 1) // 2]

    def _damages(self, window: int, plans: Mapping[tuple[str, str], CachePlan], tokens: int | None = None):
        rows: dict[str, dict[str, dict[str, float]]] = {}
        for (unit, what), damage in self._probe_of(window, tokens).damages(plans).items():
            rows.setdefault(unit, {})[what] = vars(damage)
        return rows

    def _pooled(self, unit: Unit, option: str) -> float:
        pooled = Damage.pooled([self._found(window, unit, option) for window in self._windows_of(unit.layer)])
        return pooled.kl if self.metric == "kl" else pooled.flips

    def _windows_of(self, layer: int) -> range:
        """Windows whose measurements of a layer count: those that all layers have, or the first if none is complete."""
        return range(self.windows_used or int(f"anchors/0/{layer}" in self.journal.found))

    def _found(self, window: int, unit: Unit, option: str) -> Damage:
        refined = self.journal.found.get(_refined(window, unit, option))
        return Damage(**(refined or self.journal.found[f"anchors/{window}/{unit.layer}"][unit.name][option]))

    def table(self, everything: bool = False) -> list[Entry]:
        """Every option of every unit's front, or every option of the space."""
        measured = {unit: self._measured(unit) for unit in self.units}
        return [entry for unit in self.units for entry in self._rows(unit, measured, everything)]

    def _rows(self, unit: Unit, known: Mapping[Unit, Mapping[Option, float]], everything: bool) -> list[Entry]:
        errors, measured = self.errors(unit), known[unit]
        shares = self._shares(unit)
        return [
            Entry(
                layer=unit.layer,
                side=unit.side,
                policy=unit.policy,
                option=option.name,
                chain=repr(option.chain),
                bits=self.bits[unit, option.name],
                error=errors[option.name],
                damage=self._damage(option, errors, measured) if measured else self._foreseen(unit, option, known),
                measured=option in measured,
                shares=shares,
            )
            for option in (self.variants.space.of(unit.side) if everything else self.front(unit))
        ]

    def _foreseen(self, unit: Unit, option: Option, known: Mapping[Unit, Mapping[Option, float]]) -> float:
        """The damage in a layer that was not measured, by the ratios of those that were, or the error if none was."""
        error = self.errors(unit)[option.name]
        rows = [(other, own) for other, own in known.items() if other.side == unit.side and own]
        if error != error:
            same = [own[option] for _, own in rows if option in own]
            if not same:
                raise DataError(
                    "the time limit ended the search before a layer was measured, and this model's layers cannot be "
                    "run alone: allow more time (what is done is kept)."
                )
            return sum(same) / len(same)
        every = [(self.errors(other)[o.name], o, damage) for other, own in rows for o, damage in own.items()]
        own = [row for row in every if row[1].family == option.family] or every
        return between([(e, damage) for e, _, damage in own], error) if own else error

    def _measured(self, unit: Unit) -> dict[Option, float]:
        if not self._windows_of(unit.layer):
            return {}
        names = [option.name for option in self.anchors_of(unit)]
        names += [name for name in self.refined.get(unit, ()) if name not in names]
        return {self.variants.space.named(unit.side, name): self._pooled(unit, name) for name in names}

    @staticmethod
    def _damage(option: Option, errors: Mapping[str, float], measured: Mapping[Option, float]) -> float:
        if option in measured:
            return measured[option]
        own = {o: damage for o, damage in measured.items() if o.family == option.family} or measured
        return between([(errors[o.name], damage) for o, damage in own.items()], errors[option.name])

    def refine(self, chosen: Iterable[Entry], late: Callable[[float], bool]) -> bool:
        """Measure chosen entries that were interpolated; True if something was learned before it got late."""
        if not self.windows_used:
            return False
        took = 0.0
        wanted: dict[int, list[tuple[Unit, str]]] = {}
        for entry in chosen:
            unit = Unit(layer=entry.layer, side=entry.side, policy=entry.policy)
            if not entry.measured and entry.option not in self.refined.get(unit, ()):
                wanted.setdefault(entry.layer, []).append((unit, entry.option))
        learned = False
        for rows in wanted.values():
            for window in range(self.windows_used):
                new = [(unit, name) for unit, name in rows if _refined(window, unit, name) not in self.journal.found]
                if new and late(took * len(new)):
                    return learned
                if new:
                    before = self.journal.seconds
                    self._refine(window, new)
                    took = (self.journal.seconds - before) / len(new)
            for unit, name in rows:
                self.refined.setdefault(unit, []).append(name)
                learned = True
        return learned

    def _refine(self, window: int, rows: Sequence[tuple[Unit, str]]) -> None:
        """Measure options of one layer on one window, each a job of its own."""
        plans = {(unit, name): self._plan(self.variants.space.named(unit.side, name), unit) for unit, name in rows}
        jobs = [_refined(window, *row) for row in rows]
        self.journal.do_together(jobs, lambda: map(vars, self._probe_of(window).damages(plans).values()))

    def _shares(self, unit: Unit) -> tuple[float, ...]:
        if not self.heads_used:
            return ()
        row = self.journal.found[f"heads/0/{unit.layer}"][f"{unit.layer}.{unit.side}.0"]
        damages = [max(damage["kl"], 0.0) for damage in row.values()]
        total = sum(damages)
        return tuple(damage / total if total else 1 / len(damages) for damage in damages)


def _refined(window: int, unit: Unit, option: str) -> str:
    """Name of the job that measures a chosen option."""
    return f"refine/{window}/{unit.name}/{option}"


def _spread(layers: Sequence[int]) -> list[int]:
    """The same layers with every early part of the list spread over all depths, so that a cut search has seen each."""
    width = len(layers).bit_length()
    order = sorted(range(len(layers)), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))
    return [layers[i] for i in order]


def between(points: Sequence[tuple[float, float]], error: float) -> float:
    """The damage that goes with an error, by measured points (error, damage): their ratio lies on straight lines of
    logarithms between the points, and stays beyond them."""
    # Of equal errors the least damage counts. What does no damage at all has no logarithm.
    least = dict(sorted(points, reverse=True))
    known = np.maximum(np.array(sorted(least.items())), _TINY)
    ratios = np.log(known[:, 1] / known[:, 0])
    return error * math.exp(np.interp(math.log(max(error, _TINY)), np.log(known[:, 0]), ratios))
