"""Exporter: unchanged weights, whole folder or none, same bytes every time, and refusals that name the way out."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvq.calib.artefacts import fit_artefacts
from kvq.calib.observers import Range
from kvq.calib.stats import LayerStats, Stats
from kvq.errors import CheckpointError, DataError, RecipeError, UnsupportedModelError
from kvq.exporting import exporter
from kvq.exporting.checkpoint import ARTEFACTS, load_plan
from kvq.exporting.exporter import export
from kvq.exporting.manifest import MANIFEST
from kvq.models.describe import describe
from kvq.models.resolve import load_config, weights_fingerprint
from kvq.recipe import load_recipe


@pytest.fixture
def source(tiny_checkpoint):
    return tiny_checkpoint(layers=2, head_dim=32, heads=2, kv_heads=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ".kvq-" in p.name]


def make_stats(folder: Path, absmax: float = 4.48) -> Stats:
    spec = describe(load_config(folder))

    def channel():
        x = torch.full((1, 32), absmax)
        return Range(count=8, min=-x, max=x / 2, sum=0 * x, sum_squares=(x * x).double())

    return Stats(
        layers={la.index: LayerStats({"key.range": channel(), "value.range": channel()}) for la in spec.full_layers},
        model="tiny",
        model_fingerprint=spec.fingerprint,
        weights_fingerprint=weights_fingerprint(folder),
    )


def test_an_export_is_the_model_and_its_side_files(source, tmp_path):
    result = export(source, "kivi2", tmp_path / "out")
    before, after = contents(source), contents(tmp_path / "out")
    assert after["model.safetensors"] == before["model.safetensors"]
    config = json.loads(after["config.json"])
    fields = config.pop("quantization_config")
    assert config == json.loads(before["config.json"])
    assert set(after) == set(before) | {
        "README.md", "recipe.yaml", "model.safetensors.index.json", ARTEFACTS, "kvq/provenance.json", MANIFEST,
    }  # fmt: skip
    assert result.files == tuple(sorted(after))
    index = json.loads(after["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert load_plan(tmp_path / "out", fields, load_config(source)).recipe.name == "kivi2"
    assert str(tmp_path) not in after["README.md"].decode() + after["kvq/provenance.json"].decode()
    assert json.dumps(result.to_dict())


def test_the_card_warns_first(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    export(source, "kivi2", tmp_path / "out", base_name="owner/base")
    front, body = (tmp_path / "out/README.md").read_text().split("---\n")[1:3]
    assert "base_model: owner/base" in front
    assert "license: apache-2.0" in front
    assert body.strip().splitlines()[2].startswith("> **Without `import kvq` this model loads with an UNQUANTIZED")


@pytest.mark.parametrize("linking", [True, False])
def test_shards_are_linked_or_copied(source, tmp_path, monkeypatch, linking):
    """Same bytes either way; an index of several shards is taken over as it is."""
    tensors = sorted(load_file(source / "model.safetensors").items())
    shards = {f"model-0000{i}-of-00002.safetensors": dict(tensors[i - 1 :: 2]) for i in (1, 2)}
    (source / "model.safetensors").unlink()
    for name, tensors in shards.items():
        save_file(tensors, source / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {t: name for name, tensors in shards.items() for t in tensors}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    if not linking:
        monkeypatch.setattr(os, "link", _raise(OSError(errno.EXDEV, "cross-device link")))
    result = export(source, "kivi2", tmp_path / "out")
    assert (result.linked, result.copied) == ((2, 0) if linking else (0, 2))
    for name in shards:
        assert os.path.samefile(source / name, tmp_path / "out" / name) == linking
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert json.loads((tmp_path / "out/model.safetensors.index.json").read_text()) == index


def test_links_of_the_hub_cache_are_resolved(source, tmp_path):
    """A hub snapshot holds symbolic links to blobs: the export must hold files."""
    blob, snapshot = tmp_path / "models--a--b/blobs/0", tmp_path / "models--a--b/snapshots/0"
    blob.parent.mkdir(parents=True)
    shutil.copytree(source, snapshot)
    shutil.move(snapshot / "model.safetensors", blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    export(snapshot, "kivi2", tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").is_symlink()
    assert os.path.samefile(blob, tmp_path / "out/model.safetensors")


def test_two_exports_are_equal(source, tmp_path):
    export(source, "kivi4", tmp_path / "one")
    export(source, "kivi4", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    export(source, "kivi2", tmp_path / "three")
    assert contents(tmp_path / "one") != contents(tmp_path / "three")


def test_bytes_do_not_depend_on_the_release_of_transformers(tmp_path, monkeypatch):
    """The export of a fixed model has one hash for every supported release of transformers and torch."""
    monkeypatch.setattr("kvq.exporting.checkpoint.__version__", "0")
    monkeypatch.setattr("kvq.exporting.checkpoint.requires", lambda name: [])
    source = tmp_path / "base"
    source.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64, "vocab_size": 32,
        "max_position_embeddings": 128, "torch_dtype": "float16",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    sizes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
             "self_attn.o_proj": (64, 64), "mlp.gate_proj": (64, 64), "mlp.up_proj": (64, 64),
             "mlp.down_proj": (64, 64), "input_layernorm": (64,), "post_attention_layernorm": (64,)}  # fmt: skip
    weights = {f"model.layers.{i}.{name}.weight": torch.zeros(size) for i in (0, 1) for name, size in sizes.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    export(source, "kivi2", tmp_path / "out")
    digest = hashlib.sha256()
    for name, content in contents(tmp_path / "out").items():
        # The manifest holds nothing but hashes of the others.
        digest.update(name.encode() + content if name != MANIFEST else b"")
    assert digest.hexdigest() == "316e95fb1de9dc745fd373e6270d8d5d0a0cc637d05e832ece384166c9dd680c"


def test_calibrated_scales_are_absmax_over_448(source, tmp_path):
    stats = make_stats(source, absmax=4.48)
    stats.save(tmp_path / "stats.safetensors")
    for i, given in enumerate((stats, tmp_path / "stats.safetensors")):
        export(source, "fp8", tmp_path / f"out{i}", stats=given)
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1")
    fields = json.loads((tmp_path / "out0/config.json").read_text())["quantization_config"]
    plan = load_plan(tmp_path / "out0", fields, load_config(source))
    assert plan.layers[1][0].codecs["key"].scale == pytest.approx(0.01, rel=1e-6)
    provenance = json.loads((tmp_path / "out0/kvq/provenance.json").read_text())
    digest = hashlib.sha256((tmp_path / "stats.safetensors").read_bytes()).hexdigest()
    assert provenance["statistics"]["sha256"] == digest


def test_scales_of_odd_statistics(source):
    recipe, spec = load_recipe("fp8"), describe(load_config(source))
    assert {float(s) for s in fit_artefacts(recipe, spec, make_stats(source, absmax=0.0)).values()} == {1.0}
    with pytest.raises(DataError, match="must be finite"):
        fit_artefacts(recipe, spec, make_stats(source, absmax=float("inf")))


def test_statistics_are_needed_and_must_be_this_models(source, tmp_path, tiny_checkpoint):
    with pytest.raises(RecipeError, match="kvq calibrate"):
        export(source, "fp8", tmp_path / "out")
    other = tiny_checkpoint(layers=2, head_dim=32, heads=2, kv_heads=1, seed=1, name="other")
    with pytest.raises(CheckpointError, match="other weights"):
        export(source, "fp8", tmp_path / "out", stats=make_stats(other))
    assert not (tmp_path / "out").exists()


def test_generation_config_never_names_a_cache(source, tmp_path):
    """A cache_implementation there would make generate build another cache than the packed one."""
    path = source / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cache_implementation": "static", "top_k": 7}))
    export(source, "kivi2", tmp_path / "out")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert "cache_implementation" not in written
    assert written["top_k"] == 7


def test_force_replaces_an_export_and_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    export(source, "kivi2", out)
    with pytest.raises(CheckpointError, match="--force"):
        export(source, "kivi4", out)
    export(source, "kivi4", out, force=True)
    assert "kivi4" in (out / "recipe.yaml").read_text()
    assert leftovers(tmp_path) == []
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no kvq export"):
        export(source, "kivi2", other, force=True)
    assert (other / "thesis.txt").exists()


@pytest.mark.parametrize("where", [".", "inner", ".."])
def test_source_and_target_must_be_apart(source, where):
    before = contents(source)
    with pytest.raises(CheckpointError, match="choose another"):
        export(source, "kivi2", source / where, force=True)
    assert contents(source) == before


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"quant_method": "kvq"}, "kvq export already"), ({"quant_method": "awq", "bits": 4}, "quantized by 'awq'")],
)
def test_quantized_sources_are_refused(source, tmp_path, fields, match):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    with pytest.raises(CheckpointError, match=match):
        export(source, "kivi2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_sources_are_refused(source, tmp_path):
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        export(source, "kivi2", tmp_path / "out")
    (source / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises((UnsupportedModelError, CheckpointError)):
        export(source, "kivi2", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def _raise(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_nothing(source, tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "link", _raise(OSError(errno.EPERM, "no links")))
    monkeypatch.setattr(shutil, "copyfile", _raise(OSError(number, os.strerror(number))))
    with pytest.raises(CheckpointError, match="disk is full" if number == errno.ENOSPC else "cannot be written"):
        export(source, "kivi2", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_an_interrupted_export_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "placing_weights", _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export(source, "kivi2", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


KILLER = """
import os, shutil, signal, sys, threading
from pathlib import Path
source, root = Path(sys.argv[1]), Path(sys.argv[2])
from kvq.exporting.exporter import export
# A killed process loses nothing that it has written, flushed or not, and flushing takes most of the time.
os.fsync = lambda handle: None

def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def child(moment, out, force):
    seen, lock = [0], threading.Lock()
    def watched(call):
        def run(*args, **kwargs):
            with lock:
                seen[0] += 1
                if seen[0] == moment: os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return run
    for owner, name in ((os, "link"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree"),
                        (Path, "write_bytes")):
        setattr(owner, name, watched(getattr(owner, name)))
    export(source, "kivi2", out, force=force)
    os._exit(0)

for force in (False, True):
    out = root / f"out{force}"
    export(source, "kivi2", root / "whole"); new = tree(root / "whole"); shutil.rmtree(root / "whole")
    export(source, "kivi4", root / "whole"); old = tree(root / "whole"); shutil.rmtree(root / "whole")
    moment, absent, present = 0, 0, 0
    while True:
        moment += 1
        if force: export(source, "kivi4", out, force=True)
        pid = os.fork()
        if pid == 0: child(moment, out, force)
        status = os.waitpid(pid, 0)[1]
        if out.exists():
            present += 1
            assert tree(out) in ([new, old] if force else [new]), (moment, force)
        else:
            absent += 1
        if status == 0: break
        assert os.WIFSIGNALED(status), status
        if not force and out.exists(): shutil.rmtree(out)
        elif force and not out.exists():
            # What was moved aside comes back.
            try: export(source, "kivi2", out)
            except ValueError: assert tree(out) == old
            else: raise SystemExit("the old export was lost")
    export(source, "kivi2", out, force=True)
    assert tree(out) == new
    assert not [p for p in root.iterdir() if ".kvq-" in p.name], list(root.iterdir())
    print(force, moment, absent, present)
"""


@pytest.mark.long
def test_killed_at_any_moment(source, tmp_path):
    """SIGKILL before each call that touches the file system: no folder, or a whole one; the next export clears up."""
    root = tmp_path / "root"
    root.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(root)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    fresh, forced = (line.split() for line in run.stdout.splitlines())
    assert int(fresh[1]) > 15
    assert int(fresh[2]) > 10
    assert int(fresh[3]) >= 1
    assert int(forced[1]) > int(fresh[1])


def test_a_link_out_of_the_folder_is_not_taken_along(source, tmp_path):
    """An export is uploaded. Control: a link within it."""
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (source / "vocab.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"'vocab.json' of model .* leads out of its folder"):
        export(source, "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "vocab.json").unlink()
    (source / "own.json").write_text("{}")
    (source / "vocab.json").symlink_to(source / "own.json")
    export(source, "int4", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [("num_hidden_layers", 3, "lacks the weight 'model.layers.2."), ("intermediate_size", 32, "has the shape")],
)
def test_half_a_model_is_not_exported(source, tmp_path, setting, value, reason):
    """More layers in the config than stored, or other shapes: nothing is left. The rest of the file is the control."""
    config = json.loads((source / "config.json").read_text())
    assert config[setting] != value
    (source / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(CheckpointError, match=reason):
        export(source, "int4", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
