"""The manifest notices what is lost, altered or added, and an alteration of itself."""

import hashlib
import json

import pytest

from kvq.errors import CheckpointError
from kvq.exporting.checkpoint import to_json
from kvq.exporting.manifest import (
    MANIFEST,
    _digest,
    broken_files,
    build_manifest,
    leads_out,
    read_manifest,
    restated,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kvq").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / MANIFEST).write_bytes(build_manifest(tmp_path, "vllm"))
    return tmp_path


def test_it_lists_size_and_hash_of_every_file(folder):
    manifest = read_manifest(folder)
    assert manifest["target"] == "vllm"
    assert manifest["files"] == {
        "config.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        "model.safetensors": {"bytes": 1000, "sha256": hashlib.sha256(bytes(1000)).hexdigest()},
    }
    assert list(broken_files(folder, manifest)) == []


def test_known_hashes_are_taken_and_progress_counts_the_rest(folder):
    (folder / MANIFEST).unlink()
    seen = []
    known = {"model.safetensors": "0" * 64}
    manifest = json.loads(build_manifest(folder, "vllm", known, lambda done, total: seen.append((done, total))))
    assert manifest["files"]["model.safetensors"]["sha256"] == "0" * 64
    assert seen == [(2, 2)]


def test_files_above_a_limit_are_listed_by_size(folder):
    """What config.json vouches for: an altered byte is another's to find, a lost one is not."""
    seen, weights = [], folder / "model.safetensors"
    (folder / MANIFEST).write_bytes(build_manifest(folder, "kvq", None, lambda *own: seen.append(own), limit=999))
    manifest = read_manifest(folder)
    assert manifest["files"]["model.safetensors"] == {"bytes": 1000, "sha256": None}
    assert manifest["files"]["config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert seen[-1] == (2, 2)
    assert list(broken_files(folder, manifest)) == []
    weights.write_bytes(bytes(999) + b"1")
    assert list(broken_files(folder, manifest)) == []
    weights.write_bytes(bytes(999))
    assert [name for name, _ in broken_files(folder, manifest)] == ["model.safetensors"]


def test_faults_are_named(folder):
    manifest = read_manifest(folder)
    (folder / "config.json").write_text("[]")
    (folder / "model.safetensors").unlink()
    (folder / "extra.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("harmless")
    assert dict(broken_files(folder, manifest)) == {
        "config.json": "has been altered",
        "model.safetensors": "is missing",
        "extra.safetensors": "does not belong to the export",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["files"].pop("config.json"),
        lambda data: data["files"]["config.json"].update(bytes=3),
        lambda data: data.update(target="sglang"),
        lambda data: data.update(sha256="0" * 64),
        lambda data: data.pop("sha256"),
        lambda data: data.update(more=1),
    ],
)
def test_a_manifest_vouches_for_itself(folder, change):
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="has been altered"):
        read_manifest(folder)


def test_no_manifest(tmp_path):
    assert read_manifest(tmp_path) is None


def test_only_what_is_named_is_listed(folder):
    assert set(json.loads(build_manifest(folder, "kvq", names=["config.json", MANIFEST]))["files"]) == {"config.json"}


def test_a_file_that_is_changed_on_purpose(folder):
    """The new manifest vouches for the new content, for everything else as before, and for itself."""
    before = read_manifest(folder)
    assert {name for name, _ in broken_files(folder, before)} == set()
    (folder / MANIFEST).write_bytes(restated(folder, "config.json", b"[1]"))
    assert {name for name, _ in broken_files(folder, read_manifest(folder))} == {"config.json"}
    (folder / "config.json").write_bytes(b"[1]")
    after = read_manifest(folder)
    assert list(broken_files(folder, after)) == []
    assert after["files"]["model.safetensors"] == before["files"]["model.safetensors"]
    (folder / MANIFEST).unlink()
    assert restated(folder, "config.json", b"{}") is None


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", "C:\\secret", "", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused_before_anything_is_read(folder, name):
    """A hostile manifest has a sound hash of its own."""
    secret = folder.parent / "secret"
    secret.write_text("private")
    data = read_manifest(folder)
    data["files"] = {**data["files"], name: {"bytes": 7, "sha256": hashlib.sha256(b"private").hexdigest()}}
    (folder / MANIFEST).write_bytes(to_json(data | {"sha256": _digest(data)}))
    with pytest.raises(CheckpointError, match="no file of its folder"):
        read_manifest(folder)
    # Control: a name inside is taken.
    assert not leads_out("kvq/recipe.yaml")
