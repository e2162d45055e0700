"""Keys relative to their block: exact for every layout of RoPE, the same at every position, and fitted by formula."""

import pytest
import torch
from transformers import AutoConfig

from kvq.errors import RecipeError, UnsupportedModelError
from kvq.models.rope import rope_of
from kvq.recipe import parse_recipe
from kvq.transforms.chain import Chain
from kvq.transforms.frame import Frame, block_origins, turned_moments
from kvq.transforms.steps import Matrix, Shift

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024, "rope_theta": 10000.0,
}  # fmt: skip
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131072}
LAYOUTS = {
    "half-split": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "interleaved": ("cohere", {}),
    "partial": ("phi", {"partial_rotary_factor": 0.5}),
    "interleaved and partial": ("glm", {"partial_rotary_factor": 0.5, "head_dim": 32}),
}
K, D, BLOCK = 2, 32, 16


@pytest.fixture(params=LAYOUTS)
def rope(request):
    kind, settings = LAYOUTS[request.param]
    return rope_of(AutoConfig.for_model(kind, **SIZES | settings))


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frame_of(rope, block=BLOCK):
    steps = (Shift(3 * drawn(K, D, seed=3)), Matrix(drawn(K, D, D, seed=4)))
    return Frame(rope=rope, block=block, heads=K, head_dim=D, chain=Chain(steps))


def plain_rotation(rope, x, positions):
    """R_positions x without a factor of the whole: rotating and scaling back."""
    turned = rope.rotate(x, positions)
    ends = rope.channels
    return torch.cat([turned[..., :ends] / rope.factor**0.5, turned[..., ends:]], dim=-1)


@pytest.mark.parametrize("block", [1, BLOCK])
@pytest.mark.parametrize("start", [0, 5, 4001])
def test_queries_that_turn_for_every_block_give_the_models_scores(rope, block, start):
    """q . k = q'' . stored + bias, against the model's own keys and queries at their positions."""
    frame, T, M = frame_of(rope, block), 3 * BLOCK, 5
    before, q = drawn(1, K, T, D, seed=1), drawn(1, K, M, D, seed=2)
    positions = torch.arange(start, start + T).unsqueeze(0)
    keys = rope.rotate(before, positions)
    queries = rope.rotate(q, torch.arange(start + T, start + T + M).unsqueeze(0))
    origins = block_origins(positions, block)
    stored = frame.enter(keys, origins)
    turned, bias = frame.queries(queries, origins[:, ::block])
    blocks = stored.unflatten(2, (-1, block))
    found = (turned @ blocks.transpose(-1, -2) + bias.unsqueeze(-1)).transpose(2, 3).flatten(3)
    exact = queries @ keys.transpose(-1, -2)
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (frame.leave(stored, origins) - keys).abs().max() < 1e-5 * keys.abs().max()
    # Negative control: without the bias, which differs from block to block, scores are others.
    without = (turned @ blocks.transpose(-1, -2)).transpose(2, 3).flatten(3)
    assert (without - exact).abs().max() > 0.1 * exact.abs().max()


def test_kernels_make_the_same_queries_of_tables(rope):
    frame, M = frame_of(rope), 3
    q, origins = drawn(2, K, M, D, seed=2), torch.tensor([[0, 16, 64], [7, 23, 90000]])
    expected, bias = frame.queries(q, origins)
    cos, sin = frame.turns(origins, torch.float64)
    matrix, mean = frame.reader(torch.device("cpu"), torch.float64)
    own = q.unsqueeze(2)
    t = own * cos[:, None, :, None] + own[..., frame.partner] * sin[:, None, :, None]
    # Cohere's function rotates in float32, whatever it is given.
    assert (t @ matrix.unsqueeze(1) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert ((t * mean[:, None, None]).sum(-1) - bias).abs().max() < 1e-6 * bias.abs().max()


def test_what_is_stored_does_not_depend_on_the_position(rope):
    """The model computes angles in float32, so far positions differ by its rounding."""
    frame, T = frame_of(rope), 2 * BLOCK
    before = drawn(1, K, T, D, seed=1)

    def stored(start):
        positions = torch.arange(start, start + T).unsqueeze(0)
        return frame.enter(rope.rotate(before, positions), block_origins(positions, BLOCK))

    near = stored(0)
    for start in (48, 4096, 120000):
        assert (stored(start) - near).abs().max() < 2e-2 * near.abs().max()
    # Negative control: keys after RoPE are others.
    positions = torch.arange(T).unsqueeze(0)
    moved = rope.rotate(before, positions + 4096) - rope.rotate(before, positions)
    assert moved.abs().max() > 0.5 * before.abs().max()


@pytest.mark.parametrize("block", [1, BLOCK])
def test_moments_follow_from_those_before_rope(rope, block):
    """Against the definition: keys are turned to every offset, and measured."""
    keys = drawn(K, 40, D, seed=5) + drawn(K, 1, D, seed=6)
    mean, second = keys.mean(1), keys.transpose(-1, -2) @ keys / 40
    everywhere = torch.cat([plain_rotation(rope, keys[None], torch.full((1, 40), r))[0] for r in range(block)], dim=1)
    found = turned_moments(rope, mean, second, torch.arange(block))
    assert (found[0] - everywhere.mean(1)).abs().max() < 1e-6
    exact = everywhere.transpose(-1, -2) @ everywhere / everywhere.shape[1]
    assert (found[1] - exact).abs().max() < 1e-6 * exact.abs().max()


def test_moments_of_queries_are_of_what_reads_blocks(rope):
    """q'' = R_-o of the model's query at distance d from the origin o, whatever o."""
    queries, distances = drawn(K, 40, D, seed=7), torch.tensor([0, 3, 64, 700])
    second = queries.transpose(-1, -2) @ queries / 40
    plain = Frame(rope=rope, block=BLOCK, heads=K, head_dim=D, chain=Chain())
    seen = []
    for origin, distance in zip((0, 32, 4096, 48), distances.tolist()):
        rotated = rope.rotate(queries[None], torch.full((1, 40), origin + distance))
        seen.append(plain.queries(rotated, torch.tensor([[origin]]))[0][0, :, 0])
    seen = torch.cat(seen, dim=1)
    _, found = turned_moments(rope, queries.mean(1), second, distances, reads=True)
    exact = seen.transpose(-1, -2) @ seen / seen.shape[1]
    assert (found - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_move_are_refused(kind):
    more = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16} if kind == "longrope" else {"factor": 2.0}
    given = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 4096} | more
    with pytest.raises(UnsupportedModelError, match="changes frequencies"):
        rope_of(AutoConfig.for_model("llama", **SIZES, rope_parameters=given))


AFFINE = {"codec": "affine", "bits": 4, "axis": "token", "group": "head"}
REFUSED = {
    "comes after": ({"key": [{"kind": "shift", "at": "page"}, {"kind": "hadamard", "at": "post_rope"}]}, {}),
    "exclude each other": ({"key": [{"kind": "hadamard"}, {"kind": "shift", "at": "page"}]}, {}),
    "list it before": ({"key": [{"kind": "shift", "at": "page"}, {"kind": "smooth"}]}, {}),
    "two places": ({"key": [{"kind": "shift", "at": "page"}]}, {"placement": "pre_rope"}),
    "no rotary embedding": ({"value": [{"kind": "shift", "at": "page"}]}, {}),
    "share an origin": ({"key": [{"kind": "shift"}]}, {"frame": 64}),
    "is not a place": ({"key": [{"kind": "shift", "at": "block"}]}, {}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_orders_that_cannot_be_are_refused(words):
    transforms, key = REFUSED[words]
    with pytest.raises(RecipeError, match=words):
        parse_recipe({"name": "x", "key": AFFINE | key, "value": AFFINE, "transforms": transforms}, source="x")


def test_steps_after_a_page_step_act_there_too():
    chain = [{"kind": "smooth"}, {"kind": "shift", "at": "page"}, {"kind": "hadamard"}]
    recipe = parse_recipe({"name": "x", "key": AFFINE, "value": AFFINE, "transforms": {"key": chain}}, source="x")
    head = recipe.for_head(0, 0, 1)
    assert (head.key_place, head.frame_tokens, head.framed_steps) == ("page", 64, 2)
    assert parse_recipe(recipe.to_dict(), source="x") == recipe
