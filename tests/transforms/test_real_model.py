"""Exactness on the embedded real model: L2 (every layer), L3 (logits) and L4 (weights rounded) of the exactness levels,
on calibration text and on random inputs, with controls that must fail."""

import dataclasses
from functools import partial
from itertools import pairwise

import pytest
import torch

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.collect import collect
from kvq.calib.data import builtin_text
from kvq.calib.needs import needs_of
from kvq.exporting.fold_check import check_folds
from kvq.exporting.folding import plan_of_folds
from kvq.integrations.runtime import install, new_cache, uninstall
from kvq.models.architecture import describe_attention
from kvq.models.describe import describe
from kvq.models.resolve import load_model, load_tokenizer
from kvq.models.rope import rope_of
from kvq.recipe import parse_recipe
from kvq.transforms.fold import fold
from kvq.transforms.fold_plan import plan_folds

pytestmark = pytest.mark.model
BOUND = 1e-4
TOKENS = 96
KEY = [{"kind": "align"}, {"kind": "smooth", "beta": 0.5}, {"kind": "shift"}, {"kind": "balance"}]
VALUE = [{"kind": "smooth"}, {"kind": "spectral"}]


def recipe(key=KEY, value=VALUE):
    """Everything stays in the exact window, which is in the basis of the transforms too."""
    codec = {"codec": "affine", "bits": 8, "axis": "token", "group": "head"}
    data = {"name": "x", "key": codec, "value": codec, "tokens": {"sinks": 1, "window": 512}}
    return parse_recipe(data | {"transforms": {"key": key, "value": value}}, source="x")


@pytest.fixture(scope="module")
def real(builtin_dir):
    """(folder, model, plan with the folds given to it, text, random embeddings)."""
    model, mine = load_model(builtin_dir, dtype=torch.float32), recipe()
    tokenizer, spec = load_tokenizer(builtin_dir), describe(model.config)
    ids = torch.tensor(tokenizer(builtin_text("calibration")[:20_000])["input_ids"][: 2 * 128])
    stats = collect(model, ids.view(2, 128), needs=needs_of(mine, spec))
    artefacts = fit_artefacts(mine, spec, stats, builtin_dir)
    table = model.get_input_embeddings().weight
    noise = torch.randn(1, TOKENS, table.shape[1], generator=torch.Generator().manual_seed(0)) * table.std()
    return builtin_dir, model, partial(make_plan, mine, spec, artefacts), ids[None, -TOKENS:], noise


@torch.inference_mode()
def seen(model, inputs, plan=None):
    """Outputs of every attention block, and logits, of a prompt, a chunk and single tokens."""
    found = [[] for _ in model.model.layers]
    handles = [
        layer.self_attn.register_forward_hook(lambda _, args, out, into=into: into.append(out[0]))
        for layer, into in zip(model.model.layers, found)
    ]
    if plan is not None:
        install(model, plan)
    try:
        cache, logits = new_cache(model) if plan is not None else None, []
        cuts = [0, 60, 90, *range(91, TOKENS + 1)] if plan is not None else [0, TOKENS]
        for start, stop in pairwise(cuts):
            part = {name: x[:, start:stop] for name, x in inputs.items()}
            logits.append(model(**part, past_key_values=cache, use_cache=cache is not None).logits)
    finally:
        for handle in handles:
            handle.remove()
        if plan is not None:
            uninstall(model)
    return [torch.cat(parts, dim=1) for parts in found], torch.cat(logits, dim=1)


def error(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())


class Folded:
    """The model's weights folded inside the block."""

    def __init__(self, model, operations):
        self.parameters = {name: p for name, p in model.named_parameters() if name in operations}
        self.operations = operations

    def __enter__(self):
        self.kept = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = fold(parameter.data, self.operations[name])

    def __exit__(self, *_):
        for name, parameter in self.parameters.items():
            parameter.data = self.kept[name]


@pytest.mark.parametrize("what", ["text", "random"])
def test_every_layer_and_the_logits_are_the_models(what, real):
    folder, model, planned, text, noise = real
    inputs = {"input_ids": text} if what == "text" else {"inputs_embeds": noise}
    layers, logits = seen(model, inputs)
    folds = plan_of_folds(planned(), folder)
    assert set(folds.folded) == set(range(len(layers)))
    assert all(sides == {"key": 2, "value": 2} for sides in folds.folded.values())
    checks = [seen(model, inputs, planned())]
    with Folded(model, folds.operations):
        checks.append(seen(model, inputs, planned(folds.folded)))
    for found_layers, found_logits in checks:
        assert max(error(a, b) for a, b in zip(found_layers, layers)) < BOUND
        assert error(found_logits, logits) < BOUND


def test_rounded_weights_change_logits_as_random_rounding_does(real):
    folder, _, planned, _, _ = real
    check = check_folds(folder, plan_of_folds(planned(), folder).operations, torch.bfloat16)
    assert check.error < BOUND
    assert 0.2 * check.noise_kl < check.kl < 5 * check.noise_kl
    assert check.kl < 1e-2


def test_control_a_scale_that_differs_within_a_pair_shows(real):
    _, model, _, text, _ = real
    spec, generator = describe(model.config), torch.Generator().manual_seed(0)
    scales = {
        f"layers.{layer.index}.key.transforms.0.scale": torch.rand(3, 64, generator=generator) + 0.5
        for layer in spec.full_layers
    }
    plan = make_plan(recipe(key=[{"kind": "smooth"}], value=[]), spec, scales)
    # As if keys were not rotated, so that the planner lets it pass.
    attention = {i: dataclasses.replace(a, rotary=False) for i, a in describe_attention(spec.config).items()}
    dims = {layer.index: layer.head_dim for layer in spec.full_layers}
    folds = plan_folds(plan.chains, dims, attention, rope_of(spec.config), model.state_dict())
    assert len(folds.operations) == 2 * len(dims)
    _, logits = seen(model, {"input_ids": text})
    with Folded(model, folds.operations):
        assert error(seen(model, {"input_ids": text})[1], logits) > 100 * BOUND
