"""Layer by layer, with the weights on the disk, gives the statistics of the whole model to the bit and stays small."""

import pytest
import torch
from transformers import AutoConfig

from kvq.calib.collect import collect
from kvq.calib.loading import Options, by_layer, offload_map
from kvq.calib.needs import ALL_NEEDS
from kvq.errors import UnsupportedModelError
from kvq.models.resolve import load_config, load_model

FAMILIES = (
    "llama", "gemma2", "gemma3_text", "cohere2", "smollm3", "phi3", "glm4", "gpt_oss", "mixtral", "qwen3_moe",
    "qwen3_next", "olmo2", "llama4_text", "gpt_neox", "gpt2", "gptj", "bloom", "falcon", "gemma3n_text",
)  # fmt: skip
TOKENS = torch.randint(4, 100, (5, 17), generator=torch.Generator().manual_seed(0))
VALID = torch.ones(5, 17, dtype=torch.bool)
VALID[1, :5] = VALID[4, 9:] = False


@pytest.fixture
def both(tmp_path):
    """``both(model) -> (the whole model, the model with its layers on the disk)``, loaded from many shards."""

    def load(model, dtype=torch.float32):
        folder = tmp_path / "model"
        model.save_pretrained(folder, max_shard_size="60KB")
        spread = offload_map(load_config(folder), "cpu")
        off = load_model(folder, dtype=dtype, device_map=spread, offload_folder=tmp_path / "weights")
        return load_model(folder, dtype=dtype), off

    return load


def measured(model, valid=VALID):
    return collect(model, TOKENS, valid=valid, needs=ALL_NEEDS, batch_size=2)


def assert_same_bits(one, two):
    assert one.to_parts()[1] == two.to_parts()[1]
    ours, theirs = one.to_parts()[0], two.to_parts()[0]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_bits_of_the_whole_model(tiny_model, family, both, name):
    whole, off = both(tiny_model(family(name)))
    assert_same_bits(measured(off), measured(whole))
    # And after one run, what is in memory is what was there before it.
    held = {name for name, weight in off.named_parameters() if not weight.is_meta}
    assert not {name for name in held if ".layers." in name or ".h." in name}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_too(tiny_model, both, dtype):
    whole, off = both(tiny_model(dtype=dtype), dtype)
    assert_same_bits(measured(off), measured(whole))


def test_one_layers_weights_are_held_at_a_time(tiny_model, both, monkeypatch):
    model = tiny_model(layers=3)
    _, off = both(model)
    held, linear = [], torch.nn.functional.linear

    def counted(*arguments):
        held.append(sum(p.numel() for p in off.model.layers.parameters() if not p.is_meta))
        return linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    measured(off)
    assert 0 < max(held) <= sum(p.numel() for p in model.model.layers[1].parameters())
    assert off.lm_head.weight.is_meta


def test_tied_heads_stay_with_the_embeddings(tiny_config):
    tied, untied = (offload_map(tiny_config(tie_word_embeddings=tied), "cuda:1") for tied in (True, False))
    assert (tied["lm_head"], untied["lm_head"]) == ("cuda:1", "disk")
    assert untied["model.layers.0"] == "disk"
    assert untied["model.embed_tokens"] == untied["model.norm"] == "cuda:1"


def test_a_decoder_without_a_list_of_layers_is_refused(monkeypatch, tiny_config):
    monkeypatch.setattr("kvq.calib.loading.decoder_layers", lambda model: None)
    with pytest.raises(UnsupportedModelError, match="no plain list of layers; leave --layer-by-layer"):
        offload_map(AutoConfig.for_model(**tiny_config().to_dict()), "cpu")


def test_the_limit_decides(tiny_checkpoint):
    folder = tiny_checkpoint()
    size = (folder / "model.safetensors").stat().st_size
    assert by_layer(folder, Options(memory_limit=size))
    assert not by_layer(folder, Options(memory_limit=2 * size))
    assert by_layer(folder, Options(memory_limit=2 * size, dtype=torch.float64))
    assert not by_layer(folder, Options())
