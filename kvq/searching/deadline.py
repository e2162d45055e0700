"""The time of one run: how much of it each part may take, so that what was found by then is measured and written."""

from time import monotonic

# What may have passed of the limit when a part ends: making options, measuring layers, measuring what was chosen,
# choosing between whole recipes. The rest confirms.
FITTING, MEASURING, REFINING, CHOOSING, CONFIRMING = 0.3, 0.6, 0.7, 0.85, 1.0


class Deadline:
    """Counts from when it is made. ``limit``: seconds of the whole run; None: as long as it takes.

    reserve   seconds that have to be left at the end, once it is known what the least of verifying costs.
    """

    def __init__(self, limit: float | None):
        self.limit, self.reserve = limit, 0.0
        self._start = monotonic()

    def passed(self, share: float, ahead: float = 0.0) -> bool:
        """True if work of ``ahead`` seconds would end after ``share`` of the limit, or leave no time to verify."""
        if self.limit is None:
            return False
        end = monotonic() - self._start + ahead
        return end > min(share * self.limit, self.limit - self.reserve)

    def part(self, share: float, most: float) -> float:
        """Seconds that one step may take: ``share`` of the limit, at most ``most`` and at least one."""
        return most if self.limit is None else min(most, max(1.0, share * self.limit))
