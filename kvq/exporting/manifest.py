"""``kvq/manifest.json``: size and SHA-256 of every file of an export, so that anything lost or altered is noticed.

What tokenizers, transformers and serving engines read carries no hash of its own. The manifest is checked by ``kvq
check`` and not by ``from_pretrained``; it also holds a hash of itself. Large weights of kvq's own format are listed by
size alone: to hash them takes longer than the rest of an export, and config.json has their fingerprint, which is
checked at every load (``kvq.models.resolve.weights_fingerprint``).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from kvq.errors import CheckpointError
from kvq.exporting.checkpoint import to_json

MANIFEST = "kvq/manifest.json"
VERSION = 1
# Larger files are weights; a quick check compares their size alone, as every check does in kvq's own format.
QUICK_BYTES = 16 * 2**20
_CHUNK = 8 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int, int], None]


def build_manifest(
    folder: Path,
    target: str,
    known: dict[str, str] | None = None,
    progress: Progress | None = None,
    names: Iterable[str] | None = None,
    limit: float = math.inf,
) -> bytes:
    """The manifest of the files ``names`` in ``folder``, by default of all that are there.

    known      SHA-256 of files that need not be read, by name.
    progress   called with (bytes hashed, bytes in all).
    limit      larger files are listed by size alone.
    """
    known = known or {}
    names = sorted(set(_files(folder) if names is None else names) - {MANIFEST})
    sizes = {name: (folder / name).stat().st_size for name in names}
    digest = _hasher(sum(size for name, size in sizes.items() if name not in known and size <= limit), progress)
    entries: dict[str, dict[str, Any]] = {}
    for name, size in sizes.items():
        found = known.get(name) or (digest(folder / name) if size <= limit else None)
        entries[name] = {"bytes": size, "sha256": found}
    return _signed({"manifest_version": VERSION, "target": target, "files": entries})


def restated(folder: Path, name: str, content: bytes) -> bytes | None:
    """The manifest of a folder in which the file ``name`` is about to become ``content``; None if it has no manifest.

    Raises CheckpointError if the manifest is altered.
    """
    data = read_manifest(folder)
    if data is None:
        return None
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return _signed(data | {"files": dict(sorted({**data["files"], name: entry}.items()))})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None if it has none. Raises CheckpointError if it is altered."""
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST!r} cannot be read ({error.strerror or error}): export again.") from None
    try:
        data = json.loads(content)
        digest, version = data.pop("sha256"), data["manifest_version"]
        entries = list(data["files"].values())
        if digest != _digest(data) or to_json(data | {"sha256": digest}) != content:
            raise ValueError
        if not all(_is_hash(entry["sha256"]) and entry["bytes"] >= 0 for entry in entries):
            raise ValueError
        outside = next((name for name in data["files"] if leads_out(name)), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST!r} has been altered: copy the whole folder again, or export again.") from None
    if outside is not None:
        # Before anything is read: whoever made the folder also made the hash.
        raise CheckpointError(f"{MANIFEST!r} lists {outside!r}, which is no file of its folder: do not use it.")
    if version != VERSION:
        raise CheckpointError(
            f"{MANIFEST!r} has version {version!r} and this kvq reads {VERSION}: install the kvq that wrote it."
        )
    return data


def broken_files(
    folder: Path, manifest: dict[str, Any], *, quick: bool = False, progress: Progress | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (file, what is wrong with it) for every file that is missing, altered, or not of the export.

    quick   compare only the size of files above ``QUICK_BYTES``.
    """
    entries = manifest["files"]
    hashed = {n: e for n, e in entries.items() if e["sha256"] and (not quick or e["bytes"] <= QUICK_BYTES)}
    digest = _hasher(sum(entry["bytes"] for entry in hashed.values()), progress)
    for name, entry in sorted(entries.items()):
        path = folder / name
        if not path.is_file():
            yield name, "is missing"
            continue
        size = path.stat().st_size
        if size != entry["bytes"]:
            yield name, f"has {size:,} bytes instead of {entry['bytes']:,}"
        elif name in hashed and digest(path) != entry["sha256"]:
            yield name, "has been altered"
    for name in sorted(set(_files(folder)) - set(entries) - {MANIFEST}):
        # Weights that nobody listed would be read by engines; other strangers do no harm.
        if name.endswith(".safetensors") and "/" not in name:
            yield name, "does not belong to the export"


def leads_out(name: object) -> bool:
    """True for what is no name of a file inside a folder: untrusted text must not lead out of it."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return True
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _is_hash(digest: str | None) -> bool:
    return digest is None or bool(_SHA256.fullmatch(digest))


def _files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _hasher(total: int, progress: Progress | None) -> Callable[[Path], str]:
    """SHA-256 of files that have ``total`` bytes together."""
    done = 0

    def sha256(path: Path) -> str:
        nonlocal done
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while block := stream.read(_CHUNK):
                digest.update(block)
                done += len(block)
                if progress:
                    progress(done, total)
        return digest.hexdigest()

    return sha256


def _signed(data: dict[str, Any]) -> bytes:
    return to_json(data | {"sha256": _digest(data)})


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
