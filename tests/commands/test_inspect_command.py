"""``kvq inspect`` and ``kvq doctor``."""

import json
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, Gemma3TextConfig, MambaConfig, RwkvConfig, T5Config

WITHOUT_CACHE = {
    "mamba": (MambaConfig(architectures=["MambaForCausalLM"]), ("'mamba'",)),
    "rwkv": (RwkvConfig(architectures=["RwkvForCausalLM"]), ("'rwkv'",)),
    "encoder": (BertConfig(architectures=["BertForMaskedLM"]), ("'bert'", "causal")),
    "encoder-decoder": (T5Config(architectures=["T5ForConditionalGeneration"]), ("'t5'", "decoder-only")),
}


@pytest.fixture
def folder_of(tmp_path):
    """``folder_of(config) -> Path``: a checkpoint folder whose weights play no part."""

    def make(config):
        folder = tmp_path / "model"
        config.save_pretrained(folder)
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_models_without_a_kv_cache_are_refused_by_every_command(refuse, folder_of, tmp_path, name):
    config, says = WITHOUT_CACHE[name]
    folder = folder_of(config)
    refuse("inspect", folder, says=says)
    refuse("calibrate", folder, "-o", tmp_path / "stats", says=says)
    refuse("export", folder, "--recipe", "kivi2", "-o", tmp_path / "out", says=says)
    refuse("generate", folder, "--recipe", "kivi2", "--prompt", "x", says=says)
    refuse("doctor", folder, says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_doctor_tells_a_machine_why_before_it_fails(run, folder_of):
    result = run("doctor", folder_of(WITHOUT_CACHE["mamba"][0]), "--json", "-")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["model"]["quantizable"] is False


def test_doctor_names_versions_and_what_will_run(run):
    result = run("doctor")
    assert result.exit_code == 0
    assert version("torch") in result.stdout
    assert "torch reference" in result.stdout


def test_doctor_and_inspect_say_which_layers_can_be_quantized(run, folder_of):
    config = Gemma3TextConfig(num_hidden_layers=6, head_dim=64, architectures=["Gemma3ForCausalLM"])
    folder = folder_of(config)
    assert "can be quantized: 1 of 6 layers" in run("doctor", folder).stdout
    report = json.loads(run("inspect", folder, "--json", "-").stdout)
    assert report["kind"] == "model"
    assert [layer["kind"] for layer in report["layers"]] == ["sliding"] * 5 + ["full"]


def test_inspect_a_model(run, tiny_checkpoint):
    result = run("inspect", tiny_checkpoint(layers=3, head_dim=32))
    assert "3 of 3" in result.stdout
    assert "full attention: can be quantized" in result.stdout


def test_inspect_statistics(run, tiny_checkpoint, stats):
    file = stats(tiny_checkpoint())
    assert "Keys and queries (after RoPE)" in run("inspect", file).stdout
    report = json.loads(run("inspect", file, "--json", "-").stdout)
    assert report["kind"] == "statistics"
    assert [row["layer"] for row in report["layers"]] == [0, 1]
    assert report["layers"][0]["key"]["absmax"] > 0


def test_inspect_an_export(run, exported):
    folder = exported("kivi2")
    result = run("inspect", folder)
    assert "unaltered" in result.stdout
    report = json.loads(run("inspect", folder, "--json", "-").stdout)
    assert (report["kind"], report["recipe"]["name"]) == ("export", "kivi2")
    assert report["provenance"]["base_model"] == "tiny"


def test_inspect_refuses_what_it_cannot_read(refuse, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("hello, this is nothing of ours")
    refuse("inspect", file, says=("notes.txt",))
    refuse("inspect", tmp_path, says=("config.json",))
    refuse("inspect", "owner/name", says=("'owner/name'",))


@pytest.mark.parametrize("name", ["kvq/artefacts.safetensors", "recipe.yaml", "kvq/provenance.json"])
def test_a_missing_or_altered_side_file_is_refused_by_every_command(refuse, exported, name):
    folder = exported("kivi2")
    file = folder / name
    content = file.read_bytes()
    for change, says in ((content + b" ", "hash differs"), (None, "lacks")):
        file.unlink() if change is None else file.write_bytes(change)
        refuse("inspect", folder, says=(repr(name), says))
        refuse("generate", folder, "--prompt", "x", says=(repr(name), says))
        refuse("eval", folder, "--limit", "1", says=(repr(name), says))


ROTATED = """
name: rotated
key: {codec: affine, bits: 4, axis: token, group: head}
value: {codec: affine, bits: 4, axis: token, group: head}
transforms: {key: [%s], value: [{kind: hadamard}]}
"""


def test_inspect_says_where_the_transforms_of_an_export_are(run, tiny_checkpoint, tmp_path):
    recipe = tmp_path / "rotated.yaml"
    recipe.write_text(ROTATED % "{kind: hadamard}")
    run("export", tiny_checkpoint(head_dim=32), "--recipe", recipe, "-o", tmp_path / "out")
    report = json.loads(run("inspect", tmp_path / "out", "--json", "-").stdout)
    assert report["transforms"] == [
        "keys of layers 0 to 1: hadamard while the model runs",
        "values of layers 0 to 1: hadamard in the weights",
    ]
    recipe.write_text(ROTATED % "")
    run("export", tmp_path / "tiny", "--recipe", recipe, "--target", "plain", "-o", tmp_path / "plain")
    result = run("inspect", tmp_path / "plain")
    assert "Plain export plain" in result.stdout
    assert "hadamard in the weights" in result.stdout
    (tmp_path / "plain/kvq/manifest.json").write_text("{}")
    assert run("inspect", tmp_path / "plain").exit_code == 2
