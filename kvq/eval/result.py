"""Typed results, with everything that is needed to repeat them."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvq.eval.paired import Difference, Flips, verdict

SCHEMA_VERSION = 2


class _Plain:
    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """One metric beside the baseline's on the same requests.

    stderr, baseline_stderr   of each score by itself, or None.
    difference                value - baseline, with its paired standard error over ``units`` and its 95% interval
                              ``low`` to ``high`` (None: one unit, so no error is known).
    verdict                   worse, better, same, or too few samples to tell.
    lost, won                 of answers that are right or wrong: those that only the baseline has right, and reverse.
    flip_rate                 (lost + won) / answers: 0.1 where one answer in ten changed, even if as many were won as
                              lost and the score stayed.
    """

    value: float
    baseline: float
    stderr: float | None
    baseline_stderr: float | None
    difference: float
    difference_stderr: float | None
    low: float | None
    high: float | None
    units: int
    higher_is_better: bool
    verdict: str
    lost: int | None = None
    won: int | None = None
    flip_rate: float | None = None

    @classmethod
    def of(
        cls,
        value: float,
        baseline: float,
        difference: Difference,
        *,
        higher_is_better: bool,
        stderr: float | None = None,
        baseline_stderr: float | None = None,
        flips: Flips | None = None,
    ) -> "MetricResult":
        low, high = difference.bounds
        changed = {}
        if flips is not None:
            changed = {"lost": flips.lost, "won": flips.won, "flip_rate": flips.rate}
            # Two shares differ by 1 at most.
            low, high = (None, None) if low is None else (max(low, -1.0), min(high, 1.0))
        return cls(
            value=value,
            baseline=baseline,
            stderr=stderr,
            baseline_stderr=baseline_stderr,
            difference=difference.value,
            difference_stderr=difference.stderr,
            low=low,
            high=high,
            units=difference.units,
            higher_is_better=higher_is_better,
            verdict=verdict(difference, higher_is_better),
            **changed,
        )

    def to_dict(self) -> dict[str, Any]:
        optional = ("lost", "won", "flip_rate")
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}


@dataclass(frozen=True, kw_only=True)
class PerplexityResult(_Plain):
    """value, baseline: perplexities on the same tokens. delta_nll: mean loss minus the baseline's, nats a token, with
    its standard error over windows (None for one window) and its 95% interval. tokens: scored tokens."""

    value: float
    baseline: float
    delta_nll: float
    delta_nll_stderr: float | None
    low: float | None
    high: float | None
    verdict: str
    windows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class PositionRow:
    """Scored tokens at positions [first, last] of their windows. ``cached``: the share of them that read at least one
    quantized token."""

    first: int
    last: int
    tokens: int
    cached: float
    kl: float
    kl_stderr: float | None
    top1: float


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """The token whose distribution moved most: where it stands, its text and the text before it."""

    window: int
    position: int
    kl: float
    before: str
    token: str


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """error: |attention output - the exact one| / |exact one| of one layer, given the same input, on one window;
    heads: the same by query head."""

    layer: int
    error: float
    heads: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class DivergenceResult(_Plain):
    """How far the next-token distributions are from the baseline's.

    kl            mean KL(baseline || recipe), nats a token; kl_p99, kl_max: of the tokens.
    reverse_kl    mean KL(recipe || baseline): large where the recipe believes in tokens that the baseline rules out.
    top1          share of tokens with the same most likely next token; top5: share where the baseline's most likely
                  token is among the recipe's five.
    positions     by position in the window; layers: by layer (empty for a baseline of other weights).
    Standard errors over windows (None for one window).
    """

    kl: float
    kl_stderr: float | None
    kl_p99: float
    kl_max: float
    reverse_kl: float
    reverse_kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    top5: float
    top5_stderr: float | None
    windows: int
    tokens: int
    worst: WorstToken | None = None
    positions: Sequence[PositionRow] = ()
    layers: Sequence[LayerRow] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A group of a task's questions, such as one depth at one length: its labels, and metrics as (value, baseline)."""

    labels: Mapping[str, Any]
    questions: int
    metrics: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task with questions and answers: lm-eval's, or one of kvq's own.

    kind           ``likelihood``: scored by two-view forwards; ``generation``: written through the packed cache.
    mode           what the scored tokens attended to; generation always reads an exact prompt, mode prefill.
    metrics        by name; empty if ``refused`` says why there are none.
    samples        documents or questions. task_version: the task's. fewshot: examples in each prompt.
    packed_share   share of the scored tokens whose query read at least one quantized token. A log-likelihood task in
                   which it would be 0 is refused: its numbers would be the baseline's under a recipe's name.
    chance         what guessing gives, where it is known; weak: the baseline itself is not shown to do better.
    cells          finer groups of the questions.
    """

    kind: str
    mode: str
    metrics: Mapping[str, MetricResult]
    samples: int
    task_version: str | None
    packed_share: float | None
    fewshot: int | None = None
    data: Mapping[str, Any] | None = None
    refused: str | None = None
    chance: float | None = None
    weak: bool = False
    cells: Sequence[Cell] = ()

    def to_dict(self) -> dict[str, Any]:
        """Metrics by name, beside the other facts."""
        facts = {name: value for name, value in vars(self).items() if name not in ("metrics", "cells")}
        facts["cells"] = [asdict(cell) for cell in self.cells]
        return {name: metric.to_dict() for name, metric in self.metrics.items()} | facts


@dataclass(frozen=True, kw_only=True)
class SpeedResult(_Plain):
    """Decoding beside an ordinary cache, alternating: tokens a second (median over turns), and the ratio of paired
    turns with its lowest and highest. context: tokens in the cache at the start. implementation: what attended."""

    context: int
    tokens_per_second: float
    baseline: float
    ratio: float
    ratio_low: float
    ratio_high: float
    turns: int
    threads: int
    implementation: str


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What ``evaluate`` found, and how.

    mode                   what a scored token attended to (``kvq.eval.two_view_attention``).
    chunk                  tokens, mode chunked only.
    bits_per_element       measured: bytes of a filled cache over the numbers of its full-attention layers, exact tokens
                           and metadata included, at ``bits_tokens`` tokens and the checkpoint's dtype ``cache_dtype``.
    asymptotic_bits        the same without exact tokens.
    results                by task.
    packed_share           share of the scored tokens of the text whose query read at least one quantized token.
    memory                 cache bytes of one sequence at a few lengths, exact numbers at 16 bits: (tokens, plain_bytes,
                           recipe_bytes).
    dtype                  of the weights and activations in this run.
    implementation         what attended.
    hashes                 of the weights (baseline's too), the plan, and the code: what answers are kept under.
    command                repeats the run; its paths carry no folders.
    partial                True if the run was interrupted: ``unfinished`` tasks are missing, and a text covers
                           ``windows`` windows only.
    """

    model: str
    baseline: str
    recipe: Mapping[str, Any]
    recipe_hash: str
    mode: str
    chunk: int | None
    bits_per_element: float
    bits_tokens: int
    asymptotic_bits: float
    cache_dtype: str
    results: Mapping[str, PerplexityResult | DivergenceResult | TaskResult | SpeedResult]
    seq_len: int
    stride: int | None
    windows: int
    tokens: int
    packed_share: float | None
    data: Mapping[str, Any] | None
    seed: int
    dtype: str
    device: str
    implementation: str
    partial: bool
    unfinished: Sequence[str] = ()
    memory: Sequence[Mapping[str, int]] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        first = {"schema_version": self.schema_version, "mode": self.mode, "bits_per_element": self.bits_per_element}
        first["results"] = {name: found.to_dict() for name, found in self.results.items()}
        return first | {name: value for name, value in vars(self).items() if name not in first}


def installed_versions(*extra: str) -> dict[str, str]:
    """Versions of what computes a result; ``extra`` names further packages."""
    found = {"python": platform.python_version()}
    for package in ("kvq-toolkit", "torch", "transformers", *extra):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "0+unknown"
    return found
