"""Decoding law: every way of generating reads the same packed state, and gives what plain greedy decoding gives."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from kvq.cache import PackedLayer, cache_nbytes, packed_layers
from kvq.calib.artefacts import stand_in_artefacts
from kvq.errors import CacheError
from kvq.integrations.runtime import new_cache
from kvq.integrations.runtime import quantized_cache as with_artefacts
from kvq.kernels.cpp import build, launch
from kvq.models.describe import describe
from kvq.recipe import load_recipe, parse_recipe

RECIPES = {
    "kivi2": load_recipe("kivi2"),
    "kivi4": load_recipe("kivi4"),
    "int4": load_recipe("int4"),
    "rotated": load_recipe("int4").override(
        {"transforms.key": [{"kind": "hadamard"}], "transforms.value": [{"kind": "hadamard", "seed": 2}]}
    ),
    "pre-RoPE": load_recipe("kivi2").override({"key.placement": "pre_rope", "tokens.sinks": 2}),
    "page": load_recipe("int4").override(
        {"transforms.key": [{"kind": "hadamard", "at": "page"}], "key.frame": 32, "tokens.sinks": 2}
    ),
    "gear keys before RoPE, NVFP4 values": parse_recipe(
        {
            "name": "test",
            "key": load_recipe("gear2").key.to_dict() | {"placement": "pre_rope"},
            "value": load_recipe("nvfp4").value.to_dict() | {"outliers": {"share": 0.05, "along": "token"}},
            "tokens": {"window": 64},
        },
        source="test",
    ),
    "kvquant": load_recipe("kvquant3"),
    "qjl keys, turboquant values": parse_recipe(
        {
            "name": "test",
            "key": load_recipe("qjl").key.to_dict(),
            "value": load_recipe("turboquant3").value.to_dict(),
            "tokens": {"window": 32, "sinks": 2},
            "transforms": {"value": [{"kind": "hadamard", "seed": 2}]},
        },
        source="test",
    ),
}
# Prompts end and tokens come so that keys are flushed on the way: at 256 tokens with a window of 128.
STEPS = 110
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


# What the C++ kernel leaves to torch.
IN_TORCH = {"qjl keys, turboquant values"}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=2, head_dim=32, dtype=torch.float64, seed=3)


def quantized_cache(model, recipe):
    """With made-up artefacts for recipes that need calibration."""
    return with_artefacts(model, recipe, stand_in_artefacts(load_recipe(recipe), describe(model.config)))


def prompt(count, seed=0):
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))


def step_by_step(model, ids, steps):
    """Greedy decoding with an explicit cache: the reference for every mode of ``generate``."""
    cache, out = new_cache(model), [ids]
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
        for _ in range(steps):
            out.append(logits[:, -1:].argmax(-1))
            logits = model(out[-1], past_key_values=cache).logits
    return torch.cat(out, dim=1)


def test_greedy_equals_stepping_through_the_cache_and_differs_from_the_exact_cache(model, recipe):
    ids = prompt(150)
    exact = model.generate(ids, **GREEDY)
    with quantized_cache(model, recipe):
        found = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(found.sequences, step_by_step(model, ids, STEPS))
    assert not torch.equal(found.sequences, exact)
    layers = packed_layers(found.past_key_values)
    assert len(layers) == 2
    assert all(layer.reads_handle for layer in layers)
    plain = DynamicCache(config=model.config)
    model(found.sequences[:, :-1], past_key_values=plain)
    assert cache_nbytes(found.past_key_values) < cache_nbytes(plain)


@pytest.mark.parametrize(("recipe", "rows"), [("kivi2", 1), *((name, 2) for name in RECIPES)], indirect=["recipe"])
def test_the_compiled_kernel_and_the_torch_reference_give_the_same_logits(model, recipe, rows, monkeypatch):
    """Steps through a left-padded batch; the recipes that the kernel does not serve are the control."""
    if build.unavailable() is not None:
        pytest.skip(build.unavailable())
    ids, mask = prompt(150).repeat(rows, 1), torch.ones(rows, 150, dtype=torch.long)
    mask[-1, :31] = 0
    served = not any(recipe is RECIPES[name] for name in IN_TORCH)
    found, calls, attend = {}, [], launch.decode_attention
    monkeypatch.setattr(launch, "decode_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    for which in ("compiled", "reference"):
        if which == "reference":
            monkeypatch.setattr(build, "unavailable", lambda: "asked for the reference")
            before = len(calls)
        with quantized_cache(model, recipe), torch.no_grad():
            cache = new_cache(model)
            model(ids, attention_mask=mask, past_key_values=cache)
            steps = []
            # Across flush boundaries; of the control, which runs the reference twice, a few show who was called.
            for t in range(STEPS if served else 12):
                own = torch.cat([mask, torch.ones(rows, t + 1, dtype=torch.long)], dim=1)
                token = torch.full((rows, 1), 3 + t % 100)
                steps.append(model(token, attention_mask=own, past_key_values=cache).logits)
        found[which] = torch.cat(steps, dim=1)
    assert len(calls) == before
    assert bool(calls) == served
    assert torch.allclose(found["compiled"], found["reference"], rtol=0, atol=1e-9)


@pytest.mark.long
def test_speculative_decoding_equals_greedy(model, recipe):
    """A draft is verified as if its tokens had come one by one, across flush boundaries."""
    ids, assistant = prompt(40).repeat(1, 4), copy.deepcopy(model)
    with quantized_cache(model, recipe):
        greedy = model.generate(ids, **GREEDY)
        for extra in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": assistant}):
            assert torch.equal(model.generate(ids, **GREEDY, **extra), greedy), extra.keys()


def test_beams_equal_beams_over_the_dequantized_cache(model, recipe):
    """Shared pages against full tensors that are copied at each reordering."""
    ids = prompt(130)
    settings = GREEDY | {"num_beams": 3, "max_new_tokens": 40}
    with quantized_cache(model, recipe):
        packed = model.generate(ids, **settings)
        model.set_attn_implementation("eager")
        dense = model.generate(ids, **settings)
        model.set_attn_implementation("kvq")
    assert torch.equal(packed, dense)


def test_sampling_is_reproducible_and_returns_several_sequences(model, recipe):
    settings = GREEDY | {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 20}
    with quantized_cache(model, recipe):
        torch.manual_seed(5)
        first = model.generate(prompt(140), **settings)
        torch.manual_seed(5)
        assert torch.equal(model.generate(prompt(140), **settings), first)
    assert first.shape == (3, 160)


def test_chunked_prefill_stores_the_same_tokens(model, recipe):
    ids = prompt(300)
    with quantized_cache(model, recipe):
        settings = GREEDY | {"max_new_tokens": 20}
        out = model.generate(ids, **settings, prefill_chunk_size=64, return_dict_in_generate=True)
        assert out.past_key_values.get_seq_length() == 300 + 19
        cache, parts = new_cache(model), ids.split(64, dim=1)
        with torch.no_grad():
            for part in parts:
                logits = model(part, past_key_values=cache).logits
        assert out.sequences[0, 300] == logits[0, -1].argmax()


@pytest.mark.long
def test_a_left_padded_batch_generates_what_each_row_generates_alone(model, recipe):
    long, short = prompt(150), prompt(83, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 67, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :67] = 0
    with quantized_cache(model, recipe):
        batch = model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(batch[0], model.generate(long, **GREEDY)[0])
        assert torch.equal(batch[1, 67:], model.generate(short, **GREEDY)[0])


@pytest.mark.parametrize("recipe", ["kivi2", "gear keys before RoPE, NVFP4 values"], indirect=True)
def test_reset_and_reuse_gives_a_fresh_cache(model, recipe):
    ids = prompt(200)
    with quantized_cache(model, recipe):
        first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        cache = first.past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), first.sequences)


@pytest.mark.parametrize("recipe", ["kivi2", "gear keys before RoPE, NVFP4 values"], indirect=True)
def test_a_conversation_goes_on_with_the_returned_cache(model, recipe):
    with quantized_cache(model, recipe):
        first = model.generate(prompt(140), **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, prompt(30, seed=4)], dim=1)
        again = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert again.shape[1] == longer.shape[1] + STEPS


def test_copies_of_cache_and_model_are_independent(model, recipe):
    ids = prompt(180)
    with quantized_cache(model, recipe), torch.no_grad():
        cache = new_cache(model)
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        model(prompt(60, seed=8), past_key_values=twin)
        assert cache.get_seq_length() == 180
        logits = model(ids[:, :1], past_key_values=cache).logits
        again = new_cache(model)
        model(ids, past_key_values=again)
        assert torch.equal(logits, model(ids[:, :1], past_key_values=again).logits)
        other = copy.deepcopy(model)
        assert other._prepare_cache_for_generation.args[0] is other
        settings = GREEDY | {"max_new_tokens": 20}
        assert torch.equal(other.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("recipe", ["kivi2"], indirect=True)
def test_plain_calls_use_a_packed_cache_and_leave_an_explicit_one_alone(model, recipe):
    with quantized_cache(model, recipe), torch.no_grad():
        assert isinstance(model(prompt(9)).past_key_values.layers[0], PackedLayer)
        assert model(prompt(9), use_cache=False).past_key_values is None
        own = DynamicCache(config=model.config)
        assert not packed_layers(model(prompt(9), past_key_values=own).past_key_values)


@pytest.mark.parametrize("recipe", ["kivi2"], indirect=True)
def test_the_model_comes_back_as_it_was_even_after_an_error(model, recipe):
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), quantized_cache(model, recipe):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    assert getattr(model, "kvq", None) is None
    assert "_prepare_cache_for_generation" not in vars(model)
    assert not model.base_model._forward_pre_hooks
    assert not packed_layers(model(prompt(5)).past_key_values)


@pytest.mark.parametrize("recipe", ["kivi2"], indirect=True)
def test_a_second_recipe_on_top_is_refused(model, recipe):
    with (
        quantized_cache(model, recipe),
        pytest.raises(CacheError, match="already runs"),
        quantized_cache(model, "int8"),
    ):
        pass


@pytest.mark.parametrize("recipe", ["kivi2"], indirect=True)
def test_a_lost_handle_shows_at_once(model, recipe):
    """A tensor that lost its packed storage on the way cannot be read, nor can another attention read the cache."""
    with quantized_cache(model, recipe), torch.no_grad():
        cache = new_cache(model)
        model(prompt(140), past_key_values=cache)
        keys, _ = cache.update(torch.zeros(1, 2, 1, 32).double(), torch.zeros(1, 2, 1, 32).double(), 0)
    assert keys.shape == (1, 2, 141, 32)
    for read in (lambda: keys.isnan(), lambda: keys.transpose(1, 2) @ keys, lambda: keys[0, 0, 0].item()):
        with pytest.raises(CacheError, match="begin a new cache"):
            read()
    with quantized_cache(model, recipe), torch.no_grad():
        cache = new_cache(model)
        model(prompt(140), past_key_values=cache)
        model.set_attn_implementation("eager")
        with pytest.raises(CacheError, match="once kvq's attention has read a cache no other can"):
            model(prompt(1), past_key_values=cache)


def test_crop_after_the_fact_is_refused_with_the_way_out(model, recipe):
    with quantized_cache(model, recipe), torch.no_grad():
        cache = new_cache(model)
        model(prompt(400), past_key_values=cache)
        with pytest.raises(CacheError, match="activate_past_recording"):
            cache.crop(-300)
        with pytest.raises(ValueError, match="negative"):
            cache.layers[0].crop(3)


def test_a_cache_survives_pickling(model, recipe):
    with quantized_cache(model, recipe), torch.no_grad():
        cache = new_cache(model)
        model(prompt(200), past_key_values=cache)
        again = pickle.loads(pickle.dumps(cache))
        token = prompt(1, seed=2)
        assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=again).logits)


@pytest.mark.parametrize("name", ["kivi2", "int8"])
def test_modes_hold_in_bfloat16(tiny_model, name):
    """Those that compare like with like: drafts are verified several at a time, which rounds otherwise."""
    model, recipe = tiny_model(layers=2, head_dim=32, dtype=torch.bfloat16, seed=3), load_recipe(name)
    test_greedy_equals_stepping_through_the_cache_and_differs_from_the_exact_cache(model, recipe)
    test_chunked_prefill_stores_the_same_tokens(model, recipe)
    test_a_left_padded_batch_generates_what_each_row_generates_alone(model, recipe)
    test_reset_and_reuse_gives_a_fresh_cache(model, recipe)
