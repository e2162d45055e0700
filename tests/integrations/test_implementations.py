"""What attends can be asked for: the Triton kernels (in their interpreter), the compiled CPU kernel, the reference."""

import copy

import pytest
import torch

from kvq.cache import chunk, implementations
from kvq.errors import KernelError
from kvq.integrations.runtime import new_cache, quantized_cache
from kvq.kernels.dispatch import interpreted, why_no_triton
from kvq.recipe import Recipe, load_recipe, parse_recipe

# With TRITON_INTERPRET=0 all of this runs on a GPU.
DEVICE = "cpu" if interpreted() or not torch.cuda.is_available() else "cuda"
NO_TRITON = why_no_triton(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


def tiers(bits: list[int], **settings) -> Recipe:
    """Tiers of keys beside the values of ``klt2``, without the transforms that need statistics."""
    value = load_recipe("klt2").to_dict()["value"]
    key = {"codec": "tiers", "bits": bits, **settings}
    data = {"name": "tiers", "key": key, "value": value, "tokens": {"sinks": 4, "window": 0}}
    return parse_recipe(data, source="tiers")


RECIPES = {
    "kivi2": load_recipe("kivi2").override({"tokens.window": 32}),
    "int4": load_recipe("int4").override({"tokens.sinks": 4, "tokens.window": 32}),
    "fp8": load_recipe("fp8").override({"key.scale": "unit", "value.scale": "unit"}),
    "nf4": load_recipe("nf4"),
    "nvfp4": load_recipe("nvfp4"),
    "rotated": load_recipe("turboquant4"),
    "tiers": tiers([8, 4], group=64, meta="range8"),
    "balanced": load_recipe("balance2").override({"transforms.key": [], "transforms.value": [], "tokens.window": 32}),
    "token norms": load_recipe("tokennorm2").override({"tokens.window": 32}),
    "shared scales": load_recipe("zeroquant8"),
    "short tiers": tiers([3, 0], group=32, meta="zero8"),
    "pre-RoPE": load_recipe("kivi4").override({"key.placement": "pre_rope", "tokens.window": 32}),
    "page": load_recipe("kivi4").override({"key.placement": "page", "tokens.window": 64, "tokens.sinks": 1}),
    "outliers": load_recipe("gear4").override({"tokens.window": 64}),
}
# What is decoded to fp16 pages first; all else the kernels read as it lies in pages.
TWO_PASSES = {"short tiers", "pre-RoPE", "outliers"}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=1, heads=2, kv_heads=1, head_dim=32).to(DEVICE)


def logits(model, recipe, impl: str, ids: torch.Tensor, steps: list[int], mask=None):
    """Logits of steps of so many tokens after a prompt, and the cache."""
    with quantized_cache(model, recipe, impl=impl), torch.no_grad():
        cache = new_cache(model)
        prompt = ids.shape[1] - sum(steps)
        at, found = prompt, []
        model(ids[:, :prompt], past_key_values=cache, attention_mask=None if mask is None else mask[:, :prompt])
        for new in steps:
            own = None if mask is None else mask[:, : at + new]
            found.append(model(ids[:, at : at + new], past_key_values=cache, attention_mask=own).logits)
            at += new
        return torch.cat(found, dim=1), cache


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("name", RECIPES)
def test_triton_gives_the_logits_of_the_reference(model, name):
    """A step of one token and one of three, a left-padded batch, past the point where keys and values are packed."""
    ids, mask = tokens(2, 104), torch.ones(2, 104, dtype=torch.long, device=DEVICE)
    mask[1, :21] = 0
    want, _ = logits(model, RECIPES[name], "reference", ids, [1, 3], mask)
    found, cache = logits(model, RECIPES[name], "triton", ids, [1, 3], mask)
    (ran,) = implementations(cache)
    assert ran.startswith("triton (asked for")
    assert ("decoded to fp16 first" in ran) == (name in TWO_PASSES)
    assert (found - want).abs().max() < 4e-3 * want.abs().max()
    exact, _ = logits(model, load_recipe("fp16"), "auto", ids, [1, 3], mask)
    assert (exact - want).abs().max() > 4 * (found - want).abs().max()


@needs_triton
@pytest.mark.parametrize("name", ["kivi2", "tiers", "short tiers", "outliers", "pre-RoPE"])
def test_chunks_through_triton_give_the_logits_of_the_reference(model, name, monkeypatch):
    """Chunks of 37 tokens in a batch of rows of different lengths: pages are unpacked 64 tokens at a time."""
    monkeypatch.setattr(chunk, "SCRATCH_TOKENS", 64)
    ids, mask = tokens(2, 240), torch.ones(2, 240, dtype=torch.long, device=DEVICE)
    mask[1, :21] = 0
    want, _ = logits(model, RECIPES[name], "reference", ids, [37, 1, 37], mask)
    found, cache = logits(model, RECIPES[name], "triton", ids, [37, 1, 37], mask)
    assert all(ran.startswith("triton (asked for") for ran in implementations(cache))
    assert (found - want).abs().max() < 4e-3 * want.abs().max()
    exact, _ = logits(model, load_recipe("fp16"), "auto", ids, [37, 1, 37], mask)
    assert (exact - want).abs().max() > 4 * (found - want).abs().max()


@needs_triton
def test_generate_through_triton_gives_the_tokens_of_the_reference(model):
    ids, found = tokens(1, 90), {}
    for impl in ("triton", "reference"):
        with quantized_cache(model, RECIPES["kivi2"], impl=impl):
            found[impl] = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        assert all(ran.startswith(impl) for ran in implementations(found[impl].past_key_values))
    assert torch.equal(found["triton"].sequences, found["reference"].sequences)


@needs_triton
def test_beams_drafts_and_copies_through_triton(model):
    ids, found = tokens(1, 90), {}
    for impl in ("triton", "reference"):
        with quantized_cache(model, RECIPES["int4"], impl=impl), torch.no_grad():
            settings = {"max_new_tokens": 5, "do_sample": False}
            beams = model.generate(ids, num_beams=2, **settings)
            draft = model.generate(ids, prompt_lookup_num_tokens=3, **settings)
            cache = new_cache(model)
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
            twin = copy.deepcopy(cache)
            own = [model(ids[:, 5:6], past_key_values=c).logits for c in (cache, twin)]
            assert torch.equal(*own)
        found[impl] = beams, draft
    for left, right in zip(found["triton"], found["reference"]):
        assert torch.equal(left, right)


@needs_triton
def test_softcap_and_sink_logits_reach_the_kernel(tiny_model):
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        initializer_range=0.15,
    )
    model = tiny_model(config).to(DEVICE)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=1.0)
    want, _ = logits(model, RECIPES["int4"], "reference", tokens(1, 80), [1])
    found, cache = logits(model, RECIPES["int4"], "triton", tokens(1, 80), [1])
    assert [ran.split(" ")[0] for ran in implementations(cache)] == ["triton"]
    assert (found - want).abs().max() < 4e-3 * want.abs().max()


@needs_triton
def test_asking_for_one_never_gives_another(model):
    ids = tokens(1, 60)
    with pytest.raises(KernelError, match=r"one query token at a time|runs on the CPU"):
        logits(model, RECIPES["int4"], "cpp", ids, [2])
    with pytest.raises(KernelError, match="not an implementation"):
        logits(model, RECIPES["int4"], "cuda", ids, [1])
    padded = torch.ones(1, 60, dtype=torch.long, device=DEVICE)
    padded[:, -3] = 0
    with pytest.raises(KernelError, match=r"pads among the new tokens|a mask other than"):
        logits(model, RECIPES["int4"], "triton", ids, [17], padded)
    _, cache = logits(model, RECIPES["int4"], "auto", ids, [2, 1])
    wanted = ("triton (Triton",) if DEVICE == "cuda" else ("cpp (tensors", "reference (tensors")
    assert all(ran.startswith(wanted) for ran in implementations(cache))


@needs_triton
def test_a_mask_of_its_own_is_obeyed_by_the_reference_and_refused_by_triton(model):
    """A four-dimensional mask may hide anything; the kernels know causality only."""
    ids = tokens(1, 60)
    hidden = torch.ones(1, 1, 1, 60, dtype=torch.bool, device=DEVICE)
    hidden[..., 10:50] = False
    found = {}
    for impl in ("auto", "triton"):
        with quantized_cache(model, RECIPES["int4"], impl=impl), torch.no_grad():
            cache = new_cache(model)
            model(ids[:, :59], past_key_values=cache)
            step = {
                "past_key_values": cache,
                "attention_mask": hidden,
                "position_ids": torch.tensor([[59]], device=DEVICE),
            }
            if impl == "triton":
                with pytest.raises(KernelError, match="a mask other than the causal one"):
                    model(ids[:, 59:], **step)
                continue
            found["masked"] = model(ids[:, 59:], **step).logits
    found["plain"], _ = logits(model, RECIPES["int4"], "auto", ids, [1])
    assert (found["masked"] - found["plain"]).abs().max() > 1e-2
