"""A reader written from SGLang's documented rules takes the scales out of kvq's folders, and defaults out of others.

The rules (SGLang 0.5.23):

- weights are the tensors of all files that the index names;
- a checkpoint name becomes a parameter's name: ``X.self_attn.k_proj.k_scale`` and ``X.self_attn.k_scale`` both become
  ``X.self_attn.attn.k_scale`` for the architectures that map scales, and names stay as they are for the others; what is
  no parameter then is dropped with a warning;
- an attention layer has the parameters ``k_scale`` and ``v_scale`` if its quantization method gives it some: with
  compressed-tensors only for a static, symmetric, per-tensor 8-bit float ``kv_cache_scheme``, with ModelOpt only if a
  scheme is declared, with FP8 weights always. Each is a scalar that starts at -1;
- after loading, two positive scales are taken as they are; two that are not positive become 1.0; one alone is copied;
- the cache is FP8 if such a scheme (FP8 weights: ``kv_cache_quant_algo``) is declared, else it has the model's dtype.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from kvq.exporting.exporter import export

MAPS_SCALES = {"LlamaForCausalLM": True, "Qwen2ForCausalLM": False}
FP8 = {"num_bits": 8, "type": "float"}


def read_as_sglang(folder):
    """(cache dtype, {layer: (k_scale, v_scale)}) of a folder."""
    config = json.loads((folder / "config.json").read_text())
    fields = config["quantization_config"]
    maps = MAPS_SCALES[config["architectures"][0]]
    scheme = fields.get("kv_cache_scheme") or {}
    declared = {name: scheme.get(name) for name in FP8} == FP8
    if fields["quant_method"] == "compressed-tensors":
        declared &= scheme.get("strategy") == "tensor" and scheme.get("symmetric", True)
        declared &= not scheme.get("dynamic", False)
    if fields["quant_method"] == "fp8":
        declared = str(fields.get("kv_cache_quant_algo")).upper() == "FP8"
    if fields["quant_method"] == "modelopt":
        assert "quant_algo" in fields, "SGLang refuses a ModelOpt config without quant_algo"
    has_parameters = declared or fields["quant_method"] == "fp8"
    layers = range(config["num_hidden_layers"])
    values = {f"model.layers.{i}.self_attn.attn.{s}_scale": -1.0 for i in layers for s in "kv" if has_parameters}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        for name, tensor in load_file(folder / file).items():
            name = parameter_name(name) if maps else name
            if name in values:
                assert tensor.numel() == 1
                values[name] = tensor.item()
    scales = {}
    for i in layers if has_parameters else ():
        k, v = (values[f"model.layers.{i}.self_attn.attn.{s}_scale"] for s in "kv")
        if k <= 0 and v <= 0:
            k = v = 1.0
        elif k <= 0 or v <= 0:
            k = v = max(k, v)
        scales[i] = (k, v)
    return ("fp8_e4m3" if declared else "auto"), scales


def parameter_name(name):
    for s in "kv":
        if name.endswith(f".self_attn.{s}_proj.{s}_scale"):
            return name.replace(f"self_attn.{s}_proj.", "self_attn.attn.")
        if name.endswith(f".{s}_scale"):
            return name.replace(f".{s}_scale", f".attn.{s}_scale")
    return name


@pytest.fixture
def source(tiny_checkpoint):
    return tiny_checkpoint(layers=3, head_dim=32)


def near(layers, absmax):
    """What every layer should have: absmax / 448, up to the rounding to eight bits."""
    return {i: tuple(pytest.approx(absmax(i, s) / 448, rel=2**-7) for s in ("key", "value")) for i in layers}


@pytest.mark.parametrize("target", ["sglang", "compressed-tensors", "modelopt", "vllm"])
def test_every_scale_arrives(source, tmp_path, made_stats, absmax, target):
    export(source, "fp8", tmp_path / "out", target=target, stats=made_stats(source))
    assert read_as_sglang(tmp_path / "out") == ("fp8_e4m3", near(range(3), absmax))


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "modelopt"])
def test_every_scale_arrives_beside_quantized_weights(source, tmp_path, made_stats, absmax, method):
    config = json.loads((source / "config.json").read_text())
    weights = {"quant_method": method, "quant_algo": "FP8", "config_groups": {"group_0": {}}}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": weights}))
    export(source, "fp8", tmp_path / "out", target="sglang", stats=made_stats(source))
    assert read_as_sglang(tmp_path / "out") == ("fp8_e4m3", near(range(3), absmax))


def test_an_architecture_that_maps_no_scales(tmp_path, tiny_model, tiny_checkpoint, made_stats, absmax):
    """The target sglang spells them as parameters; what is written for vLLM would end at 1.0 in an FP8 cache."""
    config = Qwen2Config(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        vocab_size=128, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    source = tiny_checkpoint(tiny_model(config), name="qwen")
    for target in ("sglang", "vllm"):
        export(source, "fp8", tmp_path / target, target=target, stats=made_stats(source))
    assert read_as_sglang(tmp_path / "sglang") == ("fp8_e4m3", near(range(2), absmax))
    assert read_as_sglang(tmp_path / "vllm") == ("fp8_e4m3", {0: (1.0, 1.0), 1: (1.0, 1.0)})


def test_the_reader_sees_what_is_missing(source, tmp_path, made_stats):
    """A control: without scales this reader gives 1.0, and without a scheme no FP8 cache."""
    out = tmp_path / "out"
    export(source, "fp8", out, target="sglang", stats=made_stats(source))
    scales = load_file(out / "kv_scales.safetensors")
    kept = {name: tensor for name, tensor in scales.items() if ".0." not in name and name.endswith("k_scale")}
    save_file(kept | {"other": torch.ones(1)}, out / "kv_scales.safetensors", metadata={"format": "pt"})
    _, found = read_as_sglang(out)
    assert found[0] == (1.0, 1.0)
    assert found[1][0] == found[1][1] == float(scales["model.layers.1.self_attn.k_scale"])
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (out / "config.json").write_text(json.dumps(config))
    assert read_as_sglang(out) == ("auto", {})
