"""What a search has found so far, an item a finished job, so that a killed search goes on where it was.

Numbers are kept with all their digits, so a search that went on chooses what an undisturbed one would have chosen.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvq.eval.results_cache import Answers

logger = logging.getLogger(__name__)


def identity_hash(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a search's numbers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Journal(Answers):
    """Jobs by name, in memory and, if ``path`` is given, on disk. Another search's are removed.

    seconds   spent on jobs so far, those of earlier runs included.
    """

    _way_out = "remove that file."

    def __init__(self, path: Path | None, identity: str):
        super().__init__(None if path is None else path.parent, {"kind": "search"}, None if path is None else path.name)
        kept = self.items()
        if kept.pop("search", identity) != identity:
            logger.warning("Starting over: %s belongs to a search with other arguments.", self.path.name)
            self.clear()
            kept = {}
        self.put([("search", identity)])
        self.found = {job: row["found"] for job, row in kept.items()}
        self.seconds = sum(row["seconds"] for row in kept.values())

    def do(self, job: str, work: Callable[[], Any]) -> Any:
        """The result of a job: remembered, or worked out now and remembered."""
        if job not in self.found:
            self.do_together([job], lambda: [work()])
        return self.found[job]

    def do_together(self, jobs: Sequence[str], work: Callable[[], Iterable[Any]]) -> None:
        """Work jobs out at once, and remember the results; each gets its share of the time.

        ``work`` may stop early: what it gives are the results of the first jobs.
        """
        start = time.monotonic()
        found = list(work())
        jobs = jobs[: len(found)]
        seconds = (time.monotonic() - start) / max(len(jobs), 1)
        self.put([(job, {"found": own, "seconds": seconds}) for job, own in zip(jobs, found)])
        # As they were kept, so that a fresh result and a remembered one are the same numbers.
        self.found |= {job: row["found"] for job, row in zip(jobs, self.get(jobs))}
        self.seconds += seconds * len(jobs)
