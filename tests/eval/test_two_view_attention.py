"""The evaluation law: one two-view forward equals decoding through the packed cache, token by token."""

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig, SmolLM3Config

from kvq.cache import make_plan
from kvq.cache import model_attention as attention
from kvq.calib.artefacts import stand_in_artefacts
from kvq.errors import CacheError, DataError
from kvq.eval.two_view import NAME, two_view
from kvq.eval.two_view_attention import TILE_SCORES
from kvq.integrations import runtime
from kvq.models.describe import describe
from kvq.recipe import load_recipe, parse_recipe

TOLERANCE = 1e-9
DIFFERENT = 1e-4
# Odd on purpose. LONG reaches the second flush of 128 tokens, LENGTH the fifth of 32.
LENGTH, LONG = 163, 267


def affine(bits, axis, group):
    return {"codec": "affine", "bits": bits, "axis": axis, "group": group}


def recipe(key, value, window=0, sinks=0, **more):
    tokens = {"sinks": sinks, "window": window}
    return parse_recipe({"name": "test", "key": key, "value": value, "tokens": tokens} | more, source="test")


CHANNEL2, TOKEN2 = affine(2, "channel", 32), affine(2, "token", 16)
UNIT8 = {"codec": "float8", "scale": "unit"}
RECIPES = {
    "kivi2": recipe(affine(2, "channel", 32), affine(2, "token", 16), window=128),
    "kivi4": recipe(affine(4, "channel", 32), affine(4, "token", 16), window=128),
    "int4": load_recipe("int4"),
    "int8": load_recipe("int8"),
    "fp8": recipe(UNIT8, UNIT8),
    "window 0": recipe(CHANNEL2, TOKEN2),
    "window 32": recipe(CHANNEL2, TOKEN2, window=32),
    "sinks": recipe(CHANNEL2, TOKEN2, window=32, sinks=5),
    "sinks and a large window": recipe(CHANNEL2, TOKEN2, window=128, sinks=3),
    "axes swapped": recipe(affine(3, "token", 16), affine(3, "channel", 16), window=64),
    "rotated": recipe(
        TOKEN2, TOKEN2, window=20, transforms={"key": [{"kind": "hadamard"}], "value": [{"kind": "hadamard"}]}
    ),
    "rotated by layer": recipe(
        TOKEN2, CHANNEL2, layers={"1": {"transforms": {"value": [{"kind": "hadamard", "block": 16, "seed": 1}]}}}
    ),
    "pre-RoPE": recipe(CHANNEL2 | {"placement": "pre_rope"}, TOKEN2, window=32, sinks=2),
    "pre-RoPE, rotated values": recipe(
        TOKEN2 | {"placement": "pre_rope"}, TOKEN2, transforms={"value": [{"kind": "hadamard"}]}
    ),
    "page": recipe(CHANNEL2 | {"placement": "page", "frame": 32}, TOKEN2, window=32, sinks=3),
    "page, by token": recipe(TOKEN2 | {"placement": "page"}, CHANNEL2, window=32, sinks=2),
    "page, rotated": recipe(TOKEN2, TOKEN2, window=9, transforms={"key": [{"kind": "hadamard", "at": "page"}]}),
    "turboquant": load_recipe("turboquant3").override({"tokens.sinks": 2}),
    "turboquant, signs": load_recipe("turboquant2").override({"key.signs": {"seed": 1}, "tokens.window": 9}),
    "qjl": load_recipe("qjl").override({"tokens.window": 32, "value.group": 16}),
    "zeroquant": load_recipe("zeroquant8").override({"key.bits": 4, "value.bits": 4}),
    "nf4, pre-RoPE": load_recipe("nf4").override({"key.placement": "pre_rope", "tokens.sinks": 1}),
    "nvfp4": load_recipe("nvfp4"),
    "gear": load_recipe("gear2").override({"value.group": 16, "tokens.sinks": 3}),
    "gear, pre-RoPE": load_recipe("gear4").override({"key.placement": "pre_rope"}),
    "kvquant": load_recipe("kvquant3").override({"key.outliers": {"share": 0.1, "along": "token"}}),
    "kvquant, dense": load_recipe("kvquant2-dense").override({"tokens.window": 21}),
    "skvq": load_recipe("skvq2").override({"key.group": 16, "value.group": 16, "tokens.window": 32}),
    "bytes": recipe(CHANNEL2 | {"meta": "range8"}, TOKEN2 | {"meta": "zero8", "norm": {"over": "token"}}, window=32),
    "tiers": recipe({"codec": "tiers", "bits": [3], "group": 32}, TOKEN2, window=32, sinks=1),
    "by layer": recipe(CHANNEL2, TOKEN2, window=32, layers={"0": {"key": affine(8, "token", "head")}}),
    "one layer exact": recipe(
        CHANNEL2, TOKEN2, window=32, layers={"1": {"key": {"codec": "exact"}, "value": {"codec": "exact"}}}
    ),
    "by head": recipe(
        CHANNEL2,
        TOKEN2,
        window=32,
        layers={"0/1": {"key": {"bits": 4}, "tokens": {"window": 0, "sinks": 2}}, "1/0": {"value": {"bits": 8}}},
    ),
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(dtype=torch.float64)


def tokens_of(rows=1, length=LENGTH, seed=0):
    return torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


def plan_of(model, which):
    own, spec = RECIPES[which] if which in RECIPES else load_recipe(which), describe(model.config)
    return make_plan(own, spec, stand_in_artefacts(own, spec))


@torch.inference_mode()
def through_cache(model, plan, tokens, cuts, mask=None):
    """Logits [B, T, V] of feeding the tokens through the real packed cache, cut at the given positions."""
    runtime.install(model, plan)
    try:
        cache, found = runtime.new_cache(model), []
        for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]]):
            extra = {} if mask is None else {"attention_mask": mask[:, :stop]}
            found.append(model(tokens[:, start:stop], past_key_values=cache, **extra).logits)
    finally:
        runtime.uninstall(model)
    return torch.cat(found, dim=1)


@torch.inference_mode()
def one_forward(model, plan, tokens, mode, mask=None, **settings):
    with two_view(model, plan, mode, **settings):
        return model(tokens, attention_mask=mask).logits


def gap(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("which", RECIPES)
def test_stream_equals_decoding_token_by_token(model, which):
    length = LONG if RECIPES[which].tokens.window == 128 else LENGTH
    plan, tokens = plan_of(model, which), tokens_of(length=length)
    expected = through_cache(model, plan, tokens, range(1, length))
    assert gap(one_forward(model, plan, tokens, "stream"), expected) < TOLERANCE
    assert gap(model(tokens).logits.detach(), expected) > DIFFERENT
    other = one_forward(model, plan, tokens, "chunked", chunk=length - 1)
    assert gap(other, expected) > DIFFERENT


@pytest.mark.parametrize(
    "which", ["kivi2", "int8", "sinks", "by head", "axes swapped", "rotated", "pre-RoPE", "gear", "turboquant"]
)
def test_prefill_equals_a_prompt_and_then_decoding(model, which):
    plan, tokens, context = plan_of(model, which), tokens_of(length=LONG, seed=1), 197
    expected = through_cache(model, plan, tokens, range(context, LONG))
    assert gap(one_forward(model, plan, tokens, "prefill", contexts=context), expected) < TOLERANCE
    assert gap(one_forward(model, plan, tokens, "prefill", contexts=context + 1), expected) > DIFFERENT
    assert gap(one_forward(model, plan, tokens, "stream"), expected) > DIFFERENT


def test_prefill_takes_one_context_per_row(model):
    plan, tokens, contexts = plan_of(model, "sinks"), tokens_of(rows=3, seed=2), [0, 40, 111]
    found = one_forward(model, plan, tokens, "prefill", contexts=contexts)
    for row, context in enumerate(contexts):
        cuts = range(max(1, context), LENGTH)
        expected = through_cache(model, plan, tokens[row : row + 1], cuts)
        assert gap(found[row], expected[0]) < TOLERANCE
        wrong = one_forward(model, plan, tokens[row : row + 1], "prefill", contexts=contexts[row - 1])
        assert gap(wrong, expected) > DIFFERENT


@pytest.mark.parametrize("which", ["kivi2", "int4", "sinks", "by head", "rotated by layer", "pre-RoPE", "gear", "qjl"])
@pytest.mark.parametrize("chunk", [50, 64])
def test_chunked_equals_feeding_chunks(model, which, chunk):
    plan, tokens = plan_of(model, which), tokens_of(length=LONG, seed=3)
    expected = through_cache(model, plan, tokens, range(chunk, LONG, chunk))
    assert gap(one_forward(model, plan, tokens, "chunked", chunk=chunk), expected) < TOLERANCE
    assert gap(one_forward(model, plan, tokens, "chunked", chunk=chunk - 1), expected) > DIFFERENT


def test_chunks_of_one_token_are_the_stream(model):
    plan, tokens = plan_of(model, "sinks"), tokens_of(seed=4)
    stream = one_forward(model, plan, tokens, "stream")
    assert gap(one_forward(model, plan, tokens, "chunked", chunk=1), stream) < TOLERANCE


@pytest.mark.parametrize("which", ["kivi2", "sinks", "by head", "rotated by layer", "pre-RoPE", "gear, pre-RoPE"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(model, which, side):
    # Two tokens in the last block, so that pads (whose embedding is zero) would widen its range.
    plan, lengths = plan_of(model, which), [LONG, 130 + RECIPES[which].tokens.sinks, 223]
    rows = [tokens_of(length=n, seed=n) for n in lengths]
    tokens, mask = torch.full((3, LONG), 2), torch.zeros(3, LONG, dtype=torch.long)
    spans = [slice(LONG - n, LONG) if side == "left" else slice(0, n) for n in lengths]
    for b, span in enumerate(spans):
        tokens[b, span], mask[b, span] = rows[b], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for mode in ("stream", "simulate"):
        with torch.inference_mode(), two_view(model, plan, mode):
            found = model(tokens, attention_mask=mask, position_ids=positions).logits
        for b, span in enumerate(spans):
            assert gap(found[b, span], one_forward(model, plan, rows[b], mode)[0]) < TOLERANCE
    if side == "right":
        found = one_forward(model, plan, tokens, "simulate", lengths=lengths)
        for b, span in enumerate(spans):
            assert gap(found[b, span], one_forward(model, plan, rows[b], "simulate")[0]) < TOLERANCE
        careless = one_forward(model, plan, tokens, "simulate")
        assert gap(careless[1, : lengths[1]], found[1, : lengths[1]]) > DIFFERENT


def test_simulate_quantizes_every_number_after_the_sinks(model):
    """Against a plain forward whose keys and values are replaced by their round trip, block by block."""
    plan, tokens = plan_of(model, "sinks"), tokens_of(seed=5)
    found = one_forward(model, plan, tokens, "simulate")
    assert gap(found, _fake_quantized(model, plan, tokens)) < TOLERANCE
    assert gap(found, one_forward(model, plan, tokens, "stream")) > DIFFERENT


def _fake_quantized(model, plan, tokens):
    from transformers import DynamicCache

    class Fake(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            group = plan.layers[layer_idx][0]
            sides = [
                torch.cat([x[:, :, : group.sinks], _blocks(x[:, :, group.sinks :], group.codecs[side])], dim=2)
                for side, x in (("key", key_states), ("value", value_states))
            ]
            return super().update(*sides, layer_idx, *args, **kwargs)

    with torch.inference_mode():
        return model(tokens, past_key_values=Fake(config=model.config)).logits


def _blocks(x, codec):
    done = []
    for block in x.split(codec.block_tokens, dim=2):
        missing = codec.block_tokens - block.shape[2]
        filled = torch.cat([block, block[:, :, :1].expand(-1, -1, missing, -1)], dim=2)
        done.append(codec.decode(codec.encode(filled), torch.float64)[:, :, : block.shape[2]])
    return torch.cat(done, dim=2)


def test_softcap_sink_logits_and_sliding_layers(tiny_model):
    """Gemma 2 caps its scores, gpt-oss adds a sink logit a head; both leave every other layer to a sliding window."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "sliding_window": 8, "initializer_range": 0.3}
    small = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}
    attention.register()
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    for config in (Gemma2Config(**sizes, **small), GptOssConfig(**sizes, **experts)):
        model = tiny_model(config, dtype=torch.float64)
        # The grouped expert product knows no float64, and the eager attention takes its softmax in float32.
        model.config._experts_implementation = "eager"
        model.set_attn_implementation(attention.NAME)
        plan, tokens = plan_of(model, "window 32"), tokens_of(length=77)
        assert list(plan.layers) == [1]
        expected = through_cache(model, plan, tokens, range(1, 77))
        assert gap(one_forward(model, plan, tokens, "stream"), expected) < TOLERANCE
        assert gap(one_forward(model, plan, tokens, "chunked", chunk=33), expected) > DIFFERENT


def test_keys_before_rope_where_only_some_layers_rotate(tiny_model):
    """SmolLM3 leaves the keys of some layers as they are; their codec sees the keys that are cached."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.15, "no_rope_layers": [1, 0]}
    model = tiny_model(SmolLM3Config(**sizes, pad_token_id=0), dtype=torch.float64)
    plan, tokens = plan_of(model, "pre-RoPE"), tokens_of(length=77)
    assert [plan.layers[i][0].frame is None for i in (0, 1)] == [False, True]
    expected = through_cache(model, plan, tokens, range(1, 77))
    assert gap(one_forward(model, plan, tokens, "stream"), expected) < TOLERANCE
    assert gap(one_forward(model, plan, tokens, "chunked", chunk=33), expected) > DIFFERENT


def test_sixteen_bit_keys_go_back_through_rope_in_float32(tiny_model):
    """The codec gets keys that were rotated back without rounding angles or results to 16 bits."""
    model = tiny_model(dtype=torch.bfloat16)
    plan = plan_of(model, "nf4, pre-RoPE")
    frame, codec = plan.layers[0][0].frame, plan.layers[0][0].codecs["key"]
    keys = torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    positions = torch.arange(300).unsqueeze(0)
    back = frame.enter(keys, positions)
    assert back.dtype == torch.float32
    exact = frame.enter(keys.double(), positions)
    assert (back - exact).abs().max() < 1e-5
    assert torch.equal(codec.encode(back).codes, codec.encode(exact.float()).codes)


def test_fp16_is_the_plain_model_to_the_bit(model):
    tokens = tokens_of(rows=2)
    with torch.inference_mode():
        plain = model(tokens).logits
    assert torch.equal(one_forward(model, plan_of(model, "fp16"), tokens, "stream"), plain)
    assert not torch.equal(one_forward(model, plan_of(model, "int8"), tokens, "stream"), plain)


@pytest.mark.parametrize("length", [1, 2, 31, 33])
def test_short_texts(model, length):
    plan, tokens = plan_of(model, "window 0"), tokens_of(length=length)
    expected = through_cache(model, plan, tokens, range(1, length))
    assert gap(one_forward(model, plan, tokens, "stream"), expected) < TOLERANCE


def test_narrow_tiles_change_nothing(model, monkeypatch):
    plan, tokens = plan_of(model, "by head"), tokens_of(seed=6)
    whole = one_forward(model, plan, tokens, "stream")
    monkeypatch.setitem(TILE_SCORES, "cpu", 1)
    assert gap(one_forward(model, plan, tokens, "stream"), whole) < TOLERANCE


def test_a_custom_mask_hides_keys(model):
    plan, tokens = plan_of(model, "window 0"), tokens_of(length=70)
    mask = torch.ones(70, 70, dtype=torch.bool).tril()
    mask[30:, 4] = False
    found = one_forward(model, plan, tokens, "stream", mask=mask[None, None])
    assert gap(found, one_forward(model, plan, tokens, "stream")) > DIFFERENT
    additive = torch.zeros(70, 70, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    assert gap(one_forward(model, plan, tokens, "stream", mask=additive[None, None]), found) < TOLERANCE


def test_it_works_beside_an_installed_cache(model):
    """An exported model has its packed cache installed; scoring must not use it, nor remove it."""
    plan, tokens = plan_of(model, "kivi2"), tokens_of(length=LONG)
    expected = one_forward(model, plan, tokens, "stream")
    runtime.install(model, plan)
    try:
        assert torch.equal(one_forward(model, plan, tokens, "stream"), expected)
        assert model.config._attn_implementation == "kvq"
        assert model(tokens[:, :3]).past_key_values is not None
    finally:
        runtime.uninstall(model)


def test_the_model_is_given_back_even_after_an_error(model):
    plan, tokens = plan_of(model, "int4"), tokens_of(length=20)
    plain = model(tokens).logits

    def fail_inside():
        with two_view(model, plan, "stream"):
            assert model.config._attn_implementation == NAME
            assert not torch.equal(model(tokens).logits, plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens).logits, plain)
    assert model(tokens).past_key_values is not None


def test_bad_settings_are_refused(model, tiny_model):
    plan, tokens = plan_of(model, "int4"), tokens_of(length=20)
    refused = {
        "Did you mean 'stream'": {"mode": "steam"},
        "chunk=0": {"mode": "chunked", "chunk": 0},
        "needs the context": {"mode": "prefill"},
        "belong to mode": {"mode": "stream", "contexts": 3},
        "does not count tokens": {"mode": "prefill", "contexts": [-1]},
        "for a batch of 1": {"mode": "prefill", "contexts": [3, 4]},
    }
    for message, settings in refused.items():
        with pytest.raises(DataError, match=message):
            one_forward(model, plan, tokens, **settings)
    with pytest.raises(CacheError, match="another model"):
        one_forward(tiny_model(layers=3), plan, tokens, "stream")
    cache = model(tokens).past_key_values
    with pytest.raises(CacheError, match="without a cache"), two_view(model, plan):
        model(tokens, past_key_values=cache)
