"""Read a checkpoint folder without trusting it: every problem becomes a finding, and what can be read is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvq.errors import KvqError
from kvq.exporting.check.findings import Finding, error, note
from kvq.exporting.checkpoint import PROVENANCE, QUANT_METHOD, load_plan, quantization_of
from kvq.exporting.manifest import MANIFEST, Progress, broken_files, read_manifest
from kvq.models.resolve import INDEX_FILE, load_config, read_header, weights_fingerprint


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a folder holds.

    config       config.json as plain data; quantization: its ``quantization_config``, {} for none.
    headers      file -> tensor -> entry of the safetensors header, of the files that engines read.
    written_by   the kvq target that wrote it, or None.
    """

    path: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    headers: Mapping[str, Mapping[str, Any]]
    written_by: str | None

    @property
    def hides_files(self) -> bool:
        """True if a file of the name ``model.safetensors`` lies beside other files of the index."""
        return len(self.headers) > 1 and (self.path / "model.safetensors").is_file()

    @property
    def tensors(self) -> dict[str, str]:
        """Tensor name -> file."""
        return {name: file for file, header in self.headers.items() for name in header if name != "__metadata__"}

    def tensor(self, name: str):
        """One tensor of the folder. Raises OSError if it cannot be read."""
        try:
            with safe_open(self.path / self.tensors[name], framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as wrong:
            raise OSError(str(wrong)) from None


def read_folder(path: Path, *, quick: bool, progress: Progress | None) -> tuple[Folder, list[Finding]]:
    """Read a folder and compare it with its own manifest, index and hashes."""
    found: list[Finding] = []
    written_by = _compare(path, found, quick, progress)
    config = _config(path, found)
    headers = _headers(path, found)
    quantization = quantization_of(config) or {}
    if not isinstance(quantization, dict):
        found.append(error("config.json", f"has {type(quantization).__name__} as quantization_config, not a mapping."))
        quantization = {}
    own = quantization.get("quant_method") == QUANT_METHOD
    marked = any((header.get("__metadata__") or {}).get("written_by") == "kvq" for header in headers.values())
    marked = marked or (path / PROVENANCE).is_file()
    if written_by is None and (marked or own):
        found.append(error(MANIFEST, "is missing, and kvq wrote one: copy the whole folder again, or export again."))
    if own:
        written_by = "kvq"
        found += _own_format(path, quantization)
    elif written_by is None and not marked:
        found.append(note("files", "nothing says what they should be: kvq did not write this folder."))
    folder = Folder(path=path, config=config, quantization=quantization, headers=headers, written_by=written_by)
    return folder, found


def _compare(path: Path, found: list[Finding], quick: bool, progress: Progress | None) -> str | None:
    """Compare every file with the manifest; returns the target that it names."""
    try:
        manifest = read_manifest(path)
    except KvqError as wrong:
        found.append(error(MANIFEST, str(wrong).partition(" ")[2]))
        return "unknown"
    if manifest is None:
        return None
    for name, what in broken_files(path, manifest, quick=quick, progress=progress):
        found.append(error(name, f"{what}: copy the whole folder again, or export again."))
    return str(manifest["target"])


def _config(path: Path, found: list[Finding]) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError
    except (OSError, ValueError):
        found.append(error("config.json", "cannot be read as JSON."))
        return {}
    return config


def _headers(path: Path, found: list[Finding]) -> dict[str, dict[str, Any]]:
    """Headers of the files that engines read: those of the index, or every safetensors file of the root without one."""
    present = sorted(file.name for file in path.glob("*.safetensors"))
    weight_map = _weight_map(path, found)
    wanted = present if weight_map is None else sorted(set(weight_map.values()))
    if not wanted:
        found.append(error("weights", "there is no safetensors file."))
    headers = {}
    for name in wanted:
        try:
            headers[name] = read_header(path / name)
        except KvqError as wrong:
            found.append(error(name, str(wrong).partition(" ")[2]))
    if weight_map is None:
        if len(present) > 1:
            found.append(error(INDEX_FILE, f"is missing, and there are {len(present)} files of weights."))
        return headers
    owners: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header:
            if name != "__metadata__":
                owners.setdefault(name, []).append(file)
    for name in sorted(set(owners) | set(weight_map)):
        files, listed = owners.get(name, []), weight_map.get(name)
        if listed in headers and files != [listed]:
            found.append(error(INDEX_FILE, f"says that {name!r} is in {listed!r}, and it is in {files or 'no file'}."))
            break
        if listed is None:
            found.append(error(INDEX_FILE, f"does not list {name!r} of {files[0]!r}."))
            break
    return headers


def _weight_map(path: Path, found: list[Finding]) -> dict[str, str] | None:
    try:
        weight_map = json.loads((path / INDEX_FILE).read_bytes())["weight_map"]
        if not all(isinstance(n, str) and isinstance(f, str) and Path(f).name == f for n, f in weight_map.items()):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found.append(error(INDEX_FILE, "is no readable shard index."))
        return None
    return weight_map


def _own_format(path: Path, quantization: Mapping[str, Any]) -> list[Finding]:
    """What ``from_pretrained`` would say of a folder in kvq's own format, manifest or not."""
    try:
        load_plan(path, quantization, load_config(path))
        if weights_fingerprint(path) != quantization["weights_fingerprint"]:
            return [error("weights", "are not the ones that were exported.")]
    except KvqError as wrong:
        return [error("export", str(wrong))]
    lost = [name for name in quantization["copied"] if not (path / name).is_file()]
    return [error(name, "is missing, and was exported with the model.") for name in lost]
