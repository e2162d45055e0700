"""What decides an evaluation's numbers, as hashes: the parts of the key that kept answers are filed under."""

import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.cache import CachePlan
from kvq.calib.data import tokenizer_hash
from kvq.eval.evaluated_model import EvaluatedModel
from kvq.eval.result import installed_versions
from kvq.models.resolve import weight_files
from kvq.models.rope import Rope

# Parts of the package that decide no answers, and of ``eval`` the files that do. What is asked is in the names of
# answers, and what is made of them is made anew.
_NOT_DECIDING = {"api.py", "bench", "calib", "cli.py", "commands", "diagnosis", "exporting", "report", "searching"}
_SCORING = ("branches", "continuations", "evaluated_model", "greedy", "likelihood", "lm_eval", "lm_head")
_SCORING += ("two_view", "two_view_attention", "unquantized")
# What says how a folder came to be, and not what its model computes.
_HISTORY = ("quantization_config", "transformers_version", "_name_or_path", "name_or_path")


@functools.cache
def code_version() -> str:
    """SHA-256 over the sources that decide answers: a changed line makes new ones necessary."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for name in _deciding(root):
        digest.update(f"{name}\n".encode() + (root / name).read_bytes())
    return digest.hexdigest()


def _deciding(root: Path) -> list[str]:
    """Sources below ``root``, in Python and C++, that decide answers."""
    found = {file.relative_to(root) for ending in ("py", "cpp", "h") for file in root.rglob(f"*.{ending}")}
    deciding = [file.as_posix() for file in found if file.parts[0] not in {*_NOT_DECIDING, "eval"}]
    return sorted([*deciding, *(f"eval/{name}.py" for name in _SCORING)])


@functools.lru_cache(maxsize=8)
def _weights_hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    def one(entry: tuple[Path, int, int]) -> str:
        with open(entry[0], "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256("".join(pool.map(one, files)).encode()).hexdigest()


def model_hash(folder: Path) -> str:
    """SHA-256 over every byte of the weights, and over the config without what quantizes the cache.

    Every byte, because transforms that are folded into a few small tensors make another model.
    """
    files = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(folder))
    config = json.loads((folder / "config.json").read_bytes())
    config = {name: value for name, value in config.items() if name not in _HISTORY}
    return hashlib.sha256((_weights_hash(files) + json.dumps(config, sort_keys=True)).encode()).hexdigest()


def plan_hash(plan: CachePlan | None) -> str:
    """SHA-256 over all that a plan does to the cache, artefacts included; ``exact`` if it does nothing."""
    if plan is None or not plan.layers:
        return "exact"
    digest = hashlib.sha256()
    _feed(digest, dict(plan.layers))
    return digest.hexdigest()


def _feed(digest, value: Any) -> None:
    """Hash plain data, tensors, and objects by their fields; refuses what it cannot look into."""
    digest.update(f"<{type(value).__name__}>".encode())
    if isinstance(value, Rope):
        # It follows from the model's config, and its table grows as it is used.
        return
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, str | bytes | int | float | bool | torch.dtype):
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        for name in sorted(value, key=repr):
            _feed(digest, name)
            _feed(digest, value[name])
    elif isinstance(value, Sequence | set | frozenset):
        for own in value if isinstance(value, Sequence) else sorted(value, key=repr):
            _feed(digest, own)
    elif is_dataclass(value):
        digest.update(_foreign_code(type(value)))
        # What does not decide equality, such as copies on a device, decides no number either.
        _feed(digest, {field.name: getattr(value, field.name) for field in fields(value) if field.compare})
    elif hasattr(value, "__dict__") and not callable(value):
        _feed(digest, vars(value))
    else:
        raise TypeError(f"{type(value).__name__} in a plan cannot be hashed")


def _foreign_code(cls: type) -> bytes:
    """The source of a class that another distribution has registered; what is kvq's own is in ``code_version``."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return b"" if file is None or cls.__module__.partition(".")[0] == "kvq" else Path(file).read_bytes()


def answers_key(evaluated: EvaluatedModel, **task: Any) -> dict[str, Any]:
    """The key of answers of ``evaluated`` under its plan. ``task``: all else that decides them.

    Versions of the libraries are part of it: another release may round differently, and pairs must not mix them.
    """
    return {
        "model": model_hash(evaluated.folder),
        "tokenizer": tokenizer_hash(evaluated.tokenizer),
        "recipe": evaluated.plan.recipe.hash if evaluated.quantizes else "exact",
        "plan": plan_hash(evaluated.plan),
        "dtype": str(evaluated.model.dtype),
        "device": evaluated.model.device.type,
        "code": code_version(),
        "versions": installed_versions("tokenizers", "lm_eval"),
        **task,
    }
