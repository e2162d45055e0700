"""GPTQ and AWQ checkpoints become compressed-tensors ones with KV scales, and not a weight changes.

The checkpoints are made here, from codes drawn at random, by the packing that each format documents; what their numbers
stand for is worked out in float64 beside it.
"""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvq.errors import CheckpointError
from kvq.exporting.check import check_folder
from kvq.exporting.engines import find_release
from kvq.exporting.exporter import export
from kvq.exporting.targets.repack import repack

pytest.importorskip("compressed_tensors")

GROUP, INDEX = 32, "model.safetensors.index.json"


def pack_rows(codes, bits):
    """int32 words along the first dimension, the first code in the lowest bits, one code after another."""
    per = 32 // bits
    words = torch.zeros(codes.shape[0] // per, codes.shape[1], dtype=torch.int64)
    for row in range(codes.shape[0]):
        words[row // per] |= codes[row].long() << (bits * (row % per))
    return (words - ((words >> 31) << 32)).to(torch.int32)


def pack_awq(codes):
    """int32 words along the last dimension; place i of a word holds column 0, 2, 4, 6, 1, 3, 5, 7 of its eight."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for word in range(words.shape[1]):
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, word] |= codes[:, 8 * word + column].long() << (4 * place)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def quantized_module(method, inputs, outputs, generator, *, bits=4, symmetric=False, older=True):
    """Tensors of one linear layer, and the weight [out, in] in float64 that they stand for."""
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 1 << bits, (inputs // GROUP, outputs), generator=generator)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    scales = (torch.rand(inputs // GROUP, outputs, generator=generator) * 0.02 + 0.001).half()
    group = torch.arange(inputs) // GROUP
    weight = ((codes - zeros[group]).double() * scales[group].double()).T
    if method == "awq":
        return {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros), "scales": scales}, weight
    return {
        "qweight": pack_rows(codes, bits),
        "qzeros": pack_rows((zeros - int(older)).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": group.to(torch.int32),
    }, weight


@pytest.fixture
def source(tiny_checkpoint):
    """Factory ``source(method, shards=1, **settings) -> (folder, weights by module)``."""

    def make(method, shards=1, fields=None, **settings):
        folder = tiny_checkpoint(layers=2, head_dim=32, heads=4, kv_heads=2, dtype=torch.float16)
        tensors, weights, generator = {}, {}, torch.Generator().manual_seed(0)
        for name, tensor in load_file(folder / "model.safetensors").items():
            module = name.removesuffix(".weight")
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            own, weights[module] = quantized_module(method, *tensor.shape[::-1], generator, **settings)
            tensors |= {f"{module}.{part}": value for part, value in own.items()}
        (folder / "model.safetensors").unlink()
        # Parts of a module may lie in different shards.
        names = sorted(tensors)
        weight_map = {name: f"model-0000{i % shards + 1}-of-0000{shards}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            part = {name: tensors[name].contiguous() for name in names if weight_map[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        bits = settings.get("bits", 4)
        declared = {
            "gptq": {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False},
            "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        }[method]
        if not settings.get("older", True):
            declared["checkpoint_format"] = "gptq_v2"
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = declared | (fields or {})
        (folder / "config.json").write_text(json.dumps(config))
        return folder, weights

    return make


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decompressed(tensors, module, fields):
    """What the compressed-tensors package makes of a module."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**fields["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    own = {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}
    own["weight_scale"] = own["weight_scale"].double()
    return PackedQuantizationCompressor.decompress(own, scheme)["weight"]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {}),
        ("gptq", {"symmetric": True}),
        ("gptq", {"older": False}),
        ("gptq", {"bits": 8}),
        ("gptq", {"shards": 3}),
        ("awq", {}),
        ("awq", {"shards": 2}),
    ],
)
def test_every_weight_is_the_number_that_it_was(source, tmp_path, made_stats, method, settings):
    folder, weights = source(method, **settings)
    out = tmp_path / "out"
    result = export(folder, "fp8", out, target="vllm", stats=made_stats(folder))
    assert (result.linked, result.copied) == (0, settings.get("shards", 1))
    assert not list(tmp_path.glob(".*"))
    fields = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (fields["quant_method"], fields["format"]) == ("compressed-tensors", "pack-quantized")
    assert fields["config_groups"]["group_0"]["weights"]["symmetric"] is settings.get("symmetric", False)
    assert fields["kv_cache_scheme"]["num_bits"] == 8
    assert fields["ignore"] == ["lm_head"]
    tensors = tensors_of(out)
    assert not [name for name in tensors if name.endswith(("qweight", "qzeros", "g_idx", ".scales"))]
    for module, weight in weights.items():
        assert torch.equal(decompressed(tensors, module, fields), weight), module
    assert len([name for name in tensors if name.endswith(("k_scale", "v_scale"))]) == 4
    for report in check_folder(out, [find_release("vllm"), find_release("sglang")]):
        assert report.errors == ()
        assert report.cache_dtype.startswith("fp8")
    assert f"in the layout of compressed-tensors instead of '{method}'" in (out / "README.md").read_text()


def test_transformers_loads_it_with_every_key_in_place(source, tmp_path, made_stats):
    folder, weights = source("gptq", symmetric=True)
    out = tmp_path / "out"
    export(folder, "fp8", out, target="compressed-tensors", stats=made_stats(folder))
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    with torch.no_grad():
        # Weights are unpacked in the first forward of the whole model.
        model(torch.arange(3, 9).unsqueeze(0))
        x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(1))
        expected = x.double() @ weights["model.layers.0.self_attn.q_proj"].T
        found = model.model.layers[0].self_attn.q_proj(x).double()
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_zero_points_that_transformers_drops(source, tmp_path, made_stats, method):
    """Known of transformers with compressed-tensors 0.20, whoever wrote the checkpoint; the check says so as well."""
    folder, _ = source(method)
    with pytest.raises(CheckpointError, match=r"zero points, which transformers does not load.*--target vllm"):
        export(folder, "fp8", tmp_path / "ct", target="compressed-tensors", stats=made_stats(folder))
    assert not (tmp_path / "ct").exists()
    export(folder, "fp8", tmp_path / "out", target="vllm", stats=made_stats(folder))
    (report,) = check_folder(tmp_path / "out", [find_release("transformers")])
    assert any("zero points" in finding.text for finding in report.errors)
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert all("weight_zero_point" in str(key) for key in info["mismatched_keys"])
    # Older releases load the folder without a word about them.
    if Version(transformers.__version__) >= Version("5.23"):
        assert len(info["mismatched_keys"]) == 14


@pytest.mark.parametrize(
    ("method", "fields", "match"),
    [
        ("gptq", {"bits": 3}, "3 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
    ],
)
def test_layouts_that_cannot_be_said_otherwise(source, tmp_path, made_stats, method, fields, match):
    folder, _ = source(method, fields=fields)
    with pytest.raises(CheckpointError, match=match):
        export(folder, "fp8", tmp_path / "out", target="vllm", stats=made_stats(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_an_order_of_columns_is_refused(source, tmp_path, made_stats):
    folder, _ = source("gptq")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"desc_act.*k_proj"):
        export(folder, "fp8", tmp_path / "out", target="vllm", stats=made_stats(folder))


def test_a_missing_part_is_named(source, tmp_path):
    folder, _ = source("awq")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.scales"]
    (folder / INDEX).write_text(json.dumps(index))
    (tmp_path / "work").mkdir()
    with pytest.raises(CheckpointError, match=r"up_proj\.scales"):
        repack(folder, tmp_path / "work", json.loads((folder / "config.json").read_text()))
