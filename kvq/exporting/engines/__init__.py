"""What serving engines read of a checkpoint's KV cache, by engine and release: data tables, and how to ask them.

One YAML file an engine. A new release is a row under ``releases``; a new way of storing scales is a row under
``readers``, by the ``quant_method`` that a checkpoint names. Nothing here imports an engine.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import yaml

from kvq.errors import RecipeError, suggest

# How a scale's name is spelled from the name of its attention module, the side (k or v) being {s}.
SPELLINGS = {
    "attention": "{module}.{s}_scale",
    "projection": "{module}.{s}_proj.{s}_scale",
    "parameter": "{module}.attn.{s}_scale",
}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How an engine reads KV scales from checkpoints of one quant_method.

    spelled   keys of SPELLINGS that it understands.
    tensor, head   under which condition one scale a layer, or one a head, is read: '' for always, None for never.
    dtype     what the cache becomes without any flag; None: it stays in 16 bits.
    flag      value of the engine's cache dtype flag that the serve command needs; None for no flag.
    needs     fields that ``quantization_config`` must have; filled: those that must not be empty.
    missing   what a scale that is not there becomes.
    package   a package that must be installed beside the engine.
    zeros     False if it fails on packed integer weights that have zero points.
    """

    spelled: tuple[str, ...] = ()
    tensor: str | None = None
    head: str | None = None
    dtype: str | None = None
    flag: str | None = None
    needs: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    missing: str = ""
    package: str | None = None
    zeros: bool = True


@dataclass(frozen=True, kw_only=True)
class OwnDtype:
    """A cache dtype whose scales the engine computes itself, token by token and head by head.

    bits      of a stored number; codec: affine or float8.
    rotates   True if the engine rotates keys and values itself before it rounds them.
    where     under which condition it runs; '' for always.
    """

    bits: int
    codec: str
    rotates: bool = False
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release of one engine.

    modules        names of attention modules under which it looks for scales.
    architectures  architecture -> spelling that it must be given, or None if every architecture reads scales.
    refused        quant_method -> why nothing can be had with it.
    own            by name, as the engine's cache dtype flag takes it.
    single_file_first   True if it reads a file named model.safetensors without looking at the index.
    """

    engine: str
    title: str
    version: str
    transformers: str
    serve: str
    readers: Mapping[str, Reader]
    refused: Mapping[str, str]
    modules: tuple[str, ...]
    architectures: Mapping[str, str] | None = None
    own: Mapping[str, OwnDtype] = field(default_factory=dict)
    dtype_flag: str | None = None
    skip_flag: str | None = None
    single_file_first: bool = False

    @property
    def name(self) -> str:
        return f"{self.title} {self.version}"

    def command(self, folder: str, dtype: str | None = None, skip: tuple[str, ...] = ()) -> str:
        """The command that serves a folder. dtype: value of the cache dtype flag; skip: layers kept in 16 bits."""
        flags = f" {self.dtype_flag} {dtype}" if dtype else ""
        flags += f" {self.skip_flag} {' '.join(skip)}" if skip else ""
        return self.serve.format(folder=folder, flags=flags)

    def spelling(self, reader: Reader, architecture: str) -> str | None:
        """How scales must be spelled for an architecture; None if it reads none."""
        if self.architectures is None:
            return reader.spelled[0] if reader.spelled else None
        found = self.architectures.get(architecture)
        return reader.spelled[0] if found == "mapped" else found


@functools.cache
def engines() -> dict[str, dict[str, Release]]:
    """Every known engine and its releases, oldest first."""
    found = {}
    for file in sorted(resources.files("kvq.exporting.engines").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            data = yaml.safe_load(file.read_text())
            found[data["engine"]] = {version: _release(data, version) for version in data["releases"]}
    return found


def find_release(engine: str, version: str | None = None) -> Release:
    """One engine's release; without ``version`` the newest known. '0.33' also answers for 0.33.1.

    Raises RecipeError for an engine or a release that is not in the tables.
    """
    known = engines()
    if engine not in known:
        raise RecipeError(f"engine {engine!r} is not known.{suggest(engine, known)}")
    releases = known[engine]
    if version is None:
        return list(releases.values())[-1]
    matches = [release for known_as, release in releases.items() if f"{version}.".startswith(f"{known_as}.")]
    if not matches or not re.fullmatch(r"[0-9]+(\.[0-9]+)*[\w.+-]*", version):
        raise RecipeError(
            f"{engine} {version} is not in the tables, which know {', '.join(releases)}: take the nearest of these, "
            "and try the result with --run."
        )
    return matches[-1]


def _release(data: Mapping[str, Any], version: str) -> Release:
    """A row under ``releases`` with what all releases of the engine share."""
    shared = ("engine", "title", "serve", "dtype_flag", "skip_flag", "single_file_first")
    row, lists = data["releases"][version], data.get("architectures")
    return Release(
        version=version,
        modules=tuple(data["modules"]),
        architectures=lists and {name: spelling for spelling, names in lists.items() for name in names},
        readers={method: _reader(reader) for method, reader in row["readers"].items()},
        own={name: OwnDtype(**dtype) for name, dtype in row.get("own", {}).items()},
        **{name: row[name] for name in ("transformers", "refused")},
        **{name: data[name] for name in shared if name in data},
    )


def _reader(data: Mapping[str, Any]) -> Reader:
    lists = {f.name for f in fields(Reader) if f.type in (tuple[str, ...],)}
    return Reader(**{name: tuple(value) if name in lists else value for name, value in data.items()})
