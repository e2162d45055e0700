"""What a search has found so far, one JSON line a finished job, so that a killed search goes on where it was.

The first line says which search it is. A line that a kill cut short is dropped. Numbers are written with all their
digits, so a search that went on chooses what an undisturbed one would have chosen.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvq.atomic import write_whole
from kvq.errors import CheckpointError

logger = logging.getLogger(__name__)


def identity_hash(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a search's numbers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """Jobs by name, in memory and, if ``path`` is given, on disk.

    seconds   spent on jobs so far, those of earlier runs included.
    """

    def __init__(self, path: Path | None, identity: str):
        self.path, self.found, self.seconds, self.resumed = path, {}, 0.0, 0
        self._file = None
        if path is None:
            return
        kept = self._read(identity) if path.exists() else []
        self.resumed = len(kept)
        for line in kept:
            self.found[line["job"]] = line["found"]
            self.seconds += line["seconds"]
        # Rewritten without what was cut short; replaced at once, so that a kill here loses nothing.
        write_whole(path, [f"{json.dumps(line)}\n".encode() for line in ({"search": identity}, *kept)])
        self._file = path.open("a", encoding="utf-8")

    def _read(self, identity: str) -> list[dict[str, Any]]:
        lines = []
        try:
            for text in self.path.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(text))
        except json.JSONDecodeError:
            # The last line, which a kill cut short; anything after it would be of no run of ours.
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the journal {self.path.name!r} cannot be read ({error}): remove it.") from None
        if not lines or lines[0].get("search") != identity:
            logger.warning("Starting over: %s belongs to a search with other arguments.", self.path.name)
            return []
        return lines[1:]

    def do(self, job: str, work: Callable[[], Any]) -> Any:
        """The result of a job: remembered, or worked out now and remembered."""
        if job not in self.found:
            start = time.monotonic()
            found = work()
            self.note(job, found, time.monotonic() - start)
        return self.found[job]

    def note(self, job: str, found: Any, seconds: float) -> None:
        """Remember a result that took ``seconds``."""
        # Through JSON and back, so that a fresh result and a remembered one are the same numbers.
        text = json.dumps({"job": job, "found": found, "seconds": seconds})
        self.found[job] = json.loads(text)["found"]
        self.seconds += seconds
        if self._file:
            self._file.write(text + "\n")
            self._file.flush()

    def close(self, remove: bool = False) -> None:
        if self._file:
            self._file.close()
            self._file = None
        if remove and self.path:
            self.path.unlink(missing_ok=True)
