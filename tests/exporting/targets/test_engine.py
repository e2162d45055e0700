"""Engine targets: what is written for each, from which source, and what is refused with the reason."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3NextConfig,
)

from kvq.errors import CheckpointError, RecipeError, UnsupportedModelError
from kvq.exporting.exporter import export
from kvq.exporting.targets import TARGETS
from kvq.exporting.targets.engine import merged_config
from kvq.exporting.targets.scheme import refusal, round_up
from kvq.models.describe import describe
from kvq.models.resolve import load_config
from kvq.recipe import load_recipe
from kvq.transforms.fold_plan import FoldPlan

ENGINE_TARGETS = [name for name in TARGETS if name not in ("kvq", "plain")]
CT_WEIGHTS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    "ignore": ["lm_head"],
}
FP8_WEIGHTS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT_WEIGHTS = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}


@pytest.fixture
def source(tiny_checkpoint):
    return tiny_checkpoint(layers=2, head_dim=32, heads=4, kv_heads=2)


@pytest.fixture
def written(tmp_path, source, made_stats):
    """Factory ``written(target, folder=source, **settings) -> Path``."""

    def write(target, folder=source, name=None, stats=None, recipe="fp8", **settings):
        out = tmp_path / (name or f"out-{target}")
        export(folder, recipe, out, target=target, stats=stats or made_stats(folder), **settings)
        return out

    return write


def quantized(folder, fields):
    """Declare the weights of a folder as quantized, without touching them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def scales_of(folder):
    return load_file(folder / "kv_scales.safetensors")


def expected_scale(value):
    """absmax / 448, and the next number of eight significant bits (bfloat16) that is not below it."""
    exact = value / 448
    step = 2.0 ** (math.floor(math.log2(exact)) - 7)
    return math.ceil(exact / step) * step


@pytest.mark.parametrize("target", ENGINE_TARGETS)
def test_scales_are_absmax_over_448_in_float32(written, absmax, target):
    spelled = "{m}.{s}_proj.{s}_scale" if target == "modelopt" else "{m}.{s}_scale"
    scales = scales_of(written(target))
    expected = {
        spelled.format(m=f"model.layers.{i}.self_attn", s=side[0]): expected_scale(absmax(i, side))
        for i in (0, 1)
        for side in ("key", "value")
    }
    assert {name: tensor.tolist() for name, tensor in scales.items()} == {n: [v] for n, v in expected.items()}
    assert {tensor.dtype for tensor in scales.values()} == {torch.float32}


@pytest.mark.parametrize("value", [1e-30, 0.0067, 0.0078125, 1.0, 3.14159, 1e30])
def test_round_up_never_clips_the_largest_number(value):
    """round_up(x) is the smallest bfloat16 that is at least x."""
    rounded = round_up(torch.tensor(value, dtype=torch.float64))
    below = torch.nextafter(rounded.to(torch.bfloat16), torch.tensor(-1.0, dtype=torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert float(rounded) >= value > float(below)
    assert float(rounded.to(torch.bfloat16)) == float(rounded)


@pytest.mark.parametrize("target", ENGINE_TARGETS)
def test_weights_are_linked_and_the_index_names_every_tensor(written, source, target):
    out = written(target)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    sizes = [tensor.nbytes for file in out.glob("*.safetensors") for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    # transformers would read a file named model.safetensors alone, and never the index.
    assert not (out / "model.safetensors").exists()
    assert os.path.samefile(source / "model.safetensors", out / "model-00001-of-00001.safetensors")


def test_targets_share_one_copy_of_the_weights(written):
    files = [written(target) / "model-00001-of-00001.safetensors" for target in ENGINE_TARGETS]
    assert len({file.stat().st_ino for file in files}) == 1


def test_shards_keep_their_names(written, source):
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    (source / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = written("vllm")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: f for n, f in index.items() if f != "kv_scales.safetensors"} == weight_map


@pytest.mark.parametrize("target", ["vllm", "sglang", "compressed-tensors"])
def test_the_config_declares_static_fp8(written, source, target):
    config = config_of(written(target))
    fields = config.pop("quantization_config")
    assert config == config_of(source)
    assert fields["quant_method"] == "compressed-tensors"
    assert fields["config_groups"] == {}
    scheme = fields["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
    assert scheme["dynamic"] is False
    assert scheme["symmetric"] is True


def test_modelopt_says_it_in_both_files(written):
    """Engines refuse a ModelOpt config without a weight algorithm: FP8 is named, and every module excluded."""
    out = written("modelopt")
    fields = config_of(out)["quantization_config"]
    assert (fields["quant_algo"], fields["ignore"]) == ("FP8", ["*"])
    older = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (older["quant_algo"], older["exclude_modules"], older["kv_cache_quant_algo"]) == ("FP8", ["*"], "FP8")


@pytest.mark.parametrize("target", ENGINE_TARGETS)
def test_two_exports_are_equal(written, target):
    one, two = written(target, name="one/x"), written(target, name="two/x")
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_the_card_states_the_command(written):
    card = (written("vllm") / "README.md").read_text()
    assert "```bash\nvllm serve out-vllm\n```" in card
    assert "4 scales" in card
    assert "python -m sglang.launch_server --model-path out-sglang" in (written("sglang") / "README.md").read_text()


class TestQuantizedWeights:
    """Checkpoints whose weights are quantized keep that and gain scales, or are refused with the reason."""

    @pytest.mark.parametrize("target", ["vllm", "sglang", "compressed-tensors"])
    def test_compressed_tensors(self, written, source, target):
        fields = config_of(written(target, quantized(source, CT_WEIGHTS)))["quantization_config"]
        assert fields.pop("kv_cache_scheme")["strategy"] == "tensor"
        assert fields == CT_WEIGHTS

    @pytest.mark.parametrize("target", ["vllm", "sglang"])
    def test_fp8(self, written, source, target):
        out = written(target, quantized(source, FP8_WEIGHTS))
        assert config_of(out)["quantization_config"] == FP8_WEIGHTS | {"kv_cache_quant_algo": "FP8"}
        if target == "vllm":
            # vLLM loads these scales and does not switch its cache by itself.
            assert "vllm serve out-vllm --kv-cache-dtype fp8" in (out / "README.md").read_text()

    @pytest.mark.parametrize("target", ["vllm", "sglang", "modelopt"])
    def test_modelopt(self, written, source, target):
        older = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["x"]}}
        (source / "hf_quant_config.json").write_text(json.dumps(older))
        out = written(target, quantized(source, MODELOPT_WEIGHTS))
        fields = config_of(out)["quantization_config"]
        assert fields.pop("kv_cache_scheme")["num_bits"] == 8
        assert fields == MODELOPT_WEIGHTS
        older["quantization"]["kv_cache_quant_algo"] = "FP8"
        assert json.loads((out / "hf_quant_config.json").read_text()) == older
        assert "model.layers.0.self_attn.k_proj.k_scale" in scales_of(out)

    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_modelopt_takes_no_gptq_or_awq(self, written, source, method):
        with pytest.raises(CheckpointError, match=f"quantized by '{method}'.*use --target vllm"):
            written("modelopt", quantized(source, {"quant_method": method, "bits": 4}))

    def test_the_way_out_is_named(self, written, source):
        with pytest.raises(CheckpointError, match="use --target vllm"):
            written("compressed-tensors", quantized(source, FP8_WEIGHTS))
        with pytest.raises(CheckpointError, match="use --target vllm"):
            export(source, "kivi2", source.parent / "out")

    def test_a_cache_that_is_quantized_already(self, written, source):
        scheme = {"num_bits": 8, "type": "float"}
        with pytest.raises(CheckpointError, match="KV cache of its own"):
            written("vllm", quantized(source, CT_WEIGHTS | {"kv_cache_scheme": scheme}))

    def test_scales_that_are_there_already(self, written, source):
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="hold KV scales already"):
            written("vllm")

    def test_statistics_of_the_unquantized_base(self, written, source, tiny_checkpoint, tiny_model, made_stats):
        base = tiny_checkpoint(tiny_model(seed=1, layers=2, head_dim=32, heads=4, kv_heads=2), name="base")
        with pytest.raises(CheckpointError, match="other weights"):
            written("vllm", quantized(source, CT_WEIGHTS), stats=made_stats(base))
        out = written("vllm", source, stats=made_stats(base), other_weights=True)
        assert len(scales_of(out)) == 4


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ("kivi2", "codec 'affine' with 2 bits"),
        ("int8", "needs no export for vLLM"),
        ("fp16", "nothing is quantized"),
        ({"value.scale": "unit"}, "value.scale is 'unit'"),
        ({"tokens.window": 128}, "last 128 tokens stay exact"),
        ({"tokens.sinks": 4}, "first 4 and"),
        ({"layers.1/0.key.scale": "unit"}, "layer 1"),
    ],
)
def test_what_a_checkpoint_cannot_express_is_refused(written, tmp_path, recipe, match):
    chosen = load_recipe("fp8").override(recipe) if isinstance(recipe, dict) else recipe
    with pytest.raises(RecipeError, match=match):
        written("vllm", recipe=chosen)
    assert not (tmp_path / "out-vllm").exists()


class TestHeads:
    """One scale a head, where the engine reads it."""

    RECIPE = load_recipe("fp8").override({"key.granularity": "head", "value.granularity": "head"})

    @pytest.mark.parametrize("target", ["vllm", "compressed-tensors"])
    def test_scales_have_the_shape_that_readers_expect(self, written, absmax, target):
        out = written(target, recipe=self.RECIPE)
        scales = scales_of(out)
        assert {tuple(scale.shape) for scale in scales.values()} == {(2, 1, 1)}
        # The made-up statistics give head 1 half of what head 0 has.
        wanted = [expected_scale(absmax(1, "key") / n) for n in (1, 2)]
        assert scales["model.layers.1.self_attn.k_scale"].flatten().tolist() == wanted
        assert config_of(out)["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"
        assert "FlashAttention 3" in (out / "README.md").read_text()

    @pytest.mark.parametrize("target", ["sglang", "modelopt"])
    def test_other_readers_refuse_it(self, written, target):
        with pytest.raises(RecipeError, match="granularity=tensor"):
            written(target, recipe=self.RECIPE)

    def test_one_granularity_for_all(self, written):
        with pytest.raises(RecipeError, match="keys and values differ in granularity"):
            written("vllm", recipe=load_recipe("fp8").override({"key.granularity": "head"}))
        mixed = {"layers.0.key.granularity": "head", "layers.0.value.granularity": "head"}
        with pytest.raises(RecipeError, match="same granularity everywhere"):
            written("vllm", recipe=load_recipe("fp8").override(mixed))


def test_exact_layers_become_a_flag_or_a_refusal(written):
    recipe = load_recipe("fp8").override({"layers.1.key.codec": "exact", "layers.1.value.codec": "exact"})
    out = written("vllm", recipe=recipe)
    assert set(scales_of(out)) == {"model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"}
    assert "vllm serve out-vllm --kv-cache-dtype-skip-layers 1\n" in (out / "README.md").read_text()
    with pytest.raises(RecipeError, match="one cache dtype for all layers"):
        written("sglang", recipe=recipe)


class TestFamilies:
    """Sliding, hybrid and shared layers, and attention that an engine would not find."""

    @pytest.fixture
    def gemma(self, tiny_model, tiny_checkpoint):
        config = Gemma3TextConfig(
            num_hidden_layers=3, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=64, vocab_size=128, sliding_window=8, architectures=["Gemma3ForCausalLM"],
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )  # fmt: skip
        return tiny_checkpoint(tiny_model(config), name="gemma")

    @pytest.mark.parametrize("target", ["vllm", "sglang"])
    def test_measured_windows_get_scales(self, written, gemma, absmax, target):
        """Engines store sliding-window layers in FP8 like the others."""
        scales = scales_of(written(target, gemma))
        assert len(scales) == 6
        assert float(scales["model.layers.0.self_attn.k_scale"]) == expected_scale(absmax(0, "key"))

    def test_windows_that_were_not_measured(self, written, gemma, made_stats):
        out = written("vllm", gemma, stats=made_stats(gemma, sliding=False))
        assert set(scales_of(out)) == {"model.layers.2.self_attn.k_scale", "model.layers.2.self_attn.v_scale"}
        assert "--kv-cache-dtype-skip-layers sliding_window" in (out / "README.md").read_text()
        with pytest.raises(RecipeError, match="sliding-window layers too"):
            written("sglang", gemma, stats=made_stats(gemma, sliding=False))

    def test_linear_layers_get_nothing(self, written, tiny_model, tiny_checkpoint):
        config = Qwen3NextConfig(
            num_hidden_layers=4, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=64, vocab_size=128, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=16, linear_value_head_dim=16, architectures=["Qwen3NextForCausalLM"],
        )  # fmt: skip
        folder = tiny_checkpoint(tiny_model(config), name="hybrid")
        assert set(scales_of(written("vllm", folder))) == {
            "model.layers.3.self_attn.k_scale", "model.layers.3.self_attn.v_scale",
        }  # fmt: skip

    def test_readers_of_another_layer_get_its_scales(self, written, tiny_model, tiny_checkpoint):
        """A layer that shares a cache dequantizes with a scale that it holds itself."""
        config = Gemma3nTextConfig(
            num_hidden_layers=6, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=64, vocab_size=128, vocab_size_per_layer_input=128, hidden_size_per_layer_input=16,
            num_kv_shared_layers=2, laurel_rank=8, sliding_window=8, activation_sparsity_pattern=None,
            layer_types=["sliding_attention", "full_attention"] * 3, architectures=["Gemma3nForCausalLM"],
        )  # fmt: skip
        scales = scales_of(written("vllm", tiny_checkpoint(tiny_model(config), name="shared")))
        for reader, owner in ((4, 2), (5, 3)):
            for side in "kv":
                names = [f"model.layers.{i}.self_attn.{side}_scale" for i in (reader, owner)]
                assert torch.equal(*(scales[name] for name in names))
        assert len(scales) == 12

    def test_an_engine_that_reads_no_scales_of_an_architecture(self, written, tiny_model, tiny_checkpoint):
        config = Olmo2Config(
            num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=64, vocab_size=128,
            architectures=["Olmo2ForCausalLM"],
        )  # fmt: skip
        folder = tiny_checkpoint(tiny_model(config), name="olmo")
        with pytest.raises(UnsupportedModelError, match="no KV scales for Olmo2ForCausalLM"):
            written("sglang", folder)
        assert len(scales_of(written("vllm", folder))) == 2

    def test_scales_spelled_as_the_engines_parameter(self, written, tiny_model, tiny_checkpoint):
        """SGLang's loader of Qwen2 renames nothing: the scale must have its parameter's own name."""
        config = Qwen2Config(
            num_hidden_layers=1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
            vocab_size=128, architectures=["Qwen2ForCausalLM"],
        )  # fmt: skip
        folder = tiny_checkpoint(tiny_model(config), name="qwen")
        assert "model.layers.0.self_attn.attn.k_scale" in scales_of(written("sglang", folder))
        assert "model.layers.0.self_attn.k_scale" in scales_of(written("vllm", folder))

    def test_attention_where_engines_do_not_look(self, written, tiny_model, tiny_checkpoint):
        config = GPTNeoXConfig(
            num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=64, vocab_size=128,
            architectures=["GPTNeoXForCausalLM"],
        )  # fmt: skip
        with pytest.raises(UnsupportedModelError, match=r"attention is 'gpt_neox\.layers\.0\.attention'"):
            written("vllm", tiny_checkpoint(tiny_model(config), name="neox"))

    def test_latent_caches_are_refused(self, tmp_path, source):
        config = config_of(source) | {"model_type": "deepseek_v3", "kv_lora_rank": 16}
        (source / "config.json").write_text(json.dumps(config | {"architectures": ["DeepseekV3ForCausalLM"]}))
        with pytest.raises(UnsupportedModelError, match="MLA latents"):
            export(source, "fp8", tmp_path / "out", target="vllm")


def test_an_unknown_target_is_refused(source, tmp_path):
    with pytest.raises(RecipeError, match=r"'vlm' is not known\. Did you mean 'vllm'"):
        export(source, "fp8", tmp_path / "out", target="vlm")


def test_force_replaces_an_engine_export(written, source):
    out = written("vllm")
    with pytest.raises(CheckpointError, match="--force"):
        written("vllm")
    written("modelopt", name="out-vllm", force=True)
    assert config_of(out)["quantization_config"]["quant_method"] == "modelopt"


def test_a_nested_quantization_config_moves_to_the_top():
    """A vision-language config may keep it inside text_config, and not every engine looks there."""
    nested = {"model_type": "x", "text_config": {"hidden_size": 8, "quantization_config": CT_WEIGHTS}}
    merged = merged_config(nested, CT_WEIGHTS | {"kv_cache_scheme": {}})
    assert merged["text_config"] == {"hidden_size": 8}
    assert merged["quantization_config"] == CT_WEIGHTS | {"kv_cache_scheme": {}}
    assert "quantization_config" in nested["text_config"]


def test_transforms_are_expressed_once_the_weights_have_taken_them_over(source):
    recipe, spec = (
        load_recipe("fp8").override({"transforms.value": [{"kind": "hadamard"}]}),
        describe(load_config(source)),
    )
    assert refusal(recipe, spec) is None
    assert "values go through the transform 'hadamard'" in refusal(recipe, spec, FoldPlan())
    folded = {layer.index: {"value": 1} for layer in spec.full_layers}
    assert refusal(recipe, spec, FoldPlan(folded=folded)) is None
