"""Observers: each a frozen statistic that measures a batch and joins with another as if seen together.

Batches, resumed runs and processes all join by ``merge``; a window's padding is never seen. A new kind is one file
here, a row in ``KINDS``, and a row in ``kvq/calib/needs.py`` that says which tensors it is measured on.
"""

from kvq.calib.observers.base import Statistic
from kvq.calib.observers.bins import Bins
from kvq.calib.observers.histogram import Histogram
from kvq.calib.observers.massive import Massive
from kvq.calib.observers.moments import JointMoments, Moments
from kvq.calib.observers.range import Range
from kvq.calib.observers.reservoir import Reservoir
from kvq.calib.observers.sinks import Sinks
from kvq.calib.observers.tops import Tops

__all__ = [
    "KINDS",
    "STORED",
    "Bins",
    "Histogram",
    "JointMoments",
    "Massive",
    "Moments",
    "Range",
    "Reservoir",
    "Sinks",
    "Statistic",
    "Tops",
]


# By the last word of what a recipe needs: ``key.range``, ``query.moments``, ``reservoir``.
KINDS: dict[str, type[Statistic]] = {
    "range": Range,
    "histogram": Histogram,
    "moments": Moments,
    "weighted_moments": Moments,
    "joint_moments": JointMoments,
    "reservoir": Reservoir,
    "massive": Massive,
    "sinks": Sinks,
}
# And those that only an unfinished run keeps on disk.
STORED = KINDS | {"bins": Bins}
