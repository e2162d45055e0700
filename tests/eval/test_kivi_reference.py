"""KIVI written from the paper (arXiv 2402.02750, section 3 and algorithm 1), independent of kvq, beside kvq's stream.

Keys are quantized per channel in groups of 32 tokens, values per token in groups of 32 channels, with

    scale = (max - min) / (2^bits - 1),   code = round((x - min) / scale),   x' = code * scale + min

scale and min kept in fp16.

The last R = 128 tokens stay exact: keys are quantized R at a time, as soon as R exact ones are there, values one by one
as they leave the window. Quantization follows the step's attention, so a step sees what the steps before it stored.
"""

import math

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from kvq.cache import make_plan
from kvq.eval.likelihood import score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.models.describe import describe
from kvq.recipe import load_recipe

GROUP, WINDOW = 32, 128


def quantized(numbers: np.ndarray, bits: int) -> np.ndarray:
    """One group of numbers, there and back."""
    low = np.float32(np.float16(numbers.min()))
    scale = np.float32(np.float16((numbers.max() - numbers.min()) / (2**bits - 1)))
    if scale == 0:
        return np.full_like(numbers, low)
    codes = np.clip(np.round((numbers - low) / scale), 0, 2**bits - 1)
    return codes * scale + low


def quantized_keys(keys: np.ndarray, bits: int) -> np.ndarray:
    """keys [T, D], T a multiple of GROUP."""
    out = np.empty_like(keys)
    for start in range(0, len(keys), GROUP):
        for channel in range(keys.shape[1]):
            out[start : start + GROUP, channel] = quantized(keys[start : start + GROUP, channel], bits)
    return out


def quantized_value(value: np.ndarray, bits: int) -> np.ndarray:
    """One token's value [D]."""
    return np.concatenate([quantized(part, bits) for part in np.split(value, len(value) // GROUP)])


def kivi_head(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scaling: float, bits: int) -> np.ndarray:
    """Attention of one KV head, token by token: queries [G, T, D], keys and values [T, D]; returns [G, T, D]."""
    stored_keys, exact_keys = np.zeros((0, keys.shape[1]), np.float32), []
    stored_values, exact_values = np.zeros((0, values.shape[1]), np.float32), []
    out = np.empty_like(queries)
    for step in range(len(keys)):
        exact_keys.append(keys[step])
        exact_values.append(values[step])
        scores = queries[:, step] @ np.concatenate([stored_keys, exact_keys]).T * scaling
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, step] = weights @ np.concatenate([stored_values, exact_values])
        if len(exact_keys) == WINDOW:
            stored_keys = np.concatenate([stored_keys, quantized_keys(np.stack(exact_keys), bits)])
            exact_keys = []
        if len(exact_values) > WINDOW:
            oldest = quantized_value(exact_values.pop(0), bits)
            stored_values = np.concatenate([stored_values, oldest[None]])
    return out


def kivi_attention(bits: int):
    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        rows = []
        for q, k, v in zip(query.numpy(), key.numpy(), value.numpy()):
            shared = len(q) // len(k)
            heads = [kivi_head(q[h * shared : (h + 1) * shared], k[h], v[h], scaling, bits) for h in range(len(k))]
            rows.append(np.concatenate(heads))
        return torch.from_numpy(np.stack(rows)).transpose(1, 2).contiguous(), None

    return attend


def reference_losses(model, tokens: torch.Tensor, bits: int) -> torch.Tensor:
    name = f"kivi_reference_{bits}"
    AttentionInterface.register(name, kivi_attention(bits))
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    try:
        with torch.inference_mode():
            logits = model(tokens.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    finally:
        model.set_attn_implementation("sdpa")
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


def both_perplexities(model, ids: list[int], bits: int) -> tuple[float, float, float]:
    """(kvq's stream, the reference's, the exact model's) on one window of all ids."""
    plan = make_plan(load_recipe(f"kivi{bits}"), describe(model.config))
    windows = cut_windows(ids, len(ids))
    (scores,) = score_windows(model, {"kivi": plan}, windows, "stream")
    found = perplexity([scores["kivi"]])
    reference = reference_losses(model, windows.tokens[0], bits)
    return found.value, math.exp(float(reference.double().mean())), found.baseline


@pytest.mark.parametrize("bits", [2, 4])
def test_the_tiny_model_agrees(tiny_model, bits):
    model = tiny_model(heads=4, kv_heads=2, head_dim=32)
    ids = torch.randint(3, 120, (451,), generator=torch.Generator().manual_seed(bits)).tolist()
    own, reference, exact = both_perplexities(model, ids, bits)
    assert own == pytest.approx(reference, rel=2e-3)
    # The quantization must show, or the agreement would say nothing.
    assert abs(own / exact - 1) > 1e-4
    assert abs(own - reference) < abs(own - exact) / 10


@pytest.mark.model
@pytest.mark.parametrize("bits", [2, 4])
def test_the_real_model_agrees(builtin_dir, bits):
    from kvq.calib.data import builtin_text
    from kvq.models.resolve import load_model, load_tokenizer

    model = load_model(builtin_dir, device="cpu")
    text = builtin_text("evaluation")[:6000]
    ids = load_tokenizer(builtin_dir)(text, add_special_tokens=False)["input_ids"][:700]
    own, reference, exact = both_perplexities(model, ids, bits)
    assert own == pytest.approx(reference, rel=2e-3)
    assert own > exact
