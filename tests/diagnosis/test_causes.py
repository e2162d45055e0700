"""Laws: each made fault is found and named, in its layers; a plain model has none of them."""

import pytest
import torch

from kvq.diagnosis.causes import FEW_LAYERS, bias_ratio, causes_of, causes_of_weights, first_ratio
from kvq.models.describe import describe
from kvq.models.stored import Weights


def kinds(causes) -> list[str]:
    return [cause.kind for cause in causes]


def test_a_plain_model_has_no_fault(tiny_model, measured):
    stats = measured(tiny_model(layers=FEW_LAYERS, head_dim=16))
    assert causes_of(stats) == []


def test_a_large_key_bias_is_found_where_it_is(biased, measured):
    model = biased(200.0)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.zero_()
    stats = measured(model)
    found = next(cause for cause in causes_of(stats) if cause.kind == "key_bias")
    assert sorted(found.layers) == [0, 2]
    assert found.size == pytest.approx(max(bias_ratio(stats.layers[i]) for i in (0, 2)))
    assert "kivi4" in found.advice


def test_a_key_bias_shows_in_the_weights_alone(biased, tiny_checkpoint):
    folder = tiny_checkpoint(biased(200.0))
    spec = describe(biased(200.0).config)
    assert "key_bias" in kinds(causes_of_weights(spec, Weights(folder)))
    small = tiny_checkpoint(biased(0.5), name="small")
    assert "key_bias" not in kinds(causes_of_weights(spec, Weights(small)))


def test_weights_and_statistics_agree_on_the_size(biased, tiny_checkpoint, measured):
    model = biased(200.0)
    sizes = [
        next(cause.size for cause in causes if cause.kind == "key_bias")
        for causes in (
            causes_of(measured(model)),
            causes_of_weights(describe(model.config), Weights(tiny_checkpoint(model))),
        )
    ]
    assert 0.5 < sizes[0] / sizes[1] < 2


def test_massive_activations_are_found_in_the_first_tokens_keys(tiny_model, measured):
    """One token at every beginning, with an entry of thousands in its hidden state that keys read."""
    model = tiny_model(layers=3, head_dim=32)
    windows = torch.randint(4, 100, (4, 256), generator=torch.Generator().manual_seed(0))
    windows[:, 0] = 3
    assert "massive" not in kinds(causes_of(collected(model, windows)))
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 5000.0
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[:, 5] *= 20
    stats = collected(model, windows)
    found = next(cause for cause in causes_of(stats) if cause.kind == "massive")
    assert found.size > 4
    assert first_ratio(stats.layers[found.layers[0]]) == found.size
    assert "5" in found.text
    assert "sinks" in found.advice


def collected(model, windows):
    from kvq.calib.collect import collect

    return collect(model, windows)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next"])
def test_few_full_attention_layers_are_counted(family, tiny_model, measured, name):
    model = tiny_model(family(name))
    found = next(cause for cause in causes_of(measured(model)) if cause.kind == "few_layers")
    full = len(describe(model.config).full_layers)
    assert (found.size, len(found.layers)) == (full, full)
    assert f"{full} of 4" in found.text
