"""lm-eval task files given by path: ``--tasks mine.yaml``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvq.errors import DataError

SUFFIX = ".yaml"


class _Loader(yaml.SafeLoader):
    """Reads task files without running the Python functions that they may name (``!function``)."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def task_names(tasks: Sequence[str]) -> dict[str, Path | None]:
    """Names of tasks in the given order, each with its file if it was given as one.

    Raises DataError for a file that does not exist, is no task file, or states the name of another given task.
    """
    found: dict[str, Path | None] = {}
    for given in tasks:
        file = Path(given).expanduser().resolve() if given.endswith(SUFFIX) else None
        name = given if file is None else _stated_name(file)
        if name in found and found[name] != file:
            raise DataError(f"two of the tasks are called {name!r}: evaluate them one after the other, or rename one.")
        found[name] = file
    return found


def is_group(file: Path) -> bool:
    """True if the file states a group, whose tasks are found by name."""
    return "group" in _content(file)


def _stated_name(file: Path) -> str:
    content = _content(file)
    # A group lists its tasks under the word that names a single one.
    name = content.get("group") or content.get("task")
    if not isinstance(name, str):
        raise DataError(f"task file {file.name!r} names no task: write 'task: NAME' (or 'group: NAME') into it.")
    return name


def _content(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise DataError(f"task file {file.name!r} does not exist: give a task file of lm-eval's, or a task's name.")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        raise DataError(f"task file {file.name!r} cannot be read as YAML: check it.") from None
    return content if isinstance(content, dict) else {}
