"""from_pretrained of an export runs on the packed cache; saving writes an export again; nothing gets worse silently."""

import copy
import json
import pickle
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config
from transformers.cache_utils import DynamicLayer

import kvq
from kvq.cache import PackedLayer
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.codebooks import learn_codebooks
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.errors import CheckpointError, KvqError, ModelNotFoundError
from kvq.exporting.exporter import export
from kvq.models.describe import describe

TOKENS = torch.arange(3, 203)[None] % 100
KNOWS_ATTENTION = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


@pytest.fixture
def base(tiny_checkpoint):
    return tiny_checkpoint(layers=2, head_dim=32, heads=2, kv_heads=1)


@pytest.fixture
def exported(base, tmp_path):
    export(base, "kivi2", tmp_path / "out")
    return tmp_path / "out"


def layers_of(model) -> list[type]:
    out = model.generate(TOKENS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    return [type(layer) for layer in out.past_key_values.layers]


def chunked_logits(model) -> torch.Tensor:
    """Logits of the second half, which reads the first half from the cache."""
    with torch.inference_mode():
        cache = model(TOKENS[:, :180]).past_key_values
        return model(TOKENS[:, 180:], past_key_values=cache).logits


def test_generate_uses_the_packed_cache(exported, base):
    """With the control that the base model does not, and that the cache counts: logits differ from the base's."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert layers_of(model) == [PackedLayer] * 2
    assert layers_of(plain) == [DynamicLayer] * 2
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert not torch.allclose(chunked_logits(model), chunked_logits(plain), atol=1e-3)
    assert model.kvq.recipe.name == "kivi2"
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_compileable


def test_an_exact_recipe_changes_nothing(base, tmp_path):
    export(base, "fp16", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(chunked_logits(kvq.load(tmp_path / "out")), chunked_logits(plain))


def test_same_as_quantized_cache(exported, base):
    """An export and quantized_cache with its recipe are the same computation."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with kvq.quantized_cache(model, "kivi2"):
        want = chunked_logits(model)
    assert torch.equal(chunked_logits(kvq.load(exported)), want)


@pytest.mark.parametrize("recipe", ["kivi2", "ordered"])
def test_round_trip_law(base, tmp_path, recipe):
    """export -> load -> save_pretrained -> load gives the same bits, twice; order of layer patterns included."""
    ordered = kvq.load_recipe("int8").override({"layers.1.key.bits": 4, "layers.0-1.key.bits": 2})
    export(base, ordered if recipe == "ordered" else recipe, tmp_path / "out")
    first = kvq.load(tmp_path / "out")
    want = chunked_logits(first)
    for turn in range(2):
        model = kvq.load(tmp_path / ("out" if turn == 0 else f"saved{turn - 1}"))
        model.save_pretrained(tmp_path / f"saved{turn}")
        again = kvq.load(tmp_path / f"saved{turn}")
        assert torch.equal(chunked_logits(again), want)
        assert again.kvq.plan == first.kvq.plan
    saved = tmp_path / "saved1"
    assert "attn" not in (saved / "config.json").read_text()
    assert (saved / "README.md").read_bytes() == (tmp_path / "out/README.md").read_bytes()
    assert (saved / "kvq/provenance.json").is_file()


@pytest.mark.parametrize("name", ["kvquant3", "skvq2", "turboquant3", "gear2", "qjl", "nvfp4", "nf4"])
def test_every_family_of_codecs_comes_back_from_its_export(base, tmp_path, name):
    """Exports with made-up statistics: loading, saving and loading gives the logits of ``quantized_cache``."""
    recipe, model = kvq.load_recipe(name), AutoModelForCausalLM.from_pretrained(base)
    if name in ("skvq2", "gear2"):
        recipe = recipe.override({"key.group": 32 if name == "gear2" else 16, "value.group": 16})
    stats = calibrated(model, recipe)
    export(base, recipe, tmp_path / "out", stats=stats, fold=False)
    with kvq.quantized_cache(model, recipe, fit_artefacts(recipe, describe(model.config), stats) if stats else None):
        want = chunked_logits(model)
    loaded = kvq.load(tmp_path / "out")
    assert torch.equal(chunked_logits(loaded), want)
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(chunked_logits(kvq.load(tmp_path / "saved")), want)
    assert not torch.equal(chunked_logits(AutoModelForCausalLM.from_pretrained(base)), want)


def calibrated(model, recipe) -> Stats | None:
    needs = needs_of(recipe, describe(model.config))
    if not needs:
        return None
    stats = collect(model, TOKENS, needs=needs, strict=True)
    return learn_codebooks(model, [recipe], stats, TOKENS)


def test_saving_over_the_export_leaves_the_base_alone(exported, base):
    """Export and base share their weight file by hard link: a save of changed weights must not reach through it."""
    before = (base / "model.safetensors").read_bytes()
    model = kvq.load(exported)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(exported)
    assert (base / "model.safetensors").read_bytes() == before
    assert torch.equal(kvq.load(exported).lm_head.weight, model.lm_head.weight)


def test_saving_in_shards(exported, tmp_path):
    model = kvq.load(exported)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    assert torch.equal(chunked_logits(kvq.load(tmp_path / "saved")), chunked_logits(model))


def test_copies_save_themselves(exported, tmp_path):
    """deepcopy and pickle give models whose save_pretrained is their own."""
    model = kvq.load(exported)
    for i, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert other.save_pretrained.args[0] is other
        assert layers_of(other) == [PackedLayer] * 2
        with torch.no_grad():
            other.lm_head.weight.zero_()
        other.save_pretrained(tmp_path / f"copy{i}")
        assert not kvq.load(tmp_path / f"copy{i}").lm_head.weight.any()
    assert model.lm_head.weight.any()


def test_push_to_hub_of_half_an_export_is_refused(exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.push_to_hub"):
        kvq.load(exported).save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


def test_attention_asked_for_is_attention_given(exported):
    want = kvq.load(exported)
    assert want.config._attn_implementation == "kvq"
    eager = kvq.load(exported, attn_implementation="eager")
    assert eager.config._attn_implementation == eager.kvq.attention == "eager"
    sdpa = kvq.load(exported, attn_implementation="sdpa")
    # Transformers 5.17 does not tell a quantizer what was asked for.
    assert sdpa.config._attn_implementation == sdpa.kvq.attention == ("sdpa" if KNOWS_ATTENTION else "kvq")
    for model in (eager, sdpa):
        assert layers_of(model) == [PackedLayer] * 2
        assert torch.allclose(chunked_logits(model), chunked_logits(want), atol=1e-4)


FAULTS = [
    (name, fault)
    for name in (
        "config.json", "model.safetensors", "recipe.yaml", "kvq/artefacts.safetensors", "kvq/provenance.json",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    )
    for fault in ("remove", "alter")
    # Settings of generation and tokenizer are the user's to edit.
    if fault == "remove" or not name.startswith(("generation", "tokenizer"))
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_fault_injection(exported, name, fault):
    """Every file taken away or changed by one bit: loading fails, and never gives a worse model."""
    path = exported / name
    if fault == "remove":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises((KvqError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(exported)


def test_weights_of_another_model_are_refused(exported, tiny_checkpoint):
    """Same shapes, other numbers: recipe and scales were made for the exported weights."""
    other = tiny_checkpoint(layers=2, head_dim=32, heads=2, kv_heads=1, seed=5, name="other")
    (exported / "model.safetensors").unlink()
    shutil.copyfile(other / "model.safetensors", exported / "model.safetensors")
    with pytest.raises(CheckpointError, match="not the ones that were exported"):
        AutoModelForCausalLM.from_pretrained(exported)


@pytest.mark.parametrize(("field", "value"), [("speed", 1), ("schema_version", 99)])
def test_a_newer_format_names_its_writer(exported, field, value):
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"] |= {"kvq_version": "7.8", field: value}
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"7\.8"):
        AutoModelForCausalLM.from_pretrained(exported)


def test_load_takes_exports_only(base, tmp_path):
    with pytest.raises(CheckpointError, match="no kvq export"):
        kvq.load(base)
    for missing in (tmp_path / "nowhere", "./nowhere", "nobody/nothing"):
        with pytest.raises(ModelNotFoundError):
            kvq.load(missing)


@pytest.fixture
def hub(exported, tmp_path):
    """The export as a hub cache would hold it: ``hub / models--owner--name / snapshots / <commit>``."""
    commit = "a" * 40
    repository = tmp_path / "hub/models--owner--name"
    shutil.copytree(exported, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    return tmp_path / "hub"


def test_hub_snapshot_loads(hub):
    model = AutoModelForCausalLM.from_pretrained("owner/name", cache_dir=hub)
    assert layers_of(model) == [PackedLayer] * 2
    assert layers_of(kvq.load("owner/name", cache_dir=hub)) == [PackedLayer] * 2


def test_hub_side_files_are_fetched_at_the_same_revision(hub, monkeypatch):
    """transformers fetches weights and config; kvq fetches the rest of that very snapshot, or says that it cannot."""
    snapshot = next((hub / "models--owner--name/snapshots").iterdir())
    shutil.move(snapshot / "kvq", hub / "remote")
    with pytest.raises(CheckpointError, match="not in the hub cache"):
        AutoModelForCausalLM.from_pretrained("owner/name", cache_dir=hub)
    asked = []

    def download(repo_id, filename, *, revision, cache_dir):
        asked.append((repo_id, filename, revision))
        (snapshot / filename).parent.mkdir(exist_ok=True)
        shutil.copyfile(hub / "remote" / filename.removeprefix("kvq/"), snapshot / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert layers_of(AutoModelForCausalLM.from_pretrained("owner/name", cache_dir=hub)) == [PackedLayer] * 2
    names = ("kvq/artefacts.safetensors", "kvq/provenance.json")
    assert asked == [("owner/name", name, "a" * 40) for name in names]


def test_vision_language_model(tmp_path):
    """The decoder's full layers are packed; quantization_config inside text_config is found there too."""
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=127, boi_token_index=125,
        eoi_token_index=126,
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    export(tmp_path / "base", "kivi2", tmp_path / "out")
    path = tmp_path / "out/config.json"
    for nested in (False, True):
        data = json.loads(path.read_text())
        if nested:
            data["text_config"]["quantization_config"] = data.pop("quantization_config")
            path.write_text(json.dumps(data))
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert type(model(TOKENS).past_key_values.layers[1]) is PackedLayer
        model.save_pretrained(tmp_path / f"saved{nested}")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / f"saved{nested}")
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
