"""A block serves the thread that opened it, and later turns of a conversation are drafted for as first ones are."""

import copy
import logging
import threading

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, LogitsProcessor, LogitsProcessorList

import kvq
from kvq.cache import packed_layers

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tiny_model):
    """A model for SDPA and one whose attention is eager by default, with other masks."""
    if request.param == "llama":
        return tiny_model(layers=2, head_dim=32, dtype=torch.float64, seed=3)
    config = Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.3, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    return tiny_model(config)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))


class Baton(LogitsProcessor):
    """At every step, lets the other thread do one thing."""

    def __init__(self):
        self.mine, self.theirs = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, input_ids, scores):
        self.theirs.release()
        assert self.mine.acquire(timeout=60)
        return scores


def in_thread(model, ids, baton, found, **settings) -> threading.Thread:
    def work():
        try:
            processors = LogitsProcessorList([baton])
            found.append(
                model.generate(ids, logits_processor=processors, return_dict_in_generate=True, **GREEDY, **settings)
            )
        except Exception as error:
            found.append(error)
        finally:
            baton.theirs.release(1000)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_blocks_that_open_and_close_leave_another_thread_its_plain_cache(model):
    """While it generates, with blocks opened, used and closed between its steps. Control: the block's own thread has
    packed caches."""
    ids, found, baton = tokens(90), [], Baton()
    plain = model.generate(ids, **GREEDY)
    thread = in_thread(model, ids, baton, found)
    block, own = None, []
    for step in range(GREEDY["max_new_tokens"]):
        assert baton.theirs.acquire(timeout=60)
        if step % 3 == 0:
            block = kvq.quantized_cache(model, "int4")
            block.__enter__()
        elif step % 3 == 1:
            own.append(model.generate(ids, return_dict_in_generate=True, **GREEDY))
        else:
            block.__exit__(None, None, None)
        baton.mine.release()
    thread.join()
    (result,) = found
    assert not isinstance(result, Exception), result
    assert torch.equal(result.sequences, plain)
    assert not packed_layers(result.past_key_values)
    assert all(torch.equal(one.sequences, own[0].sequences) for one in own)
    assert all(len(packed_layers(one.past_key_values)) == 2 for one in own)


def test_a_call_from_another_thread_is_told_and_a_cache_of_the_block_serves_it(model, monkeypatch):
    ids, messages = tokens(90), []
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(type(logger), "warning_once", lambda self, message: messages.append(message), raising=False)
    plain = model.generate(ids, **GREEDY)
    with kvq.quantized_cache(model, "int4"):
        own = model.generate(ids, **GREEDY)
        assert not messages
        for settings, want in (({}, plain), ({"past_key_values": kvq.new_cache(model)}, own)):
            found, baton = [], Baton()
            baton.mine.release(1000)
            in_thread(model, ids, baton, found, **settings).join()
            assert torch.equal(found[0].sequences, want), settings
    assert any("another thread" in message and "'int4'" in message for message in messages)


def test_a_block_waits_for_a_forward_of_another_thread(model):
    """Its masks are those of the attention that the block installed."""
    ids, inside, go, found = tokens(30), threading.Event(), threading.Event(), []

    def pause(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go.wait(60)

    with torch.no_grad():
        want = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    layer = model.model.layers[0].register_forward_pre_hook(pause)

    def work():
        with torch.no_grad():
            found.append(model(ids).logits)

    block = kvq.quantized_cache(model, "int4")
    block.__enter__()
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    threading.Timer(0.3, go.set).start()
    block.__exit__(None, None, None)
    assert go.is_set()
    thread.join()
    layer.remove()
    assert torch.allclose(found[0], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("recipe", ["int4", "kivi2"])
@pytest.mark.parametrize("draft", ["lookup", "assistant"])
def test_drafts_on_later_turns_give_the_greedy_text(tiny_model, recipe, draft):
    """Three turns on one cache; a turn's prompt is one chunk whether or not the cache can be cropped."""
    model = tiny_model(layers=2, head_dim=32, dtype=torch.float64, seed=3)
    extra = {"prompt_lookup_num_tokens": 6} if draft == "lookup" else {"assistant_model": copy.deepcopy(model)}
    found = {}
    for name, settings in (("greedy", {}), ("draft", extra)):
        with kvq.quantized_cache(model, recipe):
            cache, ids = kvq.new_cache(model), tokens(0)
            for turn in range(3):
                ids = torch.cat([ids, tokens(40, seed=turn).repeat(1, 4)], dim=1)
                ids = model.generate(ids, past_key_values=cache, **GREEDY, **settings)
        found[name] = ids
    assert torch.equal(found["draft"], found["greedy"])
