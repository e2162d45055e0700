"""Typed results, with everything that is needed to repeat them."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """value, baseline: perplexities on the same tokens. delta_nll: mean loss minus the baseline's, nats a token, with
    its standard error over windows (None for one window). tokens: scored tokens."""

    value: float
    baseline: float
    delta_nll: float
    delta_nll_stderr: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class DivergenceResult:
    """kl: mean KL(baseline || recipe), nats a token; kl_p99, kl_max: of the tokens. top1: share of tokens with the same
    most likely next token. Standard errors over windows (None for one window)."""

    kl: float
    kl_stderr: float | None
    kl_p99: float
    kl_max: float
    top1: float
    top1_stderr: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """One metric of an lm-eval task, beside the baseline's on the same requests."""

    value: float
    baseline: float
    stderr: float | None
    baseline_stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """An lm-eval task: metrics by name, documents scored, the task's version.

    packed_share   share of the log-likelihood tokens whose query read at least one quantized token; None if the task
                   generates. At 0 the score says nothing about the recipe: prompts shorter than its exact window.
    """

    metrics: Mapping[str, MetricResult]
    samples: int | None
    task_version: str | None
    packed_share: float | None

    def to_dict(self) -> dict[str, Any]:
        facts = {"samples": self.samples, "task_version": self.task_version, "packed_share": self.packed_share}
        return {name: asdict(metric) for name, metric in self.metrics.items()} | facts


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What ``evaluate`` found, and how.

    mode                   what a scored token attended to (``kvq.cache.two_view``); chunk: tokens, mode chunked only.
    bits_per_element       measured: bytes of a filled cache over the numbers of its full-attention layers, exact tokens
                           and metadata included, at ``bits_tokens`` tokens and the checkpoint's dtype ``cache_dtype``.
    asymptotic_bits        the same without exact tokens.
    results                by task: perplexity, divergence, and lm-eval tasks.
    packed_share           share of the scored tokens of the text whose query read at least one quantized token.
    dtype                  of the weights and activations in this run.
    implementation         what attended.
    partial                True if the run was interrupted: the results cover ``windows`` windows only.
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
    results: Mapping[str, PerplexityResult | DivergenceResult | TaskResult]
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
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        first = {"schema_version": self.schema_version, "mode": self.mode, "bits_per_element": self.bits_per_element}
        first["results"] = {
            name: found.to_dict() if isinstance(found, TaskResult) else asdict(found)
            for name, found in self.results.items()
        }
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
