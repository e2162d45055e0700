"""Kinds of statistics: each a frozen class that measures a batch and joins with another as if seen together.

Batches, resumed runs and processes all join by ``merge``; a window's padding is never seen. A new kind is one file
here, a row in ``KINDS``, and a row in ``kvq/calib/needs.py`` that says which tensors it is measured on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch

from kvq.calib.kinds.bins import Bins
from kvq.calib.kinds.histogram import Histogram
from kvq.calib.kinds.massive import Massive
from kvq.calib.kinds.moments import Moments
from kvq.calib.kinds.range import Range
from kvq.calib.kinds.reservoir import Reservoir
from kvq.calib.kinds.sinks import Sinks
from kvq.calib.kinds.tops import Tops

__all__ = [
    "KINDS",
    "STORED",
    "Bins",
    "Histogram",
    "Massive",
    "Moments",
    "Range",
    "Reservoir",
    "Sinks",
    "Statistic",
    "Tops",
    "to_cpu",
]


class Statistic(Protocol):
    """What every kind can do. ``tensors`` and ``facts`` (plain data) are stored, and ``restore`` reads them back."""

    @property
    def is_finite(self) -> bool: ...

    def merge(self, other: Self) -> Self: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...

    def facts(self) -> dict[str, Any]: ...

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Self: ...


# By the last word of what a recipe needs: ``key.range``, ``query.moments``, ``reservoir``.
KINDS: dict[str, type[Statistic]] = {
    "range": Range,
    "histogram": Histogram,
    "moments": Moments,
    "weighted_moments": Moments,
    "reservoir": Reservoir,
    "massive": Massive,
    "sinks": Sinks,
}
# And those that only an unfinished run keeps on disk.
STORED = KINDS | {"bins": Bins}


def to_cpu(statistic: Statistic) -> Statistic:
    """The same statistic with all tensors on the CPU."""
    moved = {}
    for field in dataclasses.fields(statistic):
        value = getattr(statistic, field.name)
        moved[field.name] = value.cpu() if isinstance(value, torch.Tensor) else value
    return type(statistic)(**moved)
