"""Speed and time left of a work whose steps may take minutes: the mean since it began, and what goes on since."""

from collections.abc import Callable
from time import monotonic


class Estimate:
    """done, total in steps, of which ``begun`` were there before; a step that runs counts by its share.

    rich's own estimate forgets steps that are older than 30 seconds, and so knows nothing of longer ones.
    """

    def __init__(self, clock: Callable[[], float] = monotonic):
        self.clock = clock
        self.restart()

    def restart(self) -> None:
        self.begun: float | None = None
        self.done, self.total = 0.0, 0.0

    def at(self, done: float, total: float) -> None:
        """So much is done; the first call since ``restart`` says what was there before."""
        now = self.clock()
        if self.begun is None:
            self.begun, self.start = done, now
        self.done, self.total, self.last = done, total, now

    @property
    def per_second(self) -> float | None:
        """Steps a second on average; None before anything was done."""
        if self.begun is None or self.done <= self.begun or self.last <= self.start:
            return None
        return (self.done - self.begun) / (self.last - self.start)

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes, by the clock of now; None as long as nothing is known."""
        speed = self.per_second
        return None if speed is None else max(0.0, (self.total - self.done) / speed - (self.clock() - self.last))
