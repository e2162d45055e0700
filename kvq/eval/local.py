"""lm-eval's tasks on the rows of a local folder: ``--task-data DIR``, without a network.

A task file (``kvq/eval/tasks/*.yaml``) names lm-eval's own task, whose prompts, metrics and version it keeps, and the
fields that a row must have. In DIR the rows of task NAME are in the one file ``NAME.jsonl``, or else the one file
``NAME_*.jsonl`` (wikitext also: ``wikitext*.txt``). A file with ``train`` in its name holds examples for prompts; where
there is none, the last 32 rows do, and are not asked.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from kvq.errors import DataError

EXAMPLES = 32
_HEADING = re.compile(r"^ = [^=].*[^=] = $")


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """A task with its rows. identity: file names, hashes and counts."""

    name: str
    include: str
    rows: Sequence[Mapping[str, Any]]
    examples: Sequence[Mapping[str, Any]]
    identity: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write a task file that lm-eval reads, and its rows, into ``folder``."""
        import lm_eval.tasks

        base = Path(lm_eval.tasks.__file__).parent / self.include
        if not base.is_file():
            raise DataError(f"this release of lm-eval has no task file {self.include!r}: install lm-eval 0.4.13.")
        splits = {"asked": self.rows, "examples": self.examples or self.rows[:1]}
        files = {split: folder / f"{self.name}.{split}.jsonl" for split in splits}
        for split, rows in splits.items():
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "include": str(base),
            "task": self.name,
            "tag": [],
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(file) for split, file in files.items()},
                "cache_dir": str(folder / "datasets"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": "asked",
            "fewshot_split": "examples",
        }
        (folder / f"{self.name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def local_names() -> list[str]:
    """Tasks that have a file here."""
    files = resources.files("kvq.eval.tasks").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def local_task(name: str, folder: str | Path) -> LocalTask:
    """Read a task's rows. Raises DataError for a folder, file or row that does not fit, with what is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"task data folder {str(folder)!r} does not exist: give a folder with files such as {name}.jsonl."
        )
    spec = yaml.safe_load(resources.files("kvq.eval.tasks").joinpath(f"{name}.yaml").read_text())
    asked, training = _files(name, folder)
    rows = _rows(asked, spec["fields"])
    if training is not None:
        examples = _rows(training, spec["fields"])
    else:
        count = min(EXAMPLES, len(rows) // 4) if spec.get("examples", True) else 0
        rows, examples = rows[: len(rows) - count], rows[len(rows) - count :]
    identity = {"file": asked.name, "sha256": _sha256(asked), "rows": len(rows), "examples": len(examples)}
    if training is not None:
        identity |= {"examples_file": training.name, "examples_sha256": _sha256(training)}
    return LocalTask(name=name, include=spec["include"], rows=rows, examples=examples, identity=identity)


def _files(name: str, folder: Path) -> tuple[Path, Path | None]:
    suffixes = (".jsonl", ".txt") if name == "wikitext" else (".jsonl",)
    begins = (f"{name}.", name) if name == "wikitext" else (f"{name}.", f"{name}_")
    found = [file for file in sorted(folder.iterdir()) if file.suffix in suffixes and file.name.startswith(begins)]
    training = [file for file in found if "train" in file.stem]
    asked = [file for file in found if file not in training]
    exact = [file for file in asked if file.stem == name]
    for kind, files in (("rows", exact or asked), ("examples", training)):
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"several files could hold the {kind} of {name!r} ({names}): leave one in {folder.name!r}.")
    if not asked:
        raise DataError(
            f"{folder.name!r} holds no rows for task {name!r}: name the file {name}.jsonl or {name}_*.jsonl."
        )
    return (exact or asked)[0], training[0] if training else None


def _rows(file: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"task data {file.name!r} is not UTF-8 text: save it as UTF-8.") from None
    if file.suffix == ".txt":
        return [{"page": page} for page in wikitext_pages(text)]
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise DataError(f"line {number} of {file.name!r} is not JSON: write one object a line.") from None
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"line {number} of {file.name!r} has no field {missing[0]!r}: this task needs it.")
        rows.append(row)
    if not rows:
        raise DataError(f"task data {file.name!r} is empty: put one JSON object on each line.")
    return rows


def wikitext_pages(text: str) -> list[str]:
    """Articles of WikiText: a page begins at a heading of the first level. An empty row may be a line of one space."""
    pages: list[list[str]] = []
    for row in text.split("\n"):
        if _HEADING.match(row) or not pages:
            pages.append([])
        pages[-1].append(row if row.strip() else "")
    found = ["\n".join(rows) for rows in pages]
    return [page for page in found if page.strip()]


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
