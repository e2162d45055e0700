"""Low rank: the first channels of a basis, of a head or of a whole layer, against dense matrices in fp64."""

import pytest
import torch
from transformers import AutoConfig

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts, stand_in_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.errors import RecipeError
from kvq.models.describe import describe
from kvq.recipe import parse_recipe
from kvq.transforms.chain import Chain
from kvq.transforms.frame import Frame, merged
from kvq.transforms.steps import Latent, Matrix, Shift

K, D, T, M = 3, 32, 40, 5
INT4 = {"codec": "affine", "bits": 4, "axis": "token", "group": "head"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latent(joint, width):
    matrix = drawn(K * D, K * D, seed=2) if joint else drawn(K, D, D, seed=2)
    return Latent(matrix, width, K)


def frame_of(*steps):
    return Frame(rope=None, block=16, heads=K, head_dim=D, chain=Chain(steps))


def projected(step, x):
    """x [B, K, T, D] times P_r (P^-1)_r, written out: the first channels of P, the same rows of its inverse."""
    kept = step.width * (K if step.joint else 1)
    matrix = step.matrix[..., :kept] @ torch.linalg.inv(step.matrix)[..., :kept, :]
    if not step.joint:
        return x @ matrix
    return (x.transpose(1, 2).flatten(2) @ matrix).unflatten(2, (K, D)).transpose(1, 2)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("width", [16, D])
def test_what_comes_back_is_the_projection_on_the_first_channels(joint, width):
    step, x = latent(joint, width), drawn(2, K, T, D)
    stored = step.forward(x)
    assert stored.shape == (2, K, T, width)
    expected = projected(step, x)
    assert torch.allclose(step.inverse(stored), expected, atol=1e-10)
    assert torch.allclose(expected, x, atol=1e-10) == (width == D)
    # Negative control: a basis that has its heads in another order gives others.
    swapped = step.inverse(stored.flip(1))
    assert not torch.allclose(swapped, expected, atol=0.1)


def test_heads_share_the_channels_of_a_layer_evenly():
    """Channel c of all lies with head c % K at place c // K: every head has its share of the costliest."""
    step, x = latent(True, 16), drawn(1, K, T, D)
    every = x.transpose(1, 2).flatten(2) @ step.matrix
    stored = step.forward(x)
    for c in (0, 1, 2, 3, 3 * 16 - 1):
        assert torch.allclose(stored[0, c % K, :, c // K], every[0, :, c], atol=1e-10)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("width", [16, D])
def test_readers_of_stored_channels_see_what_leaves_the_frame(joint, width):
    """q . leave(stored) = q'' . stored + bias, and sums of values are undone once."""
    frame = frame_of(Shift(drawn(K, D, seed=5)), latent(joint, width), Matrix(drawn(K, width, width, seed=6)))
    x, q = drawn(2, K, T, D), drawn(2, K, M, D, seed=1)
    stored = frame.enter(x)
    assert (frame.width, frame.joint) == (width, joint)
    back = frame.leave(stored)
    read = merged(stored) if joint else stored
    turned, bias = frame.queries(q, torch.zeros(1, 1, dtype=torch.long))
    scores = turned.squeeze(2) @ read.transpose(-1, -2) + bias.transpose(2, 3)
    assert torch.allclose(scores, q @ back.transpose(-1, -2), atol=1e-9)
    weights = (q @ back.transpose(-1, -2)).softmax(-1)
    assert torch.allclose(frame.outputs(weights @ read), weights @ back, atol=1e-9)
    # Negative control: without the inverse, reading by the matrix that wrote.
    wrong = frame.chain.forward(q) @ stored.transpose(-1, -2)
    assert not torch.allclose(wrong, scores, atol=0.1)


def test_heads_that_are_stored_apart_have_no_basis_together():
    step = latent(True, 16)
    assert step.of_heads(range(K)) is step
    with pytest.raises(RecipeError, match="heads \\[1\\] are stored apart"):
        step.of_heads([1])
    assert torch.equal(latent(False, 16).of_heads([1]).matrix, latent(False, 16).matrix[[1]])


@pytest.fixture(scope="module")
def model(tiny_model):
    """Keys and values whose heads have much in common, so that a basis of all is worth something."""
    config = AutoConfig.for_model(
        "llama", vocab_size=128, hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=1024, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    made = tiny_model(config, dtype=torch.float64)
    for name in ("k_proj", "v_proj"):
        weight = getattr(made.model.layers[0].self_attn, name).weight
        own = weight.data.view(3, 32, -1)
        weight.data = (own[:1] + 0.1 * own).flatten(0, 1)
    return made


def recipe(key=(), value=(), codec=INT4, **more):
    transforms = {"key": list(key), "value": list(value)}
    return parse_recipe({"name": "mine", "key": codec, "value": codec, "transforms": transforms} | more, source="mine")


@pytest.fixture(scope="module")
def planned(model, tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("model"), describe(model.config)
    model.save_pretrained(folder)
    tokens = torch.randint(3, 128, (4, 64), generator=torch.Generator().manual_seed(3))

    def make(mine):
        stats = collect(model, tokens, needs=needs_of(mine, spec) | {"key.range"})
        return make_plan(mine, spec, fit_artefacts(mine, spec, stats, folder))

    return make


def cached(model, length=200, seed=5):
    """Keys after RoPE and values, [1, K, T, D]."""
    tokens = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        layer = model(tokens, use_cache=True).past_key_values.layers[0]
    return {"key": layer.keys, "value": layer.values}


def lost(group, side, x):
    """Relative squared error of a side through an uncoded frame, by what its chain drops."""
    frame, origins = (group.frame if side == "key" else group.value_frame), torch.arange(x.shape[2])[None]
    origins = origins - origins % frame.block
    return float((frame.leave(frame.enter(x, origins), origins) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("metric", ["stored", "weights"])
@pytest.mark.parametrize("at", ["page", "pre_rope", "post_rope"])
def test_heads_that_resemble_each_other_lose_less_together(metric, at, model, planned):
    x, errors = cached(model), {}
    for over in ("head", "layer"):
        step = {"kind": "principal", "over": over, "rank": 16, "metric": metric}
        group = planned(recipe([step | {"at": at}], [step])).layers[0][0]
        errors[over] = {side: lost(group, side, own) for side, own in x.items()}
    for side in x:
        assert errors["layer"][side] < 0.5 * errors["head"][side], (side, errors)
        assert errors["head"][side] > 0.01


def test_the_subspace_is_that_of_the_principal_components(model, planned):
    """metric=stored against an SVD of the calibration's own values, head by head and over the layer."""
    tokens = torch.randint(3, 128, (4, 64), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        values = model(tokens, use_cache=True).past_key_values.layers[0].values
    rows = values.transpose(0, 1).flatten(1, 2)
    step = {"kind": "principal", "rank": 16, "metric": "stored"}
    own = planned(recipe([], [step])).layers[0][0].value_frame.chain.steps[0]
    best = torch.linalg.svd(rows, full_matrices=False).Vh[:, :16]
    assert torch.allclose(own.inverse(own.forward(rows)), rows @ best.mT @ best, atol=1e-4)
    together = planned(recipe([], [step | {"over": "layer"}])).layers[0][0].value_frame.chain.steps[0]
    wide = rows.transpose(0, 1).flatten(1)
    best = torch.linalg.svd(wide, full_matrices=False).Vh[: 16 * 3]
    found = together.inverse(together.forward(rows)).transpose(0, 1).flatten(1)
    assert torch.allclose(found, wide @ best.T @ best, atol=1e-4)


def test_fewer_channels_take_fewer_bytes(model):
    spec = describe(model.config)

    def bits(**settings):
        mine = recipe([{"kind": "principal", "at": "page", **settings}], [{"kind": "principal", **settings}])
        return make_plan(mine, spec, stand_in_artefacts(mine, spec)).layers[0][0]

    whole, half = bits(over="layer"), bits(over="layer", rank=0.5)
    assert half.layout.key.head_dim == half.layout.value.head_dim == 16
    # 4-bit codes and a scale and minimum by token and head; records are multiples of 128 bytes.
    assert whole.bits_per_element == 4 + 32 / 32
    assert half.bits_per_element == (4 * 16 + 32) / 32
    assert half.predicted_bytes(1000, 2) < 0.7 * whole.predicted_bytes(1000, 2)


@pytest.mark.parametrize("settings", [{"rank": 20}, {"rank": 1.5}, {"rank": 0}, {"rank": True}, {"rank": "half"}])
def test_what_is_no_rank_is_refused(settings):
    with pytest.raises(RecipeError, match="is no number of channels"):
        recipe([], [{"kind": "principal", **settings}])


def test_what_makes_no_sense_is_refused(model):
    spec = describe(model.config)
    mine = recipe([], [{"kind": "principal", "rank": 48}])
    with pytest.raises(RecipeError, match="more than head_dim=32"):
        make_plan(mine, spec, stand_in_artefacts(mine, spec))
    with pytest.raises(RecipeError, match="comes after a basis over the layer"):
        recipe([], [{"kind": "principal", "over": "layer"}, {"kind": "balance"}])
    with pytest.raises(RecipeError, match="'model'"):
        recipe([], [{"kind": "principal", "over": "model"}])
    apart = recipe([], [{"kind": "principal", "over": "layer"}], layers={"0/1": {"value": {"bits": 8}}})
    with pytest.raises(RecipeError, match="are stored apart"):
        make_plan(apart, spec, stand_in_artefacts(apart, spec))
