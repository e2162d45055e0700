"""What kvq relies on of ``from_pretrained`` (``kvq/integrations/transformers.py``, ``kvq/models/resolve.py``)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

NAME = "kvq_contract"


@pytest.fixture
def quantizer():
    """A quantizer of our own, registered for the length of a test; it notes when its hooks run."""
    calls = []

    class Config(QuantizationConfigMixin):
        def __init__(self, **fields):
            self.__dict__.update(fields)

    class Quantizer(HfQuantizer):
        requires_calibration = True

        def __init__(self, quantization_config, **kwargs):
            super().__init__(quantization_config, **kwargs)

        def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
            calls.append(("before", next(model.parameters()).device.type, checkpoint_files))

        def _process_model_after_weight_loading(self, model, **kwargs):
            calls.append(("after", next(model.parameters()).device.type))
            return model

        def is_serializable(self, *args, **kwargs):
            return True

        @property
        def is_trainable(self):
            return True

    register_quantization_config(NAME)(Config)
    register_quantizer(NAME)(Quantizer)
    yield calls
    del AUTO_QUANTIZATION_CONFIG_MAPPING[NAME], AUTO_QUANTIZER_MAPPING[NAME]


def declare(folder, fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))


def test_a_registered_quantizer_is_found_and_its_hooks_run_in_order(tiny_checkpoint, quantizer):
    """Before the weights on the meta device, with the paths of the files; then on the loaded model."""
    folder = tiny_checkpoint()
    declare(folder, {"quant_method": NAME, "more": [1, 2]})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [call[0] for call in quantizer] == ["before", "after"]
    assert quantizer[0][1] == "meta"
    assert [str(path) for path in quantizer[0][2]] == [str(folder / "model.safetensors")]
    assert quantizer[1][1] == "cpu"
    assert model.hf_quantizer.quantization_config.to_dict() == {"quant_method": NAME, "more": [1, 2]}
    assert model.config.name_or_path == str(folder)


def test_the_config_is_saved_again(tiny_checkpoint, quantizer, tmp_path):
    folder = tiny_checkpoint()
    declare(folder, {"quant_method": NAME, "more": [1, 2]})
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again/config.json").read_text())
    assert saved["quantization_config"]["more"] == [1, 2]


def test_an_unknown_method_is_a_warning_and_nothing_else(tiny_checkpoint):
    """Why cards warn first: without kvq an export loads as if it were not quantized."""
    folder = tiny_checkpoint()
    declare(folder, {"quant_method": "nobody_knows"})
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), torch.nn.Module)


def test_the_loading_report_names_missing_and_unexpected_keys(tiny_checkpoint):
    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors | {"stray": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.norm.weight"}
    assert set(report["unexpected_keys"]) == {"stray"}


def test_a_file_named_model_safetensors_is_taken_before_the_index(tiny_checkpoint):
    """Why engine exports rename a single file: else the index, and the scales that it names, would not be read."""
    folder = tiny_checkpoint()
    save_file({"stray": torch.ones(1)}, folder / "more.safetensors", metadata={"format": "pt"})
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"stray": "more.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]


def test_a_config_without_quantization_config_can_be_given(tiny_checkpoint):
    folder = tiny_checkpoint()
    declare(folder, {"quant_method": "compressed-tensors", "config_groups": {}})
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert getattr(model, "hf_quantizer", None) is None


def test_tables_of_model_classes():
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM"
    assert "bert" in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def test_the_text_part_of_a_config(tiny_config):
    config = tiny_config()
    assert config.get_text_config(decoder=True) is config
