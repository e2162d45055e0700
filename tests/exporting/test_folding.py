"""Exports whose weights have taken over transforms: what changes, what does not, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import kvq
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.errors import CheckpointError, RecipeError
from kvq.eval.two_view import two_view
from kvq.exporting import exporter
from kvq.exporting.exporter import export
from kvq.models.describe import describe
from kvq.models.resolve import weights_fingerprint
from kvq.recipe import parse_recipe

CODEC = {"codec": "affine", "bits": 4, "axis": "token", "group": "head"}
QOQ = {"key": [{"kind": "align"}, {"kind": "smooth"}], "value": [{"kind": "hadamard"}]}
PARTLY = {"key": [{"kind": "smooth"}, {"kind": "hadamard"}], "value": [{"kind": "hadamard"}]}
# Tensors that folding keys and values into changes.
FOLDED = ("q_proj", "k_proj", "v_proj", "o_proj")


def recipe(transforms=QOQ, **settings):
    data = {"name": "mine", "key": CODEC, "value": CODEC, "transforms": transforms}
    return parse_recipe(data | settings, source="mine")


@pytest.fixture
def base(tiny_model, tiny_checkpoint):
    """Factory ``base(recipe, model=None, **settings) -> (folder, model, statistics)``."""

    def make(mine, model=None, name="tiny", **settings):
        model = model or tiny_model(**({"head_dim": 32, "heads": 4, "kv_heads": 2} | settings))
        windows = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(0))
        stats = collect(model, windows, needs=needs_of(mine, describe(model.config)))
        return tiny_checkpoint(model, name=name), model, stats

    return make


def ids():
    return torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(ids(), use_cache=False).logits.float()


def error(found, exact):
    return float(((found - exact).abs().max() / exact.abs().max()).detach())


def test_an_export_folds_what_folds_and_its_model_is_the_original(base, tmp_path):
    mine = recipe()
    folder, model, stats = base(mine)
    result = export(folder, mine, tmp_path / "out", stats=stats)
    assert (result.folded, result.linked, result.copied) == (1, 0, 0)
    assert result.folds == (
        "keys of layers 0 to 1: align, smooth in the weights",
        "values of layers 0 to 1: hadamard in the weights",
    )
    assert result.check["error"] < 1e-5
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert list(before) == list(after)
    for name in before:
        assert torch.equal(before[name], after[name]) == (not any(part in name for part in FOLDED)), name
    loaded = kvq.load(tmp_path / "out", dtype=torch.float32)
    assert loaded.kvq.plan.folded == {0: {"key": 2, "value": 1}, 1: {"key": 2, "value": 1}}
    assert not any(chain for sides in loaded.kvq.plan.chains.values() for chain in sides.values())
    assert error(logits(loaded), logits(model)) < 1e-4
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["weights_fingerprint"] == weights_fingerprint(tmp_path / "out") == result.weights_fingerprint
    provenance = json.loads((tmp_path / "out/kvq/provenance.json").read_text())
    assert provenance["weights_fingerprint"] == weights_fingerprint(folder)
    assert "exact transforms folded in" in (tmp_path / "out/README.md").read_text()


def test_folding_equals_applying_the_transforms_while_the_model_runs(base, tmp_path):
    mine = recipe(PARTLY)
    folder, model, stats = base(mine)
    for name, fold in (("folded", True), ("online", False)):
        export(folder, mine, tmp_path / name, stats=stats, fold=fold)
    found = {}
    for name in ("folded", "online"):
        loaded = kvq.load(tmp_path / name, dtype=torch.float32)
        with two_view(loaded, loaded.kvq.plan):
            found[name] = logits(loaded)
    assert json.loads((tmp_path / "folded/config.json").read_text())["quantization_config"]["folded"] == {
        "0": {"key": 1, "value": 1},
        "1": {"key": 1, "value": 1},
    }
    assert "folded" not in json.loads((tmp_path / "online/config.json").read_text())["quantization_config"]
    # Rounding of 1e-7 turns a code over now and then.
    quantization = (found["online"] - logits(model)).square().mean()
    assert (found["folded"] - found["online"]).square().mean() < 0.01 * quantization


def test_a_folded_export_survives_being_saved_again(base, tmp_path):
    mine = recipe()
    folder, _, stats = base(mine)
    export(folder, mine, tmp_path / "out", stats=stats)
    loaded = kvq.load(tmp_path / "out", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    again = kvq.load(tmp_path / "again", dtype=torch.float32)
    assert again.kvq.plan.folded == loaded.kvq.plan.folded
    assert torch.equal(logits(again), logits(loaded))
    prompt = ids()[:, :20]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(again.generate(prompt, **settings), loaded.generate(prompt, **settings))


def test_files_without_a_changed_tensor_are_linked(base, tmp_path, tiny_checkpoint):
    mine = recipe()
    folder, model, stats = base(mine)
    single = folder / "model.safetensors"
    model.save_pretrained(folder, max_shard_size="60KB")
    single.unlink(missing_ok=True)
    stats = dataclasses.replace(stats, weights_fingerprint="")
    result = export(folder, mine, tmp_path / "out", stats=stats)
    assert result.folded >= 2
    assert result.linked >= 1
    for file in folder.glob("model-*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "out" / file.name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            changed = any(part in name for name in old.keys() for part in FOLDED)  # noqa: SIM118
        assert os.path.samefile(file, tmp_path / "out" / file.name) == (not changed)
    assert error(logits(kvq.load(tmp_path / "out", dtype=torch.float32)), logits(model)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_are_rounded_once(dtype, base, tmp_path, tiny_model):
    mine = recipe()
    model = tiny_model(head_dim=32, heads=4, kv_heads=2, dtype=dtype)
    folder, model, stats = base(mine, model)
    result = export(folder, mine, tmp_path / "out", stats=stats)
    after = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    head = weight[32:64].double()
    from kvq.transforms.hadamard_matrix import hadamard_matrix

    assert torch.equal(after["model.layers.0.self_attn.v_proj.weight"][32:64], (hadamard_matrix(32).T @ head).to(dtype))
    assert result.check["error"] < 1e-5
    assert (result.check["kl"] < 1e-9) == (dtype.itemsize >= 4)


def test_a_fold_that_changes_the_logits_is_refused_and_leaves_nothing(base, tmp_path, monkeypatch):
    mine = recipe()
    folder, _, stats = base(mine, attention_bias=True)
    plan = exporter.plan_of_folds

    def without_biases(*args):
        folds = plan(*args)
        kept = {name: own for name, own in folds.operations.items() if not name.endswith(".bias")}
        return dataclasses.replace(folds, operations=kept)

    # Biases of tiny models are zero at first.
    assert export(folder, mine, tmp_path / "zero", stats=stats).check
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    other, _, stats = base(mine, model.eval(), name="biased")
    assert export(other, mine, tmp_path / "right", stats=stats).check["error"] < 1e-5
    monkeypatch.setattr(exporter, "plan_of_folds", without_biases)
    with pytest.raises(CheckpointError, match=r"gives other logits than the original .* --no-fold"):
        export(other, mine, tmp_path / "out", stats=stats)
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_plain_export_is_an_ordinary_checkpoint(base, tmp_path):
    mine = recipe()
    folder, model, stats = base(mine)
    result = export(folder, mine, tmp_path / "out", stats=stats, target="plain")
    assert result.target == "plain"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["kvq_folded"]["recipe"] == "mine"
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert 'kvq' not in sys.modules and not any(info.values()), info\n"
        "torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])"
    )
    torch.save(ids(), tmp_path / "ids.pt")
    arguments = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=120)
    assert error(torch.load(tmp_path / "logits.pt"), logits(model)) < 1e-4
    export(folder, mine, tmp_path / "out", stats=stats, target="plain", force=True)


def test_a_second_fold_is_refused_also_after_transformers_saved_the_model(base, tmp_path):
    mine = recipe()
    folder, _, stats = base(mine)
    export(folder, mine, tmp_path / "once", stats=stats, target="plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "saved")
    stats = dataclasses.replace(stats, weights_fingerprint="")
    for source in ("once", "saved"):
        with pytest.raises(CheckpointError, match="have taken over the transforms of recipe 'mine' already"):
            export(tmp_path / source, mine, tmp_path / "twice", stats=stats)
    # What folds nothing may go on.
    export(tmp_path / "once", "int4", tmp_path / "int4")
    export(tmp_path / "once", mine, tmp_path / "online", stats=stats, fold=False)
    with pytest.raises(CheckpointError, match="is a kvq export already"):
        export(tmp_path / "int4", mine, tmp_path / "out", stats=stats)


def test_what_does_not_fold_whole_is_no_plain_export(base, tmp_path):
    mine = recipe(PARTLY)
    folder, _, stats = base(mine)
    with pytest.raises(RecipeError, match="key transform 'hadamard' of layer 0 stays, because it mixes rotary pairs"):
        export(folder, mine, tmp_path / "out", stats=stats, target="plain")
    with pytest.raises(RecipeError, match="'int4' has no transforms"):
        export(folder, "int4", tmp_path / "out", target="plain")
    with pytest.raises(RecipeError, match="because --no-fold forbids it"):
        export(folder, recipe({"value": [{"kind": "hadamard"}]}), tmp_path / "out", target="plain", fold=False)
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_stay_tied_and_untouched(base, tmp_path, tiny_model):
    mine = recipe()
    folder, model, stats = base(mine, tie_word_embeddings=True)
    export(folder, mine, tmp_path / "out", stats=stats, target="plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert error(logits(loaded), logits(model)) < 1e-4


def test_quantized_weights_do_not_fold(base, tmp_path):
    mine = recipe()
    folder, _, stats = base(mine)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transforms fold into unquantized weights only"):
        export(folder, mine, tmp_path / "out", stats=stats, target="plain")


def test_integer_tensors_are_not_folded(base, tmp_path):
    mine = recipe()
    folder, _, stats = base(mine)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stats = dataclasses.replace(stats, weights_fingerprint="")
    with pytest.raises(CheckpointError, match=r"dtype F8_E4M3, and transforms fold into floating-point weights only"):
        export(folder, mine, tmp_path / "out", stats=stats)
    assert not (tmp_path / "out").exists()


def test_an_export_says_what_it_has_folded_only_as_far_as_its_recipe_goes(base, tmp_path):
    mine = recipe()
    folder, _, stats = base(mine)
    export(folder, mine, tmp_path / "out", stats=stats)
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    for wrong in ({"0": {"key": 3}}, {"0": {"other": 1}}, {"9": {"key": 1}}, {"x": {"key": 1}}, {"0": {"key": True}}):
        config["quantization_config"]["folded"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="has folded"):
            kvq.load(tmp_path / "out")


def test_scales_of_an_engine_target_are_those_of_the_folded_model(base, tmp_path):
    """FP8 for a serving engine, over transforms that the weights have taken over."""
    eight = {"codec": "float8", "scale": "calibrated"}
    mine = recipe(QOQ, key=eight, value=eight)
    folder, _, stats = base(mine)
    export(folder, mine, tmp_path / "out", stats=stats, target="vllm")
    scales = load_file(tmp_path / "out/kv_scales.safetensors")
    plain = {
        k: v for k, v in json.loads((tmp_path / "out/config.json").read_text()).items() if k != "quantization_config"
    }
    assert plain["kvq_folded"]["recipe"] == "mine"
    folded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights = {k: v for f in (tmp_path / "out").glob("model-*.safetensors") for k, v in load_file(f).items()}
    folded.load_state_dict(weights, strict=False)
    windows = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(0))
    measured = collect(folded.eval(), windows, needs=frozenset({"key.range", "value.range"}))
    for layer in (0, 1):
        for side, letter in (("key", "k"), ("value", "v")):
            (scale,) = (t for n, t in scales.items() if f"layers.{layer}." in n and f"{letter}_scale" in n)
            top = float(measured.layers[layer][f"{side}.range"].absmax.max()) / 448
            assert top <= float(scale) * 1.0001
            assert float(scale) < top * 1.01


def test_a_model_with_unknown_parts_is_served_by_applying_transforms_online(base, tmp_path, tiny_model):
    config = AutoConfig.for_model(
        "bitnet", vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    mine = recipe()
    folder, model, stats = base(mine, tiny_model(config))
    result = export(folder, mine, tmp_path / "out", stats=stats)
    assert (result.folded, result.check) == (0, None)
    assert "while the model runs (kvq does not know what 'attn_sub_norm'" in result.folds[0]
    assert error(logits(kvq.load(tmp_path / "out", dtype=torch.float32)), logits(model)) < 1e-5
