"""Fault injection: whatever happens to whatever file of an export, ``kvq check`` does not pass it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvq
from kvq.exporting.check import check_folder
from kvq.exporting.engines import find_release
from kvq.exporting.exporter import export
from kvq.exporting.manifest import MANIFEST
from kvq.exporting.targets import TARGETS

INDEX = "model.safetensors.index.json"
# What every target writes, and what each of them, in every form that it has, writes beside it.
COMMON = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", MANIFEST, "kvq/provenance.json", INDEX,
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
SCALED = {"kv_scales.safetensors", "model-00001-of-00001.safetensors", "recipe.yaml"}
WRITTEN = {
    ("kvq", "kivi2"): {"kvq/artefacts.safetensors", "model.safetensors", "recipe.yaml"},
    ("kvq", "qoq4"): {"kvq/artefacts.safetensors", "model.safetensors", "recipe.yaml"},
    ("vllm", "fp8"): SCALED,
    ("vllm", "qoq4"): {"model-00001-of-00001.safetensors", "recipe.yaml"},
    ("sglang", "fp8"): SCALED,
    ("compressed-tensors", "fp8"): SCALED,
    ("modelopt", "fp8"): SCALED | {"hf_quant_config.json"},
    ("plain", "qoq4"): {"model.safetensors"},
}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def passes(folder: Path, target: str) -> bool:
    """True if the engine that the folder was written for is said to load it."""
    (report,) = check_folder(folder, [find_release(TARGETS[target].engines[0])])
    return not report.errors


def faults(content: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Faults of a file by name; None stands for its removal."""
    yield "removed", None
    yield "empty", b""
    yield "truncated", content[:-1]
    yield "one byte more", content + b" "
    for place, at in {"start": 0, "middle": len(content) // 2, "end": len(content) - 1}.items():
        yield f"one bit at the {place}", content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def unnoticed(folder: Path, target: str) -> list[tuple[str, str]]:
    """(file, fault) for every fault of every file with which the folder passes; it is whole again afterwards."""
    found = []
    for name in sorted(files_of(folder)):
        path = folder / name
        content = path.read_bytes()
        for fault, altered in faults(content):
            # Weights are hard links: the fault must not reach the source.
            path.unlink()
            if altered is not None:
                path.write_bytes(altered)
            if passes(folder, target):
                found.append((name, fault))
            path.write_bytes(content)
    return found


@pytest.fixture
def made(tiny_checkpoint, stats_of, tmp_path):
    """Factory ``made(target, recipe) -> Path``: an export of a tiny model."""

    def make(target: str, recipe: str) -> Path:
        source = tiny_checkpoint(layers=2, head_dim=32, heads=4, kv_heads=2)
        export(source, recipe, tmp_path / "out", target=target, stats=stats_of(source))
        return tmp_path / "out"

    return make


def test_every_target_is_here():
    assert {target for target, _ in WRITTEN} == set(TARGETS)


@pytest.mark.parametrize(("target", "recipe"), WRITTEN)
def test_every_file_that_is_lost_or_altered_is_an_error(made, target, recipe):
    folder = made(target, recipe)
    # The faults reach every file, and without one the folder passes.
    assert files_of(folder) == COMMON | WRITTEN[target, recipe]
    assert passes(folder, target)
    assert unnoticed(folder, target) == []
    assert passes(folder, target)


def test_faults_of_what_save_pretrained_wrote(made, tmp_path):
    """A model that was loaded and saved again vouches for its files too; a tokenizer saved beside it does no harm."""
    folder, saved = made("kvq", "kivi2"), tmp_path / "saved"
    kvq.load(folder).save_pretrained(saved)
    assert files_of(saved) == {
        "README.md", "config.json", "generation_config.json", MANIFEST, "kvq/artefacts.safetensors",
        "kvq/provenance.json", "model.safetensors", INDEX, "recipe.yaml",
    }  # fmt: skip
    shutil.copy(folder / "tokenizer.json", saved)
    assert passes(saved, "kvq")
    assert unnoticed(saved, "kvq") == [("tokenizer.json", fault) for fault, _ in faults(b" ")]


def test_saving_over_an_export_vouches_for_the_new_files(made):
    folder = made("kvq", "kivi2")
    before = (folder / MANIFEST).read_bytes()
    model = kvq.load(folder)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(folder)
    assert (folder / MANIFEST).read_bytes() != before
    assert passes(folder, "kvq")
    assert unnoticed(folder, "kvq") == []


def test_without_a_manifest_nothing_vouches_for_the_tokenizer(made):
    """The control: what the manifest adds. Side files and weights have hashes of their own; the rest has none."""
    folder = made("kvq", "kivi2")
    (folder / MANIFEST).unlink()
    (report,) = check_folder(folder, [find_release("transformers")])
    assert [finding.about for finding in report.errors] == [MANIFEST]
