"""What a search is given, and what it finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvq.errors import DataError, suggest
from kvq.recipe import Recipe
from kvq.searching.allocate import Allocation
from kvq.searching.sensitivity import Entry
from kvq.searching.verify import METRICS, Measured


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a search, beside model, statistics and text.

    budgets         bits per number, keys and values averaged: asymptotic, or of a filled cache at ``tokens`` tokens.
    metric          ``kl`` or ``top1``: what is minimised.
    floors          what the recipe must keep on unseen text (``verify.FLOORS``).
    seq_len         tokens of a window: far more than the exact window of the policies, which else hides most damage.
    context         positions that windows stand at, from 0 on; None: they count from 0.
    windows         of each text that sensitivities are measured on; verify_windows: of each part that verifies.
    anchors         options measured for each side of each layer; the others are interpolated.
    heads           measure head shares, and give heads options of their own.
    refine          rounds in which what an allocation chose by interpolation is measured, and allocated again.
    time_limit      seconds of the whole run: measuring stops at a share of it, and what was found is verified.
    """

    budgets: tuple[float, ...]
    metric: str = "kl"
    floors: Mapping[str, float] = field(default_factory=dict)
    tokens: int | None = None
    seed: int = 0
    seq_len: int = 2048
    context: int | None = None
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
        if self.context is not None and self.context < self.seq_len:
            raise DataError(
                f"context={self.context} is less than a window of {self.seq_len} tokens: ask for more, or for shorter "
                "windows (seq_len)."
            )
        if self.anchors < 2:
            raise DataError(f"anchors={self.anchors} leaves nothing to interpolate between: use 2 or more.")
        if self.time_limit is not None and self.time_limit <= 0:
            raise DataError(f"time_limit={self.time_limit:g} leaves no time: use a positive number of seconds.")

    def identity(self) -> dict[str, Any]:
        """What decides each measured number; budgets, floors, windows and time choose among them."""
        names = "tokens", "seed", "seq_len", "context", "verify_windows", "anchors"
        return {name: getattr(self, name) for name in names}


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
class HeldOut:
    """One text that chose nothing: what the search found and the best uniform recipe of its size, each also with its
    transforms fitted again to the text that it was chosen on. None: there is no such recipe, or nothing to fit."""

    found: Measured
    found_refitted: Measured | None
    uniform: Measured | None
    uniform_refitted: Measured | None

    def is_led(self, metric: str) -> bool:
        """Whether the uniform recipe is no better, with either statistics."""
        pairs = (self.found, self.uniform), (self.found_refitted, self.uniform_refitted)
        return all(a.better(metric) <= b.better(metric) for a, b in pairs if a is not None and b is not None)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget: the chosen candidate, measured again on texts that did not choose it, and what it was chosen from.

    confirmed, uniform_confirmed   over all these texts. held_out: each by name.
    lost    the candidate that was best where it was chosen, and not ahead of the uniform one on every held-out text.
    """

    budget: float
    chosen: Candidate
    confirmed: Measured
    uniform: Candidate | None
    uniform_confirmed: Measured | None
    held_out: Mapping[str, HeldOut]
    lost: Candidate | None
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
