"""The evaluation law on exports: what one forward scores is what the model from ``from_pretrained`` decodes.

In float64, so that nothing but a wrong cache can make a difference, and once in bfloat16.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvq.eval.continuations import Question, score_continuations
from kvq.eval.evaluated_model import load_evaluated
from kvq.eval.likelihood import score_windows
from kvq.eval.perplexity import cut_windows
from kvq.exporting.exporter import export
from kvq.recipe import load_recipe

TOLERANCE, DIFFERENT = 1e-9, 1e-4
LENGTH = 201
ROTATED = {"transforms.key": [{"kind": "hadamard"}], "transforms.value": [{"kind": "hadamard"}]}
RECIPES = {
    "kivi2": load_recipe("kivi2"),
    "int4": load_recipe("int4"),
    "rotated": load_recipe("int4").override(ROTATED | {"tokens.sinks": 3}),
    "pre-RoPE": load_recipe("kivi2").override({"key.placement": "pre_rope", "tokens.window": 32}),
    "page": load_recipe("kivi2").override({"key.placement": "page", "tokens.window": 64, "tokens.sinks": 3}),
    "turboquant3": load_recipe("turboquant3"),
}


@pytest.fixture(params=RECIPES)
def folder(request, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(heads=2, kv_heads=1, head_dim=64, dtype=torch.float64)
    export(source, RECIPES[request.param], tmp_path / "export")
    return tmp_path / "export"


def tokens(seed=0, length=LENGTH):
    return torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def decoded(model, ids):
    """Log-probabilities [T, V] of feeding the tokens one by one, with whatever cache the model makes for itself."""
    cache, rows = None, []
    for token in ids:
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, 0])
    return torch.stack(rows).log_softmax(-1)


def test_one_forward_scores_what_the_exported_model_decodes(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    evaluated = load_evaluated(folder, dtype=torch.float64)
    windows = cut_windows(tokens(), LENGTH)
    (found,) = score_windows(evaluated.model, {"own": evaluated.plan}, windows, "stream")
    score = found["own"]
    logprobs = decoded(model, tokens()[:-1])
    targets = torch.tensor(tokens()[1:]).unsqueeze(1)
    losses = -logprobs.gather(1, targets).squeeze(1)
    assert float((score.losses - losses).abs().max()) < TOLERANCE
    # It is no plain forward, which is what the baseline's losses are.
    assert float((score.baseline_losses - losses).abs().max()) > DIFFERENT


@pytest.mark.parametrize("folder", ["kivi2", "int4"], indirect=True)
def test_one_forward_scores_what_decodes_in_bfloat16(folder):
    """As far as the model's own rounding allows: a forward over many tokens rounds otherwise than one over one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    evaluated = load_evaluated(folder, dtype=torch.bfloat16)
    (found,) = score_windows(evaluated.model, {"own": evaluated.plan}, cut_windows(tokens(), LENGTH), "stream")
    logprobs = decoded(model, tokens()[:-1]).float()
    losses = -logprobs.gather(1, torch.tensor(tokens()[1:]).unsqueeze(1)).squeeze(1)
    assert float((found["own"].losses - losses).abs().mean()) < 0.02
    assert float((found["own"].baseline_losses - losses).abs().mean()) > 0.2


def test_continuations_score_what_the_exported_model_decodes(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    evaluated = load_evaluated(folder, dtype=torch.float64)
    context, continuations = tokens(1, 180), [tokens(2, 1), tokens(3, 9), tokens(4, 5)]
    question = Question(context=tuple(context), continuations=tuple(map(tuple, continuations)))
    (scores,) = score_continuations(evaluated.model, evaluated.plan, [question], "stream")
    for own, found in zip(continuations, scores):
        logprobs = decoded(model, [*context, *own[:-1]])[len(context) - 1 :]
        expected = logprobs.gather(1, torch.tensor(own).unsqueeze(1)).squeeze(1)
        assert float((found.logprobs - expected).abs().max()) < TOLERANCE
        assert found.greedy.tolist() == (logprobs.argmax(-1) == torch.tensor(own)).tolist()
        assert found.packed == len(own)
