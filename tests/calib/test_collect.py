"""Collected statistics are those of the model's own cache, whatever the batches, the padding or the interruptions."""

import logging

import pytest
import torch
from transformers import DynamicCache, Gemma3nTextConfig, Gemma3TextConfig, GPT2Config, MambaConfig

from kvq.calib import collect as collect_module
from kvq.calib.collect import collect
from kvq.errors import DataError, UnsupportedModelError
from kvq.models.describe import describe

FIELDS = ("min", "max", "sum", "sum_squares")
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
}


def draw_windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 100, (count, length), generator=torch.Generator().manual_seed(seed))


def assert_close(one, two, relative: float = 1e-5):
    assert list(one.layers) == list(two.layers)
    for index in one.layers:
        for side in ("key", "value"):
            a, b = getattr(one.layers[index], side), getattr(two.layers[index], side)
            assert a.count == b.count
            scale = b.absmax.max().double() * torch.tensor(b.count)
            for name in FIELDS:
                difference = (getattr(a, name).double() - getattr(b, name).double()).abs()
                assert (difference <= relative * scale).all(), (index, side, name)


def assert_same_bits(one, two):
    for index in one.layers:
        for side in ("key", "value"):
            a, b = getattr(one.layers[index], side), getattr(two.layers[index], side)
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
            assert a.count == b.count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_statistics_are_those_of_the_models_own_cache(tiny_model, attention):
    """fp64 reference: the keys and values that a plain DynamicCache holds after one forward a window."""
    model = tiny_model(dtype=torch.float64, attn_implementation=attention)
    windows = draw_windows(5, 33)
    stats = collect(model, windows, batch_size=2)
    caches = []
    for window in windows:
        caches.append(DynamicCache(config=model.config))
        with torch.no_grad():
            model(window[None], past_key_values=caches[-1])
    for index in range(2):
        for side, name in (("key", "keys"), ("value", "values")):
            x = torch.cat([getattr(cache.layers[index], name)[0] for cache in caches], dim=1)
            got = getattr(stats.layers[index], side)
            assert got.count == 5 * 33
            for ours, theirs in (
                (got.min, x.amin(1)),
                (got.max, x.amax(1)),
                (got.mean, x.mean(1)),
                (got.rms, (x**2).mean(1).sqrt()),
            ):
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)


def test_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation, attributes = model.config._attn_implementation, set(vars(model))
    collect(model, draw_windows(2, 9))
    assert model.config._attn_implementation == implementation
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_head_is_not_run(tiny_model):
    model = tiny_model()

    def forbidden(*_):
        raise AssertionError("the head ran")

    model.lm_head.register_forward_hook(forbidden)
    assert collect(model, draw_windows(1, 5)).layers[0].key.count == 5


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_change_nothing(tiny_model, batch_size):
    model, windows = tiny_model(dtype=torch.float64), draw_windows(7, 17)
    assert_close(collect(model, windows, batch_size=batch_size), collect(model, windows, batch_size=2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny_model, side):
    model, lengths = tiny_model(dtype=torch.float64), (3, 17, 9, 1)
    texts = [draw_windows(1, n, seed=n)[0] for n in lengths]
    windows, valid = torch.full((4, 20), 2), torch.zeros(4, 20, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(20 - len(text), 20) if side == "left" else slice(0, len(text))
        windows[row, place], valid[row, place] = text, True
    padded = collect(model, windows, valid=valid, batch_size=3)
    alone = [collect(model, text[None]) for text in texts]
    for index in range(2):
        for name in ("key", "value"):
            want = getattr(alone[0].layers[index], name)
            for other in alone[1:]:
                want = want.merge(getattr(other.layers[index], name))
            got = getattr(padded.layers[index], name)
            assert got.count == want.count == sum(lengths)
            for field in FIELDS:
                torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=1e-6, atol=1e-6)
    # Control: counting the padding as tokens gives something else.
    assert not torch.allclose(collect(model, windows).layers[1].value.max, padded.layers[1].value.max)


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        (Gemma3TextConfig(**SMALL), [1, 3]),
        (
            Gemma3nTextConfig(
                **SMALL, num_kv_shared_layers=2, vocab_size_per_layer_input=128, hidden_size_per_layer_input=16
            ),
            [1],
        ),
        (GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4), [0, 1]),
    ],
    ids=["hybrid", "shared", "gpt2"],
)
def test_only_full_layers_are_recorded_in_every_family(tiny_model, config, recorded):
    stats = collect(tiny_model(config), draw_windows(2, 19))
    assert list(stats.layers) == recorded
    spec = describe(config)
    for index, layer in stats.layers.items():
        assert layer.key.absmax.shape == (spec.layers[index].kv_heads, spec.layers[index].head_dim)
        assert (layer.value.rms > 0).all()


def test_provenance_is_recorded(tiny_model, tiny_config):
    stats = collect(tiny_model(), draw_windows(1, 5), model_name="tiny", weights_fingerprint="ff")
    assert (stats.model, stats.weights_fingerprint) == ("tiny", "ff")
    assert stats.versions["torch"] == torch.__version__
    stats.check_model(describe(tiny_config()), "ff")


@pytest.mark.parametrize(
    ("projection", "side", "bad"), [("k_proj", "keys", float("nan")), ("v_proj", "values", float("inf"))]
)
def test_bad_activations_name_the_layer_and_the_side(tiny_model, projection, side, bad):
    model = tiny_model()
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight[5] = bad
    with pytest.raises(DataError, match=f"layer 1 gives {side} that are NaN or Inf in windows 0 to 2"):
        collect(model, draw_windows(3, 9))


def test_unusable_arguments_and_models_are_refused(tiny_model):
    model, windows = tiny_model(), draw_windows(2, 5)
    with pytest.raises(DataError, match="at least one window"):
        collect(model, windows[:0])
    with pytest.raises(DataError, match="batch_size=0"):
        collect(model, windows, batch_size=0)
    with pytest.raises(DataError, match="give bool of shape"):
        collect(model, windows, valid=torch.ones(2, 5))
    mamba = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModelError, match="no KV cache"):
        collect(tiny_model(mamba), windows)


class Interrupt:
    """Progress that raises KeyboardInterrupt once, after ``windows`` windows, and records every call."""

    def __init__(self, windows: int):
        self.windows, self.calls = windows, []

    def __call__(self, done: int, total: int):
        self.calls.append((done, total))
        if done == self.windows and len(self.calls) > 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_continues_to_the_same_bits(tiny_model, tmp_path):
    model, windows, partial = tiny_model(), draw_windows(7, 17), tmp_path / "stats.partial"
    whole = collect(model, windows, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        collect(model, windows, batch_size=2, progress=Interrupt(4), resume_path=partial)
    assert partial.exists()
    calls = []
    resumed = collect(model, windows, batch_size=2, progress=lambda *call: calls.append(call), resume_path=partial)
    assert calls == [(4, 7), (6, 7), (7, 7)]
    assert_same_bits(resumed, whole)
    resumed.save(tmp_path / "resumed")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial.exists()


def test_state_is_saved_while_running(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_module, "SAVE_SECONDS", 0.0)
    partial, seen = tmp_path / "partial", []
    collect(
        tiny_model(),
        draw_windows(3, 9),
        batch_size=1,
        progress=lambda done, total: seen.append((done, partial.exists())),
        resume_path=partial,
    )
    assert seen == [(0, False), (1, False), (2, True), (3, True)]
    assert not partial.exists()


@pytest.mark.parametrize("change", ["windows", "batch_size", "weights", "garbage"])
def test_the_state_of_another_run_is_not_used(tiny_model, tmp_path, change, caplog):
    model, windows, partial = tiny_model(), draw_windows(6, 9), tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        collect(model, windows, batch_size=2, progress=Interrupt(2), resume_path=partial)
    settings = {"batch_size": 2}
    if change == "windows":
        windows = draw_windows(6, 9, seed=1)
    elif change == "batch_size":
        settings["batch_size"] = 3
    elif change == "weights":
        settings["weights_fingerprint"] = "other"
    else:
        partial.write_bytes(b"garbage")
    calls = []
    with caplog.at_level(logging.WARNING):
        stats = collect(model, windows, progress=lambda *c: calls.append(c), resume_path=partial, **settings)
    assert calls[0] == (0, 6)
    assert "Starting over" in caplog.text
    assert_same_bits(stats, collect(model, windows, **settings))
