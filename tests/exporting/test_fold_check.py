"""The check before an export: what it finds is the same by tensor and loaded whole, and every wrong fold shows."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.errors import CheckpointError
from kvq.exporting import fold_check
from kvq.exporting.fold_check import check_folds
from kvq.exporting.folding import plan_of_folds
from kvq.exporting.versions import CannotStream
from kvq.models.describe import describe
from kvq.models.resolve import load_model
from kvq.recipe import parse_recipe
from kvq.transforms.fold import Columns, Gamma, Rows

CODEC = {"codec": "affine", "bits": 4, "axis": "token", "group": "head"}
TRANSFORMS = {"key": [{"kind": "align"}, {"kind": "smooth"}], "value": [{"kind": "hadamard"}]}
NORMED = {"key": [{"kind": "smooth"}], "value": [{"kind": "hadamard"}]}


@pytest.fixture
def planned(tmp_path):
    """Factory ``planned(family) -> (folder, operations)``."""

    def make(family: str):
        config = AutoConfig.for_model(
            family, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1 if family == "gemma3_text" else 2, head_dim=16, pad_token_id=0,
            max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        if family == "gemma3_text":
            config.layer_types = ["full_attention", "full_attention"]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / family)
        model = load_model(tmp_path / family, dtype=torch.float32)
        transforms = NORMED if family == "gemma3_text" else TRANSFORMS
        recipe = parse_recipe({"name": "mine", "key": CODEC, "value": CODEC, "transforms": transforms}, source="mine")
        spec = describe(model.config)
        windows = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
        stats = collect(model, windows, needs=needs_of(recipe, spec))
        plan = make_plan(recipe, spec, fit_artefacts(recipe, spec, stats, tmp_path / family))
        return tmp_path / family, dict(plan_of_folds(plan, tmp_path / family).operations)

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_one_tensor_at_a_time_finds_what_the_whole_model_shows(family, planned, monkeypatch):
    folder, operations = planned(family)
    streamed = check_folds(folder, operations, torch.bfloat16)
    assert streamed.loaded is None
    assert streamed.error < 1e-5

    def refuse(*args):
        raise CannotStream("as a test wants it")

    monkeypatch.setattr(fold_check, "logits_of_versions", refuse)
    loaded = check_folds(folder, operations, torch.bfloat16)
    assert loaded.loaded == "as a test wants it"
    assert loaded.error < 1e-5
    for name in ("kl", "top1", "noise_kl", "tokens"):
        assert getattr(streamed, name) == pytest.approx(getattr(loaded, name), rel=1e-3), name
    assert streamed.kl > 0
    assert 0.1 < streamed.kl / streamed.noise_kl < 10


def _first(operations, kind):
    return next((name, i) for name, own in operations.items() for i, o in enumerate(own) if isinstance(o, kind))


def left_out(operations):
    """One head of one output projection stays as it was."""
    name, place = _first(operations, Columns)
    return operations | {name: tuple(o for i, o in enumerate(operations[name]) if i != place)}


def transposed(operations):
    """One head of keys, queries or values gets the transposed matrix, which the Hadamard matrix alone would forgive."""
    name = next(name for name in operations if name.endswith("k_proj.weight"))
    first, *others = operations[name]
    return operations | {name: (dataclasses.replace(first, matrix=first.matrix.T), *others)}


def slightly_off(operations):
    """One scale of one head is wrong by a hundredth."""
    name, place = _first(operations, Rows)
    wrong = operations[name][place].matrix.clone()
    wrong[0] *= 1.01
    own = list(operations[name])
    own[place] = dataclasses.replace(own[place], matrix=wrong)
    return operations | {name: tuple(own)}


def without_a_bias(operations):
    name = next(name for name in operations if name.endswith("q_proj.bias"))
    return {n: own for n, own in operations.items() if n != name}


def gamma_of_one_norm(operations):
    name, _ = _first(operations, Gamma)
    return {n: own for n, own in operations.items() if n != name}


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("llama", left_out),
        ("llama", transposed),
        ("llama", slightly_off),
        ("qwen2", without_a_bias),
        ("gemma3_text", gamma_of_one_norm),
    ],
)
def test_controls_wrong_folds_are_refused(family, wrong, planned):
    folder, operations = planned(family)
    with pytest.raises(CheckpointError, match="gives other logits than the original"):
        check_folds(folder, wrong(operations), torch.float32)
