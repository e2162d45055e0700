"""``check_folder``: every fault is an error, for every engine that it would hurt, and a whole folder passes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvq.errors import CheckpointError
from kvq.exporting.check import check_folder
from kvq.exporting.engines import engines, find_release
from kvq.exporting.exporter import export
from kvq.exporting.targets import TARGETS

INDEX = "model.safetensors.index.json"
SCALES = "kv_scales.safetensors"
ENGINE_TARGETS = [name for name in TARGETS if name not in ("kvq", "plain")]


@pytest.fixture
def source(tiny_checkpoint):
    return tiny_checkpoint(layers=2, head_dim=32, heads=4, kv_heads=2)


@pytest.fixture
def folder(source, tmp_path, made_stats):
    """An export for vLLM."""
    export(source, "fp8", tmp_path / "out", target="vllm", stats=made_stats(source))
    return tmp_path / "out"


@pytest.fixture
def strangers(folder, tmp_path):
    """Factory ``strangers(change) -> Path``: the same checkpoint as if another tool had written it, scales changed.

    change   called with the scales by name; may change them in place.
    """

    def make(change=lambda scales: None) -> Path:
        copy = tmp_path / "stranger"
        shutil.copytree(folder, copy)
        shutil.rmtree(copy / "kvq")
        scales = load_file(copy / SCALES)
        before = set(scales)
        change(scales)
        save_file(scales, copy / SCALES, metadata={"format": "pt"})
        index = json.loads((copy / INDEX).read_text())
        weight_map = {n: f for n, f in index["weight_map"].items() if n not in before} | dict.fromkeys(scales, SCALES)
        (copy / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        return copy

    return make


def reports(folder, *names):
    return check_folder(folder, [find_release(name) for name in names or engines()])


def errors(folder, *names):
    return [finding.text for report in reports(folder, *names) for finding in report.errors]


def every_engine_says(folder, text):
    """Each engine's report has an error with this text."""
    found = reports(folder)
    return len(found) == len(engines()) and all(any(text in f.text for f in report.errors) for report in found)


def config_edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("target", ENGINE_TARGETS)
def test_a_whole_export_passes_where_it_should(source, tmp_path, made_stats, target):
    export(source, "fp8", tmp_path / "out", target=target, stats=made_stats(source))
    for report in reports(tmp_path / "out", *TARGETS[target].engines):
        assert report.errors == ()
        assert report.written_by == target
        assert report.cache_dtype.startswith("fp8")
        assert str(tmp_path / "out") in report.serve
        assert (report.scales.expected, report.scales.found, report.scales.granularity) == (4, 4, "tensor")


def test_a_quick_check_reads_no_large_file(folder, monkeypatch):
    monkeypatch.setattr("kvq.exporting.manifest.QUICK_BYTES", 1000)
    path = folder / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    whole, quick = (check_folder(folder, [find_release("vllm")], quick=quick)[0] for quick in (False, True))
    assert [finding.about for finding in whole.errors] == [path.name]
    assert quick.errors == ()


def test_weights_that_nobody_listed(folder):
    """A stray safetensors file in the root is read as weights by engines that find no index."""
    save_file({"x": torch.ones(1)}, folder / "stray.safetensors")
    assert any("does not belong" in text for text in errors(folder, "vllm"))


class TestScales:
    """Faults of the scales themselves, in a folder that nothing else vouches for."""

    def test_a_strangers_folder_passes(self, strangers):
        found = reports(strangers())
        assert [report.errors for report in found] == [(), (), ()]
        assert {finding.level for report in found for finding in report.findings} == {"note"}

    @pytest.mark.parametrize(
        ("number", "says"),
        [
            (float("nan"), "NaN or infinity"),
            (float("inf"), "NaN or infinity"),
            (0.0, "not positive"),
            (-0.01, "not positive"),
            (1.0, "exactly 1.0"),
            (1e6, "beyond what 16 bits need"),
        ],
    )
    def test_numbers_that_cannot_be_scales(self, strangers, number, says):
        def change(scales):
            scales["model.layers.1.self_attn.v_scale"].fill_(number)

        folder = strangers(change)
        assert every_engine_says(folder, says)
        assert every_engine_says(folder, "layer 1 value")

    def test_shapes_and_dtypes(self, strangers, tmp_path):
        def three(scales):
            scales["model.layers.0.self_attn.k_scale"] = torch.full((3,), 0.1)

        def whole_numbers(scales):
            scales["model.layers.0.self_attn.k_scale"] = torch.ones(1, dtype=torch.int32)

        assert any("neither 1 nor 2 numbers" in text for text in errors(strangers(three)))
        shutil.rmtree(tmp_path / "stranger")
        assert any("no floating-point numbers" in text for text in errors(strangers(whole_numbers)))

    def test_one_side_missing(self, strangers):
        folder = strangers(lambda scales: scales.pop("model.layers.1.self_attn.k_scale"))
        (vllm,) = reports(folder, "vllm")
        assert [f.text for f in vllm.errors] == ["layer 1 has no key scale: vLLM would use 1.0, without a warning."]
        assert (vllm.scales.expected, vllm.scales.found) == (4, 3)

    def test_a_layer_missing(self, strangers):
        def change(scales):
            for side in "kv":
                scales.pop(f"model.layers.1.self_attn.{side}_scale")

        assert every_engine_says(strangers(change), "layers 1 have no scales")

    def test_all_missing(self, strangers):
        folder = strangers(lambda scales: scales.clear() or scales.update(x=torch.ones(1)))
        assert every_engine_says(folder, "layers 0, 1 have no scales")

    def test_names_that_an_engine_does_not_read(self, strangers):
        def change(scales):
            for name in list(scales):
                scales[name.replace("self_attn.", "self_attn.attn.")] = scales.pop(name)

        folder = strangers(change)
        assert errors(folder, "vllm") == []
        assert any("spelled as 'parameter' names" in text for text in errors(folder, "sglang"))
        assert any("spelled as 'parameter' names" in text for text in errors(folder, "transformers"))

    def test_names_that_nobody_knows(self, strangers):
        def change(scales):
            for name in list(scales):
                scales[name.replace("self_attn.", "somewhere.")] = scales.pop(name)

        (report,) = reports(strangers(change), "vllm")
        assert "layers 0, 1 have no scales" in report.errors[0].text
        assert any("look like KV scales" in f.text for f in report.findings if f.level == "warning")

    def test_one_scale_a_head_must_be_declared(self, strangers):
        def change(scales):
            for name in scales:
                scales[name] = torch.full((2, 1, 1), 0.1)

        folder = strangers(change)
        assert any("one a head, and kv_cache_scheme says one a tensor" in text for text in errors(folder, "vllm"))
        config_edit(folder, lambda c: c["quantization_config"]["kv_cache_scheme"].update(strategy="attn_head"))
        (report,) = reports(folder, "vllm")
        assert report.errors == ()
        assert any("FlashAttention 3" in finding.text for finding in report.findings)
        assert any("reads one a layer" in text for text in errors(folder, "sglang"))


class TestConfig:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"num_bits": 4}, "takes 8-bit float only"),
            ({"type": "int"}, "takes 8-bit float only"),
            ({"dynamic": True}, "dynamic"),
            ({"symmetric": False}, "asymmetric"),
            ({"strategy": "channel"}, "strategy 'channel'"),
        ],
    )
    def test_schemes_that_engines_refuse(self, strangers, change, says):
        folder = strangers()
        config_edit(folder, lambda config: config["quantization_config"]["kv_cache_scheme"].update(change))
        assert any(says in text for text in errors(folder, "vllm"))

    def test_a_release_with_a_fault(self, folder):
        """transformers 5.21 fails on a checkpoint that quantizes nothing but the cache; its neighbours do not."""
        found = check_folder(folder, [find_release("transformers", v) for v in ("5.20", "5.21", "5.22")])
        assert [len(report.errors) for report in found] == [0, 1, 0]
        assert "empty 'config_groups'" in found[1].errors[0].text

    def test_scales_without_a_scheme(self, strangers):
        folder = strangers()
        config_edit(folder, lambda config: config["quantization_config"].pop("kv_cache_scheme"))
        assert every_engine_says(folder, "says nothing of a quantized KV cache")
        config_edit(folder, lambda config: config.pop("quantization_config"))
        assert every_engine_says(folder, "says nothing of a quantized KV cache")

    def test_a_modelopt_config_without_an_algorithm(self, strangers):
        folder = strangers()
        fields = {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
        config_edit(folder, lambda config: config.update(quantization_config=fields))
        assert any("lacks 'quant_algo'" in text for text in errors(folder, "vllm"))
        assert any("unknown to it" in text for text in errors(folder, "transformers"))

    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_weights_that_leave_no_room_for_scales(self, strangers, method):
        folder = strangers()
        config_edit(folder, lambda config: config.update(quantization_config={"quant_method": method, "bits": 4}))
        assert any("loads no KV scales" in text or "no scales" in text for text in errors(folder, "vllm"))

    def test_fp8_weights_need_the_flag(self, strangers):
        folder = strangers()
        config_edit(folder, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
        (report,) = reports(folder, "vllm")
        assert report.errors == ()
        assert report.serve.endswith("--kv-cache-dtype fp8")
        assert any("kv_cache_quant_algo" in text for text in errors(folder, "sglang"))

    def test_an_architecture_whose_scales_are_not_read(self, strangers):
        folder = strangers()
        config_edit(folder, lambda config: config.update(architectures=["OlmoForCausalLM"]))
        assert any("no KV scales for OlmoForCausalLM" in text for text in errors(folder, "sglang"))
        assert errors(folder, "vllm") == []

    def test_a_single_file_hides_the_scales_from_transformers(self, strangers):
        folder = strangers()
        (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
        index = (folder / INDEX).read_text().replace("model-00001-of-00001", "model")
        (folder / INDEX).write_text(index)
        assert errors(folder, "vllm") == []
        assert any("hides the other files" in text for text in errors(folder, "transformers"))


class TestOtherFolders:
    def test_a_plain_model(self, source):
        for report in reports(source):
            assert report.errors == ()
            assert report.cache_dtype == "16 bits, as the model"

    def test_kvqs_own_format(self, source, tmp_path):
        """It loads in transformers, is refused by engines, and its own hashes are checked."""
        out = tmp_path / "out"
        export(source, "kivi2", out)
        found = {report.engine: report for report in reports(out)}
        assert found["transformers"].errors == ()
        assert found["transformers"].cache_dtype == "packed"
        assert "unknown to it" in found["vllm"].errors[0].text
        assert "unknown to it" in found["sglang"].errors[0].text

    def test_a_model_whose_cache_cannot_be_described(self, strangers):
        folder = strangers()
        config_edit(folder, lambda c: c.update(model_type="bert", architectures=["BertForMaskedLM"]))
        assert every_engine_says(folder, "'bert'")

    def test_no_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            reports(tmp_path / "none")

    def test_an_empty_folder(self, tmp_path):
        assert every_engine_says(tmp_path, "there is no safetensors file")


def test_recipes_that_an_engine_can_have(folder):
    recipes = {report.engine: report.recipes for report in reports(folder)}
    assert recipes["vllm"]["fp8"].startswith("how: --target vllm")
    assert recipes["vllm"]["int4"].startswith("no: keys are stored by the codec 'affine' with 4 bits")
    assert "int4_per_token_head" in recipes["vllm"]["int4"]
    assert "int4_per_token_head" not in recipes["sglang"]["int4"]
    assert recipes["sglang"]["kivi2"].startswith("no: ")
    assert set(recipes["transformers"].values()) == {"how: --target kvq, after 'import kvq'"}


def test_a_report_is_plain_data(folder):
    (report,) = reports(folder, "vllm")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["passes"] is True
    assert data["scales"]["found"] == 4
