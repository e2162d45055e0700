"""Collected statistics are those of the model's own cache, whatever the batches, the padding or the interruptions."""

import functools
import logging
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, Gemma3nTextConfig, Gemma3TextConfig, GPT2Config, MambaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvq.calib import run_state as state_module
from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS, WINDOW_NEEDS
from kvq.calib.observers import Histogram
from kvq.calib.observers.tokens import window_priorities
from kvq.calib.stats import LayerStats, Stats
from kvq.errors import DataError, UnsupportedModelError
from kvq.models.describe import describe
from kvq.models.rope import rope_of

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


def assert_close(one: Stats, two: Stats, relative: float = 1e-5, moved: int = 2):
    """Equal but for rounding: integers exactly, except that ``moved`` counts of a histogram may change their bin."""
    ours, theirs = one.to_parts()[0], two.to_parts()[0]
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = (tensor_of(stats, name) for stats in (one, two))
        if ".histogram." in name or name.endswith(("magnitudes", "token_peaks")):
            assert a.sum() == b.sum(), name
            assert int((a - b).abs().sum()) <= 2 * moved, name
        elif a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=relative, atol=relative * float(b.abs().max()), msg=name)
        else:
            assert torch.equal(a, b), name
    assert [layer["key.range"].count for layer in one.layers.values()] == [
        layer["key.range"].count for layer in two.layers.values()
    ]


def tensor_of(stats: Stats, name: str) -> torch.Tensor:
    """A tensor of the file; histograms with all of their bins."""
    _, layer, *need, tensor = name.split(".")
    part = stats.layers[int(layer)][".".join(need)]
    return part.counts if isinstance(part, Histogram) else part.tensors()[tensor]


def assert_same_bits(one: Stats, two: Stats):
    assert one.to_parts()[1] == two.to_parts()[1]
    ours, theirs = one.to_parts()[0], two.to_parts()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
            got = stats.layers[index][f"{side}.range"]
            assert got.count == 5 * 33
            for ours, theirs in (
                (got.min, x.amin(1)),
                (got.max, x.amax(1)),
                (got.mean, x.mean(1)),
                (got.rms, (x**2).mean(1).sqrt()),
            ):
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)


class Reference:
    """Queries, keys before and after RoPE, values, attention and hidden states of a Llama, recomputed from its
    weights."""

    def __init__(self, model, window: torch.Tensor):
        self.hidden, self.parts = [], []
        hooks = []
        for layer in model.model.layers:
            hooks.append(
                layer.register_forward_pre_hook(lambda _, args, kwargs: self._layer(args, kwargs), with_kwargs=True)
            )
            hooks.append(layer.self_attn.register_forward_pre_hook(self._attention, with_kwargs=True))
        with torch.no_grad():
            model(window[None])
        for hook in hooks:
            hook.remove()

    def _layer(self, args, kwargs):
        self.hidden.append((args[0] if args else kwargs["hidden_states"])[0])

    def _attention(self, module, args, kwargs):
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q, k, v = (
            p(x).view(1, x.shape[1], -1, module.head_dim).transpose(1, 2)
            for p in (module.q_proj, module.k_proj, module.v_proj)
        )
        query, key = apply_rotary_pos_emb(q, k, cos, sin)
        weights = (
            (query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * module.scaling)
            .masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
            .softmax(-1)
        )
        found = {"query_pre": q, "query": query, "key_pre": k, "key": key, "value": v, "weights": weights}
        self.parts.append({name: x[0] for name, x in found.items()})


def test_keys_relative_to_64_tokens_are_measured_as_the_definition_says(tiny_model):
    """The range of R_(j - o) k, o the last multiple of 64 up to j."""
    model, windows = tiny_model(dtype=torch.float64), draw_windows(1, 150)
    stats = collect(model, windows, needs=frozenset(["key_page.range", "key_page.histogram"]))
    seen, rope = Reference(model, windows[0]), rope_of(model.config)
    positions = torch.arange(150).unsqueeze(0)
    for index, layer in stats.layers.items():
        turned = rope.rotate(seen.parts[index]["key_pre"][None], positions % 64)[0]
        found = layer["key_page.range"]
        torch.testing.assert_close(found.max.double(), turned.amax(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.min.double(), turned.amin(1), rtol=1e-5, atol=1e-5)


def test_every_statistic_is_its_definition_on_the_models_own_tensors(tiny_model):
    """fp64: moments, quantiles, weighted moments, sinks, massive activations and the reservoir, window by window."""
    model, windows = tiny_model(dtype=torch.float64), draw_windows(3, 17)
    stats = collect(model, windows, needs=ALL_NEEDS, batch_size=2)
    seen = [Reference(model, window) for window in windows]
    for index, layer in stats.layers.items():
        for tensor in ("query", "key_pre", "key", "value"):
            x = torch.cat([window.parts[index][tensor].reshape(2, -1, 16) for window in seen], dim=1)
            torch.testing.assert_close(layer[f"{tensor}.range"].absmax.double(), x.abs().amax(1), rtol=1e-6, atol=0)
            products = layer[f"{tensor}.moments"].products
            # Models compute their rotary angles in float32.
            error = 1e-5 if tensor == "key_pre" else 1e-9
            torch.testing.assert_close(products, x.transpose(1, 2) @ x, rtol=error, atol=error)
            median = layer[f"{tensor}.histogram"].quantile(0.5)
            assert ((median - x.median(1).values).abs() <= x.abs().median(1).values / 2).all()
        before = torch.cat([window.parts[index]["query_pre"].reshape(2, -1, 16) for window in seen], dim=1)
        torch.testing.assert_close(
            layer["query_pre.moments"].products, before.transpose(1, 2) @ before, rtol=1e-5, atol=1e-5
        )
        weighted = torch.zeros(2, 16, 16, dtype=torch.float64)
        mass = torch.zeros(4, 16, dtype=torch.float64)
        probes = [-(-17 * (j + 1) // 8) - 1 for j in range(8)]
        for window in seen:
            received = window.parts[index]["weights"].sum(1).view(2, 2, -1).sum(1)
            v = window.parts[index]["value"]
            weighted += torch.einsum("kt,ktc,ktd->kcd", received, v, v)
            mass += window.parts[index]["weights"][:, probes, :16].sum(1)
        torch.testing.assert_close(layer["value.weighted_moments"].products, weighted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer["value.weighted_moments"].weight, torch.full((2,), 3 * 17 * 2.0).double())
        torch.testing.assert_close(layer["sinks"].mass, mass, rtol=1e-5, atol=1e-5)
        hidden = torch.cat([window.hidden[index] for window in seen])
        torch.testing.assert_close(layer["massive"].channel_peak, hidden.abs().amax(0).float())
        order = [int(p) for p in window_priorities(windows, None).argsort()]
        for row, (q, k, v) in zip(order, layer["reservoir"].windows(), strict=True):
            for name, x in (("query", q), ("key", k), ("value", v)):
                torch.testing.assert_close(x, seen[row].parts[index][name].float())


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
    assert collect(model, draw_windows(1, 5)).layers[0]["key.range"].count == 5


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_change_nothing(tiny_model, batch_size):
    model, windows = tiny_model(dtype=torch.float64), draw_windows(7, 17)
    settings = {"needs": ALL_NEEDS, "reservoir_bytes": 3 * 17 * 2 * 8 * 16 * 4}
    one, two = (collect(model, windows, batch_size=size, **settings) for size in (batch_size, 2))
    assert_close(one, two)
    assert one.layers[0]["reservoir"].lengths.tolist() == [17] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny_model, side):
    """Rows of any length, padded on either side and batched, give what each row gives alone."""
    model, lengths = tiny_model(dtype=torch.float64), (3, 17, 9, 1)
    texts = [draw_windows(1, n, seed=n)[0] for n in lengths]
    windows, valid = torch.full((4, 20), 2), torch.zeros(4, 20, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(20 - len(text), 20) if side == "left" else slice(0, len(text))
        windows[row, place], valid[row, place] = text, True
    padded = collect(model, windows, valid=valid, batch_size=3, needs=ALL_NEEDS)
    alone = [collect(model, text[None], needs=ALL_NEEDS) for text in texts]
    layers = {
        index: functools.reduce(LayerStats.merge, [stats.layers[index] for stats in alone]) for index in padded.layers
    }
    assert_close(padded, replace(padded, layers=layers))
    assert padded.layers[1]["key.range"].count == sum(lengths)
    # Control: counting the padding as tokens gives something else.
    counted = collect(model, windows, needs=ALL_NEEDS)
    assert not torch.allclose(counted.layers[1]["value.range"].max, padded.layers[1]["value.range"].max)


def test_columns_that_are_padding_in_every_row_are_not_computed(tiny_model):
    model, seen = tiny_model(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    windows, valid = draw_windows(3, 20), torch.zeros(3, 20, dtype=torch.bool)
    valid[0, 5:9] = valid[1, 3:8] = valid[2, :20] = True
    collect(model, windows, valid=valid, batch_size=2)
    assert seen == [1, 1, 6, 20]


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        (Gemma3TextConfig(**SMALL), [0, 1, 2, 3]),
        (
            Gemma3nTextConfig(
                **SMALL, num_kv_shared_layers=2, vocab_size_per_layer_input=128, hidden_size_per_layer_input=16
            ),
            [0, 1],
        ),
        (GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4), [0, 1]),
    ],
    ids=["hybrid", "shared", "gpt2"],
)
def test_layers_that_keep_keys_and_values_are_recorded_in_every_family(tiny_model, config, recorded):
    """Sliding-window layers among them, with what serving engines need of them and no more."""
    stats = collect(tiny_model(config), draw_windows(2, 19))
    assert list(stats.layers) == recorded
    spec = describe(config)
    assert stats.needs == DEFAULT_NEEDS - set(stats.missing)
    for index, layer in stats.layers.items():
        wanted = DEFAULT_NEEDS if spec.layers[index].kind == "full" else DEFAULT_NEEDS & WINDOW_NEEDS
        assert set(layer) == wanted - set(stats.missing)
        assert layer["key.range"].absmax.shape == (spec.layers[index].kv_heads, spec.layers[index].head_dim)
        assert (layer["value.range"].rms > 0).all()


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
    model, windows, state = tiny_model(), draw_windows(7, 17), tmp_path / "state"
    whole = collect(model, windows, batch_size=2, needs=ALL_NEEDS)
    with pytest.raises(KeyboardInterrupt):
        collect(model, windows, batch_size=2, needs=ALL_NEEDS, progress=Interrupt(4), state_folder=state)
    assert state.is_dir()
    calls = []
    resumed = collect(
        model, windows, batch_size=2, needs=ALL_NEEDS, progress=lambda *call: calls.append(call), state_folder=state
    )
    assert calls == [(4, 7), (6, 7), (7, 7)]
    assert_same_bits(resumed, whole)
    resumed.save(tmp_path / "resumed")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_state_is_saved_while_running_and_stays_until_the_caller_removes_it(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "SAVE_SHARE", 1e9)
    state, seen = tmp_path / "state", []

    def watch(done, total):
        seen.append((done, sorted(path.name for path in state.glob("*"))))

    collect(tiny_model(), draw_windows(4, 9), batch_size=1, progress=watch, state_folder=state)
    files = [[], [], ["part-0-0.safetensors"], ["part-1-0.safetensors"]]
    # Two batches become one node, and four one more.
    assert seen == list(enumerate([*files, ["part-0-2.safetensors", "part-1-0.safetensors"]]))
    assert [path.name for path in state.iterdir()] == ["part-2-0.safetensors"]


@pytest.mark.parametrize("change", ["windows", "batch_size", "weights", "needs", "garbage"])
def test_the_state_of_another_run_is_not_used(tiny_model, tmp_path, change, caplog):
    model, windows, state = tiny_model(), draw_windows(6, 9), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        collect(model, windows, batch_size=2, progress=Interrupt(2), state_folder=state)
    settings = {"batch_size": 2}
    if change == "windows":
        windows = draw_windows(6, 9, seed=1)
    elif change == "batch_size":
        settings["batch_size"] = 3
    elif change == "weights":
        settings["weights_fingerprint"] = "other"
    elif change == "needs":
        settings["needs"] = frozenset(["key.range"])
    else:
        next(state.iterdir()).write_bytes(b"garbage")
    calls = []
    with caplog.at_level(logging.WARNING):
        stats = collect(model, windows, progress=lambda *c: calls.append(c), state_folder=state, **settings)
    assert calls[0] == (0, 6)
    assert "Starting over" in caplog.text
    assert_same_bits(stats, collect(model, windows, **settings))


def test_a_reservoir_without_room_for_a_window_is_refused(tiny_model):
    with pytest.raises(DataError, match="a reservoir of 0 MB has no room for one window"):
        collect(tiny_model(), draw_windows(2, 9), needs=frozenset(["reservoir"]), reservoir_bytes=1000)
