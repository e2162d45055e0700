"""What a check found, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """level: one of LEVELS; about: a file or a part of the checkpoint; text: a sentence."""

    level: str
    about: str
    text: str


def error(about: str, text: str) -> Finding:
    return Finding(level="error", about=about, text=text)


def warning(about: str, text: str) -> Finding:
    return Finding(level="warning", about=about, text=text)


def note(about: str, text: str) -> Finding:
    return Finding(level="note", about=about, text=text)


@dataclass(frozen=True, kw_only=True)
class ScaleSummary:
    """KV scales of a folder. expected, found: how many; smallest, largest: of those found, None if there are none."""

    expected: int = 0
    found: int = 0
    granularity: str | None = None
    smallest: float | None = None
    largest: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The answer for one engine.

    written_by    the kvq target that wrote the folder, None for a stranger's.
    cache_dtype   what the engine's KV cache will hold with the command ``serve``; None if it will not load.
    flag, skip    what that command says of the cache: its dtype, and the layers that stay in 16 bits.
    recipes       shipped recipe -> how the engine can have it on this model, or why not.
    """

    folder: str
    engine: str
    version: str
    written_by: str | None
    cache_dtype: str | None
    serve: str | None
    flag: str | None
    skip: tuple[str, ...]
    scales: ScaleSummary
    findings: tuple[Finding, ...]
    recipes: Mapping[str, str] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "error")

    def to_dict(self) -> dict[str, Any]:
        return {"passes": self.cache_dtype is not None} | asdict(self)
