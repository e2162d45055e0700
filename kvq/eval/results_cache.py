"""Answers of a model, kept on disk while an evaluation runs, so that an interrupted run continues.

One SQLite file a key. The key says everything that decides an answer (weights, recipe, mode, task, code, ...), so
answers of different recipes never lie in one file. SQLite commits whole transactions, so what a kill leaves is whole.
"""

import base64
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvq.errors import CheckpointError


class Answers:
    """Answers by item name; values are plain JSON data.

    folder   None keeps them in memory only. name: of the file; None: by the key.
    """

    _way_out = "remove that file, choose another folder with --cache, or do without with --no-cache."

    def __init__(self, folder: str | Path | None, key: Mapping[str, Any], name: str | None = None):
        self.key = json.dumps(key, sort_keys=True)
        self.path = None if folder is None else Path(folder) / (name or f"{_digest(self.key)[:32]}.sqlite")
        with self._usable():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process may be writing to the same file: wait for it.
            self._base = sqlite3.connect(self.path or ":memory:", timeout=60)
            self._prepare()

    def _prepare(self) -> None:
        with self._base:
            self._base.execute("CREATE TABLE IF NOT EXISTS key (text TEXT PRIMARY KEY)")
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (item TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._base.execute("INSERT OR IGNORE INTO key VALUES (?)", (self.key,))
            found = [text for (text,) in self._base.execute("SELECT text FROM key")]
        if found != [self.key]:
            raise CheckpointError(f"{self.path.name!r} holds answers of another evaluation: remove it.")

    def get(self, items: Sequence[str]) -> list[Any] | None:
        """The answers of all the items, or None if any is missing."""
        found = []
        with self._usable():
            for item in items:
                row = self._base.execute("SELECT value FROM answers WHERE item = ?", (item,)).fetchone()
                if row is None:
                    return None
                found.append(json.loads(row[0]))
        return found

    def put(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Store answers, all or none."""
        rows = [(item, json.dumps(value)) for item, value in pairs]
        with self._usable(), self._base:
            self._base.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def recall(self, items: Sequence[str], compute: Callable[[], Iterable[Any]]) -> list[Any]:
        """The answers of all the items; if any is missing, what ``compute`` gives for all, which is then kept.

        Items that were computed together stay so: a batch gives the same bits whether it was interrupted or not.
        """
        found = self.get(items)
        if found is None:
            found = list(compute())
            self.put(zip(items, found))
        return found

    def items(self) -> dict[str, Any]:
        """All answers, in the order in which they came."""
        with self._usable():
            rows = self._base.execute("SELECT item, value FROM answers ORDER BY rowid")
            return {item: json.loads(value) for item, value in rows}

    def clear(self) -> None:
        with self._usable(), self._base:
            self._base.execute("DELETE FROM answers")

    def __len__(self) -> int:
        return self._base.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        self._base.close()

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            where = "memory" if self.path is None else str(self.path)
            raise CheckpointError(
                f"answers of an earlier run in {where!r} cannot be used ({error}): {self._way_out}"
            ) from None


def item_name(kind: str, *parts: Any) -> str:
    """The name of one item: its kind and a hash of what it asks, plain data."""
    return f"{kind}:{_digest(json.dumps(parts, sort_keys=True))}"


def packed_tensor(tensor: torch.Tensor) -> str:
    """A one-dimensional tensor as text, to the bit."""
    return f"{str(tensor.dtype).removeprefix('torch.')}:{base64.b64encode(tensor.cpu().numpy().tobytes()).decode()}"


def unpacked_tensor(text: str) -> torch.Tensor:
    name, _, data = text.partition(":")
    raw = bytearray(base64.b64decode(data))
    dtype = getattr(torch, name)
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
