"""What kvq relies on of the compressed-tensors package and of transformers' quantizer for it."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

pytest.importorskip("compressed_tensors", reason="the extra 'targets' is not installed")

from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy

# transformers 5.21 fails on a config without weight groups (kvq/exporting/engines/transformers.yaml).
FAULTY = pytest.mark.xfail(
    transformers.__version__.startswith("5.21."), reason="transformers 5.21 fails on a KV-only config", strict=True
)

SCHEME = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False, "group_size": None,
}  # fmt: skip
CONFIG = {
    "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen", "config_groups": {},
    "ignore": [], "kv_cache_scheme": SCHEME,
}  # fmt: skip


def test_a_scheme_for_the_kv_cache_alone_is_valid():
    found = QuantizationConfig.model_validate(CONFIG)
    assert found.kv_cache_scheme.strategy == QuantizationStrategy.TENSOR
    heads = CONFIG | {"kv_cache_scheme": SCHEME | {"strategy": "attn_head"}}
    assert QuantizationConfig.model_validate(heads).kv_cache_scheme.strategy == QuantizationStrategy.ATTN_HEAD


@FAULTY
@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("attn_head", (2, 1, 1))])
def test_scales_are_parameters_of_the_attention_module(tiny_checkpoint, tmp_path, strategy, shape):
    """Named k_scale and v_scale, of these shapes: what an export writes is loaded by name."""
    import json

    folder = tiny_checkpoint(kv_heads=2)
    config = json.loads((folder / "config.json").read_text())
    fields = CONFIG | {"kv_cache_scheme": SCHEME | {"strategy": strategy}}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    scales = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("_scale")}
    assert set(scales) == {f"model.layers.{i}.self_attn.{s}_scale" for i in (0, 1) for s in "kv"}
    assert set(scales.values()) == {shape}
    assert set(report["missing_keys"]) == set(scales)


def test_stored_numbers_are_value_over_scale_rounded_to_e4m3():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    x = torch.randn(2, 3, 5, 16)
    scale = torch.tensor([0.037])
    arguments = QuantizationArgs.model_validate(SCHEME)
    found = fake_quantize(x=x, scale=scale, zero_point=None, args=arguments)
    wanted = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_along_the_input_from_the_lowest_bits(bits):
    """What kvq packs GPTQ and AWQ codes with: code + 2^(bits - 1), one after another from the lowest bits of a word."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    middle, per = 1 << (bits - 1), 32 // bits
    codes = torch.randint(-middle, middle, (3, 2 * per), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_to_int32(codes, bits)
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (3, 2))
    for row in range(3):
        for column in range(2 * per):
            word = int(packed[row, column // per]) & 0xFFFFFFFF
            assert (word >> (bits * (column % per))) % (1 << bits) == int(codes[row, column]) + middle
    assert torch.equal(pack_to_int32(codes.T.contiguous(), bits, packed_dim=0), packed.T)
