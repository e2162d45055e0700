"""What users do around a packed cache that once gave wrong numbers, or a dead end, without a word."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import kvq
from kvq.cache import PackedLayer
from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS
from kvq.errors import CacheError, UnsupportedModelError

TOKENS = torch.arange(3, 84)[None] % 100
TURN = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def made():
    def make(kind: str, **settings):
        fields = {
            "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.15,
        }  # fmt: skip
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **fields | settings)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture
def warnings(monkeypatch):
    """What the package warned of, each once."""
    found = []
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(type(logger), "warning_once", lambda self, message: found.append(message), raising=False)
    return found


def stepped(model, cache) -> torch.Tensor:
    """Logits of the last 11 tokens, each read from a cache."""
    with torch.no_grad():
        model(TOKENS[:, :70], past_key_values=cache)
        rest = [model(TOKENS[:, n : n + 1], past_key_values=cache).logits for n in range(70, TOKENS.shape[1])]
    return torch.cat(rest, dim=1)


def test_values_that_a_model_changes_after_the_cache_are_obeyed(made, warnings):
    """DiffLlama splits and repeats values between the cache and attention: reading those of the pages instead had an
    error of 0.4. Control: a model that changes nothing does not lose its way to the pages."""
    for kind, dequantizes in (("diffllama", True), ("llama", False)):
        model = made(kind)
        want = stepped(model, DynamicCache(config=model.config))
        warnings.clear()
        with kvq.quantized_cache(model, "int8"):
            cache = kvq.new_cache(model)
            found = stepped(model, cache)
        assert isinstance(cache.layers[0], PackedLayer)
        assert float((found - want).norm() / want.norm()) < 0.03
        assert any("changes values" in message for message in warnings) == dequantizes


def test_a_crop_of_everything_leaves_an_empty_cache(made):
    """As transformers has it: more than there is, is all there is; the cache begins anew."""
    model = made("llama")
    with kvq.quantized_cache(model, "int4"):
        cache = kvq.new_cache(model)
        want = stepped(model, cache)
        cache.crop(-TOKENS.shape[1] - 5)
        assert cache.get_seq_length() == 0
        assert torch.equal(stepped(model, cache), want)


def test_bytes_of_layers_that_hold_states(made):
    """Of layers with linear attention, which have no keys: every tensor counts, once."""
    kind = {"num_hidden_layers": 4, "num_experts": 0, "hidden_size": 64, "intermediate_size": 64}
    model = made("qwen3_next", **kind)
    with torch.no_grad(), kvq.quantized_cache(model, "int4"):
        cache = kvq.new_cache(model)
        model(TOKENS, past_key_values=cache)
    packed = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    others = [layer for layer in cache.layers if not isinstance(layer, PackedLayer)]
    assert packed
    assert others
    states = [part for layer in others for kept in vars(layer).values() for part in parts(kept)]
    assert len(states) >= len(others)
    assert kvq.cache_nbytes(cache) == sum(layer.nbytes for layer in packed) + sum(x.nbytes for x in states)


def parts(kept):
    if isinstance(kept, dict):
        kept = list(kept.values())
    if isinstance(kept, list | tuple):
        return [x for part in kept for x in parts(part)]
    return [kept] if isinstance(kept, torch.Tensor) else []


@pytest.mark.parametrize("settings", [{"past_key_values": True}, {"cache_implementation": "static"}])
def test_a_cache_that_is_not_quantized_is_named(made, warnings, settings):
    model = made("llama")
    if "past_key_values" in settings:
        settings = {"past_key_values": DynamicCache(config=model.config)}
    with kvq.quantized_cache(model, "int4"):
        model.generate(TOKENS, max_new_tokens=2, do_sample=False)
        assert not any("not quantized" in message for message in warnings)
        model.generate(TOKENS, max_new_tokens=2, do_sample=False, **settings)
    assert any("Cache was given" in message and "'int4'" in message for message in warnings)


def test_a_cache_that_the_checkpoint_names_gives_way_to_the_packed_one(made, warnings):
    """In its generation config. Control: another wish, of the call, is granted and named."""
    model = made("llama")
    with kvq.quantized_cache(model, "int4"):
        want = model.generate(TOKENS, **TURN)
        model.generation_config.cache_implementation = "static"
        found = model.generate(TOKENS, **TURN)
        assert isinstance(found.past_key_values.layers[0], PackedLayer)
        assert torch.equal(found.sequences, want.sequences)
        assert any("names cache 'static'" in message and "'int4'" in message for message in warnings)
        warnings.clear()
        own = model.generate(TOKENS, cache_implementation="sliding_window", **TURN)
        assert not isinstance(own.past_key_values.layers[0], PackedLayer)
        assert any("Cache was given" in message for message in warnings)
    assert model.generation_config.cache_implementation == "static"


def test_generating_without_a_cache_is_named(made, warnings):
    model = made("llama")
    with kvq.quantized_cache(model, "int4"):
        model.generate(TOKENS, use_cache=False, **TURN)
    assert any("use_cache=False" in message and "'int4'" in message for message in warnings)


def test_scores_of_lm_evals_own_model_are_refused(made):
    """They come from one forward. Controls: it may generate, and others may forward once."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = made("llama")
    scorer = object.__new__(huggingface.HFLM)
    scorer._model, scorer.backend, scorer.mixed_precision_dtype, scorer._device = model, "causal", None, model.device
    scorer.tokenizer = SimpleNamespace(pad_token_id=0)
    scorer.AUTO_MODEL_CLASS = AutoModelForCausalLM
    plain = scorer._model_call(TOKENS)
    with kvq.quantized_cache(model, "int4"):
        with pytest.raises(CacheError, match="kvq eval MODEL --tasks"):
            scorer._model_call(TOKENS)
        with torch.no_grad():
            assert torch.allclose(model(TOKENS).logits, plain, atol=1e-5)
        assert scorer._model_generate(TOKENS, max_length=TOKENS.shape[1] + 2, stop=[]).shape[1] == TOKENS.shape[1] + 2


@pytest.mark.parametrize("way", ["generate_batch", "paged", "kept manager"])
def test_continuous_batching_is_refused(made, way):
    """Its cache is its own. Control: outside the block the model is as it was."""
    model = made("llama")
    if way == "kept manager":
        model._cached_continuous_batching_manager = model.init_continuous_batching()
    ways = {
        "generate_batch": lambda: model.generate_batch(TOKENS.tolist()),
        "paged": lambda: model.generate(input_ids=TOKENS, cache_implementation="paged", max_new_tokens=2),
        "kept manager": lambda: model.generate_batch(TOKENS.tolist(), persistent_manager=True),
    }
    with kvq.quantized_cache(model, "int4"), pytest.raises(CacheError, match="continuous batching"):
        ways[way]()
    assert "init_continuous_batching" not in vars(model)


def test_steps_with_gradients_on(made):
    """A decode loop without no_grad gives the numbers of one with it."""
    model = made("llama")
    with kvq.quantized_cache(model, "int4"):
        want = stepped(model, kvq.new_cache(model))
        cache = kvq.new_cache(model)
        model(TOKENS[:, :70], past_key_values=cache)
        found = [model(TOKENS[:, n : n + 1], past_key_values=cache).logits for n in range(70, TOKENS.shape[1])]
    assert torch.equal(torch.cat(found, dim=1), want)


def second_turn(model, found):
    ids = torch.cat([found.sequences, TOKENS[:, :9]], dim=1)
    return model.generate(ids, past_key_values=found.past_key_values, **TURN)


@pytest.mark.parametrize("case", ["after the block", "eager", "sdpa", "another model"])
def test_a_cache_that_outlives_its_attention_says_so_and_never_goes_on_wrong(made, case):
    """A second turn without kvq's attention is refused by name; the cache, of which one layer may have got the turn's
    tokens, is then either whole or refused for good. Control: in the block it goes on."""
    model, other = made("llama"), made("llama", initializer_range=0.1)
    with kvq.quantized_cache(model, "int4"):
        found = model.generate(TOKENS, **TURN)
        whole = second_turn(model, model.generate(TOKENS, **TURN)).sequences
    if case in ("eager", "sdpa"):
        with kvq.quantized_cache(model, "int4"):
            model.set_attn_implementation(case)
            with pytest.raises(CacheError, match="no other can"):
                second_turn(model, found)
    else:
        with pytest.raises(CacheError, match="no other can"):
            second_turn(model if case == "after the block" else other, found)
    model.set_attn_implementation("sdpa")
    with kvq.quantized_cache(model, "int4"):
        if case in ("eager", "sdpa"):
            assert torch.equal(second_turn(model, found).sequences, whole)
        else:
            with pytest.raises(CacheError, match="of a forward that failed"):
                second_turn(model, found)
            found.past_key_values.reset()
            assert torch.equal(second_turn(model, model.generate(TOKENS, **TURN)).sequences, whole)


def test_a_cache_that_was_never_read_by_pages_serves_any_attention(made):
    """It gives dequantized tensors, outside a block too, and then goes on inside one."""
    model = made("llama")
    with kvq.quantized_cache(model, "int4"):
        caches = kvq.new_cache(model), kvq.new_cache(model)
        want = stepped(model, caches[0])
    outside = stepped(model, caches[1])
    assert caches[1].layers[0].length == TOKENS.shape[1]
    assert torch.allclose(outside, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"num_key_value_heads": 4}, {"head_dim": 64}, {"num_hidden_layers": 3}], ids=lambda x: next(iter(x))
)
def test_a_cache_of_another_model_is_refused_with_a_sentence(made, settings):
    """What cannot hold the tokens: another number of heads or layers, another head_dim; before anything is stored."""
    model, other = made("llama"), made("llama", **settings)
    with kvq.quantized_cache(model, "int4"):
        found = model.generate(TOKENS, **TURN)
        whole = second_turn(model, model.generate(TOKENS, **TURN)).sequences
    with kvq.quantized_cache(other, "int4"), pytest.raises(CacheError, match=r"kvq\.new_cache\(model\)"):
        second_turn(other, found)
    with kvq.quantized_cache(model, "int4"):
        assert torch.equal(second_turn(model, found).sequences, whole)


def test_a_model_drafts_with_its_own_first_layers(made):
    """``assistant_early_exit`` builds a cache of fewer layers than the plan has, and leaves the model whole."""
    model = made("llama", num_hidden_layers=4)
    greedy = {"max_new_tokens": 9, "do_sample": False}
    with kvq.quantized_cache(model, "int8"):
        want = model.generate(TOKENS, **greedy)
        assert torch.equal(model.generate(TOKENS, assistant_early_exit=2, **greedy), want)
        assert model.config.num_hidden_layers == 4
        assert torch.equal(model.generate(TOKENS, **greedy), want)
        # Control: a cache of another model is refused as before.
        small = made("llama")
        with kvq.quantized_cache(small, "int8"):
            short = kvq.new_cache(small)
        with pytest.raises(CacheError, match="a cache of 2 layers was given to a model that needs 4"):
            model(TOKENS, past_key_values=short)


@pytest.mark.parametrize(
    "index", [[1], (1, 0), [True, False], range(1), slice(1, 2), torch.tensor([1, 1, 0]), torch.tensor([False, True])]
)
@pytest.mark.parametrize("recipe", ["kivi2", "klt2"])
def test_rows_are_selected_by_whatever_selects_them_in_a_plain_cache(made, index, recipe):
    model, ids = made("llama", head_dim=64), torch.arange(3, 303).view(2, 150) % 100
    stats = None if recipe == "kivi2" else collect(model, ids[:, :64], needs=ALL_NEEDS)
    with kvq.quantized_cache(model, recipe, stats=stats), torch.no_grad():
        cache, other = kvq.new_cache(model), kvq.new_cache(model)
        model(ids, past_key_values=cache)
        cache.batch_select_indices(index)
        model(ids[index if not isinstance(index, range) else list(index), ...], past_key_values=other)
        assert torch.equal(cache.layers[1].keys, other.layers[1].keys)


@pytest.mark.parametrize("recipe", ["int8", "kivi4", "klt4"])
def test_a_crop_takes_pads_away_as_they_came(made, recipe):
    """Rows lose as many real tokens as the removed columns hold, and go on as if these had never come."""
    model, ids = made("llama", head_dim=64), torch.arange(3, 163).view(2, 80) % 100
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    mask[1, :3] = 0
    token = torch.tensor([[7], [9]])
    stats = collect(model, ids, needs=ALL_NEEDS) if recipe == "klt4" else None
    found = []
    with kvq.quantized_cache(model, recipe, stats=stats), torch.no_grad():
        for columns, crop in ((80, 8), (72, 0)):
            cache = kvq.new_cache(model)
            cache.activate_past_recording()
            model(ids[:, :columns], attention_mask=mask[:, :columns], past_key_values=cache)
            cache.crop(-crop)
            assert cache.get_seq_length() == 72
            more = torch.cat([mask[:, :72], torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            found.append(model(token, attention_mask=more, past_key_values=cache).logits)
    assert torch.allclose(*found, atol=1e-5)


def test_an_export_is_trained_and_cast_as_any_model(tiny_checkpoint, tmp_path):
    """Its weights are not quantized: ``Trainer`` takes it, and ``half`` and ``float`` change its weights."""
    from transformers.trainer_utils import validate_quantization_for_training

    folder = tmp_path / "export"
    kvq.export(tiny_checkpoint(layers=2), folder, recipe="int4")
    model = kvq.load(folder)
    validate_quantization_for_training(model)
    assert model.half().dtype == torch.float16
    copied = copy.deepcopy(model)
    assert copied.float().dtype == torch.float32
    assert model.dtype == torch.float16
    assert model.float().generate(TOKENS % 100, max_new_tokens=2, do_sample=False).shape == (1, TOKENS.shape[1] + 2)


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("gemma2", {}), ("gpt_oss", EXPERTS)])
def test_eager_attention_that_is_asked_for_is_given(made, kind, more, tmp_path, tiny_tokenizer):
    """At load and inside a block, also where it is the model's own default; the error about weights says how."""
    model = made(kind, **more)
    with kvq.quantized_cache(model, "int8"), torch.no_grad():
        assert model.config._attn_implementation == "kvq"
        cache = kvq.new_cache(model)
        model(TOKENS[:, :70], past_key_values=cache)
        want = model(TOKENS[:, 70:], past_key_values=cache).logits
        with pytest.raises(UnsupportedModelError, match=r"model.set_attn_implementation\('eager'\)"):
            model(TOKENS, output_attentions=True)
        model.set_attn_implementation("eager")
        cache = kvq.new_cache(model)
        model(TOKENS[:, :70], past_key_values=cache)
        found = model(TOKENS[:, 70:], past_key_values=cache, output_attentions=True)
        assert isinstance(cache.layers[-1], PackedLayer)
        assert found.attentions[-1].shape[-1] == TOKENS.shape[1]
        # Of an error of 0.1 by the codes, what a code that falls to the other side makes.
        assert torch.allclose(found.logits, want, atol=0.02)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    kvq.export(tmp_path / "model", tmp_path / "export", recipe="int8")
    for wanted in ("eager", None):
        loaded = kvq.load(tmp_path / "export", attn_implementation=wanted)
        assert loaded.config._attn_implementation == loaded.kvq.attention == (wanted or "kvq")
