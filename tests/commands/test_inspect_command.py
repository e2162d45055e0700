"""``kvq inspect`` and ``kvq doctor``."""

import json
import re
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    MambaConfig,
    Olmo2Config,
    RwkvConfig,
    T5Config,
)

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


@pytest.fixture
def whole_folder_of(folder_of):
    """A folder that holds the model of a config, random weights and all."""

    def make(config):
        folder = folder_of(config)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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
    assert "attention: reference" in result.stdout


def test_doctor_and_inspect_say_which_layers_can_be_quantized(run, whole_folder_of):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
    config = Gemma3TextConfig(num_hidden_layers=6, head_dim=64, architectures=["Gemma3ForCausalLM"], **sizes)
    folder = whole_folder_of(config)
    assert "can be quantized: 1 of 6 layers" in run("doctor", folder).stdout
    report = json.loads(run("inspect", folder, "--json", "-").stdout)
    assert report["kind"] == "model"
    assert [layer["kind"] for layer in report["layers"]] == ["sliding"] * 5 + ["full"]


def test_doctor_says_which_engines_take_fp8_scales(run, whole_folder_of):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 32}
    config = Olmo2Config(num_hidden_layers=1, num_attention_heads=2, architectures=["Olmo2ForCausalLM"], **sizes)
    found = json.loads(run("doctor", whole_folder_of(config), "--json", "-").stdout)["model"]["fp8"]
    assert found["SGLang 0.5.23"] == "no: it loads no KV scales for Olmo2ForCausalLM"
    assert found["vLLM 0.33"].startswith("--target vllm")


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


def test_statistics_get_a_verdict_as_text_and_data(run, tiny_checkpoint, stats):
    file = stats(tiny_checkpoint(head_dim=32))
    result = run("inspect", file)
    assert result.exit_code == 0
    for said in ("Verdict:", "Predicted before anything is quantized", "K 4", "Cause: only 2 of 2 layers have"):
        assert said in result.stdout
    report = json.loads(run("inspect", file, "--json", "-").stdout)
    assert report["diagnosis"]["verdict"] in result.stdout
    assert set(report["bit_errors"]["layers"]) == {"0", "1"}


def test_pictures_and_page_are_written(run, tiny_checkpoint, stats, tmp_path):
    file, page, folder = stats(tiny_checkpoint(head_dim=32)), tmp_path / "report.html", tmp_path / "pictures"
    assert run("inspect", file, "--html", page, "--png", folder, "--recipe", "turboquant4").exit_code == 0
    names = {path.name for path in folder.iterdir()}
    assert {"channels-key.png", "channels-value.png", "sinks.png", "massive.png", "bits.png", "losses.png"} <= names
    assert {"tokens-000.png", "tokens-001.png"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    text = page.read_text()
    assert text.count("<svg ") == len(names)
    assert len(set(re.findall(r'aria-label="([^"]*)"', text))) > len(names)
    assert "Verdict:" in text
    assert "http" not in re.sub(r"base64,[\w+/=\s]+", "", text).replace("http-equiv", "")


@pytest.mark.long
def test_the_same_statistics_give_the_same_page(run, tiny_checkpoint, stats, tmp_path):
    file = stats(tiny_checkpoint(head_dim=32))
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    for page in pages:
        run("inspect", file, "--html", page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_model_is_measured_when_asked(run, tiny_checkpoint, stats):
    folder = tiny_checkpoint(head_dim=32)
    plain = run("inspect", folder)
    assert "Verdict" not in plain.stdout
    assert "--measure" in plain.stdout
    measured = json.loads(run("inspect", folder, "--measure", "--json", "-").stdout)
    assert measured["kind"] == "model"
    assert measured["diagnosis"]["predictions"]
    given = json.loads(run("inspect", folder, "--stats", stats(folder), "--json", "-").stdout)
    assert given["diagnosis"]["recommended"] == measured["diagnosis"]["recommended"]


def test_a_recipe_is_predicted_with_its_settings(run, tiny_checkpoint, stats):
    file = stats(tiny_checkpoint(head_dim=32))
    arguments = ("inspect", file, "--recipe", "kivi2", "--set", "key.bits=8", "--set", "value.bits=8", "--json", "-")
    report = json.loads(run(*arguments).stdout)
    rows = [row for row in report["diagnosis"]["predictions"] if row["recipe"].startswith("kivi2")]
    assert sorted(round(row["bits_per_element"]) for row in rows) == [3, 9]


def test_inspect_refuses_what_does_not_go_together(refuse, run, tiny_checkpoint, stats, exported, tmp_path):
    folder = tiny_checkpoint(head_dim=32)
    file = stats(folder)
    refuse("inspect", folder, "--measure", "--stats", file, says=("--measure", "--stats"))
    refuse("inspect", file, "--measure", says=("statistics",))
    refuse("inspect", file, "--recipe", "klt3", says=("'klt3'", "head_dim=32"))
    refuse("inspect", file, "--html", tmp_path / "no" / "page.html", says=("does not exist",))
    refuse("inspect", file, "--png", file, says=("is a file",))
    refuse("inspect", tiny_checkpoint(layers=3, head_dim=32, name="other"), "--stats", file, says=("another shape",))
    assert not list(tmp_path.glob("*.html"))


def test_an_export_is_no_patient(refuse, exported):
    refuse("inspect", exported("kivi2"), "--measure", says=("quantized already", "base model"))


def test_statistics_that_hold_too_little_say_so(run, refuse, tiny_checkpoint, text, tmp_path):
    file = tmp_path / "few.st"
    run("calibrate", tiny_checkpoint(), "-o", file, "--data", text, "--samples", 2, "--seq-len", 64, "--for", "fp8")
    result = run("inspect", file)
    assert result.exit_code == 0
    assert "No verdict: the statistics hold no queries" in result.stdout
    refuse("inspect", file, "--html", tmp_path / "page.html", says=("no queries",))


def test_without_matplotlib_pictures_are_refused_with_the_way_out(refuse, tiny_checkpoint, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "kvq.report.drawing", raising=False)
    refuse("inspect", tiny_checkpoint(), "--png", tmp_path / "pictures", says=("matplotlib", "kvq-toolkit[report]"))


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
