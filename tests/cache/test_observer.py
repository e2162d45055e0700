"""What observers are shown: the log-sum-exp of a dense softmax over the keys as each query saw them."""

import copy

import pytest
import torch

from kvq.cache import attend as cache_attend
from kvq.cache import model_attention, observer
from kvq.cache.context import ForwardContext
from kvq.cache.layer import PackedLayer
from kvq.cache.plan import make_plan
from kvq.calib.artefacts import stand_in_artefacts
from kvq.errors import CacheError
from kvq.kernels.cpp import build
from kvq.kernels.dispatch import why_no_triton
from kvq.models.describe import describe
from kvq.recipe import load_recipe

KV_HEADS, GROUP, HEAD_DIM, BATCH = 2, 2, 32, 2
SCALING = 0.3
# A prompt, a chunk, steps, a chunk after steps.
LENGTHS = (70, 7, 1, 1, 1, 3, 1)
RECIPES = {
    "tokens": ("int4", {"tokens.sinks": 3, "tokens.window": 5}),
    "blocks of keys": ("kivi2", {"tokens.window": 32}),
    "means of keys taken away": ("osplus4", {"tokens.window": 5}),
    "keys before RoPE": ("kivi4", {"key.placement": "pre_rope", "tokens.window": 32}),
    "means of keys taken away relative to the page": (
        "osplus4",
        {"transforms.key": [{"kind": "shift", "at": "page"}], "tokens.window": 5},
    ),
    "heads of their own": ("int4", {"tokens.window": 5, "layers.0/1.key.bits": 8}),
}
MODELS = {"plain": {}, "softcap": {"softcap": 2.0}, "sink logits": {"s_aux": torch.tensor([0.5, -1.0, 3.0, 1.5])}}


class Heard:
    def __init__(self):
        self.layers, self.queries, self.lse = [], [], []

    def after_attention(self, layer, queries, lse):
        self.layers.append(layer)
        self.queries.append(queries.clone())
        self.lse.append(lse.clone())


def make_layer(tiny_config, name: str, impl: str) -> PackedLayer:
    recipe, settings = RECIPES[name]
    spec = describe(tiny_config(layers=1, heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, head_dim=HEAD_DIM))
    recipe = load_recipe(recipe).override(settings)
    artefacts = stand_in_artefacts(recipe, spec)
    generator = torch.Generator().manual_seed(5)
    for artefact, tensor in artefacts.items():
        if artefact.endswith("mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return PackedLayer(make_plan(recipe, spec, artefacts).layers[0], ForwardContext(impl))


def forward(layer: PackedLayer, query, keys, values, real, mask, model):
    """A forward of kvq's attention over one layer; ``real`` [B, T] or None, ``mask`` [B, 1, L, T] or None."""
    layer.context.begin(real)
    found, values = layer.update(keys, values)
    module = torch.nn.Module()
    module.num_key_value_groups = GROUP
    return model_attention.kvq_attention(module, query, found, values, mask, scaling=SCALING, **model)[0]


def dense_lse(query, keys, mask, model) -> torch.Tensor:
    """In float64, scores materialised: query [B, H, L, D], keys [B, kv_heads, T, D], mask bool [B or 1, 1, L, T]."""
    scores = query.double() @ keys.double().repeat_interleave(GROUP, 1).transpose(-1, -2) * SCALING
    if "softcap" in model:
        scores = model["softcap"] * torch.tanh(scores / model["softcap"])
    scores = scores.masked_fill(~mask, -torch.inf)
    if "s_aux" in model:
        scores = torch.cat([scores, model["s_aux"].double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return scores.logsumexp(-1)


def check(tiny_config, name, impl, tolerance, *, model=None, pads=0, window=None, form=torch.bool, dtype=torch.float32):
    """Drive a layer with an observer; a twin that no kernel reads tells the keys as the queries saw them."""
    model = model or {}
    layer, twin, heard = make_layer(tiny_config, name, impl), make_layer(tiny_config, name, "reference"), Heard()
    layer.observers.append(heard)
    generator, total, wants, reals = torch.Generator().manual_seed(1), 0, [], []
    for new in LENGTHS:
        total += new
        query, keys, values = (
            torch.randn(BATCH, heads, new, HEAD_DIM, generator=generator).to(dtype)
            for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        )
        real = torch.ones(BATCH, total, dtype=torch.bool)
        real[0, :pads] = False
        position = torch.arange(total - new, total).unsqueeze(1)
        visible = (torch.arange(total) <= position) & real[:, None, None]
        if window:
            visible &= torch.arange(total) > position - window
        given = visible if form == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, -1e9)
        twin.context.begin(real if pads else None)
        dense, _ = twin.update(keys, values)
        forward(layer, query, keys, values, real if pads else None, given if pads or window else None, model)
        wants.append(dense_lse(query, dense, visible, model))
        reals.append(real[:, None, total - new :].expand_as(wants[-1]))
        assert torch.equal(heard.queries[-1], query)
    assert [layer] * len(LENGTHS) == heard.layers
    for lse, want, real in zip(heard.lse, wants, reals, strict=True):
        assert lse.shape == want.shape
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (lse[~real] == -torch.inf).all()
        assert (lse[real] - want[real]).abs().max() < tolerance
    return {ran.impl for store in layer.stores for ran in store.ran}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RECIPES)
def test_the_reference_shows_the_dense_log_sum_exp(tiny_config, name, model):
    if name == "means of keys taken away" and model != "plain":
        pytest.skip("refused for such models")
    settings = {"model": MODELS[model], "dtype": torch.float64}
    assert check(tiny_config, name, "reference", 1e-10, **settings) == {"reference"}
    assert check(tiny_config, name, "reference", 2e-5, model=MODELS[model]) == {"reference"}


@pytest.mark.parametrize(
    "settings", [{"pads": 4}, {"window": 40}, {"pads": 4, "window": 40, "form": torch.float32}], ids=str
)
def test_pads_and_masks(tiny_config, settings):
    for model in MODELS.values():
        check(tiny_config, "tokens", "auto", 2e-5, model=model, **settings)


@pytest.mark.skipif(build.unavailable() is not None, reason="the C++ kernels are not built here")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["tokens", "blocks of keys", "heads of their own"])
def test_the_compiled_kernel_shows_the_same(tiny_config, name, model):
    assert check(tiny_config, name, "auto", 2e-5, model=MODELS[model]) == {"cpp", "reference"}


@pytest.mark.skipif(why_no_triton(torch.device("cpu")) is not None, reason=str(why_no_triton(torch.device("cpu"))))
@pytest.mark.parametrize(
    ("name", "model"), [*((name, "plain") for name in RECIPES), ("tokens", "softcap"), ("tokens", "sink logits")]
)
def test_the_triton_kernels_show_the_same(tiny_config, name, model):
    """Steps that the device counts, and chunks; queries and what fp16 pages hold are rounded to 16 bits."""
    assert check(tiny_config, name, "triton", 5e-3, model=MODELS[model]) == {"triton"}


def test_a_prompt_is_read_in_tiles(tiny_config, monkeypatch):
    """Of three queries and of one: what is shown stays, and so do the scores that are held."""
    for room in (3 * BATCH * KV_HEADS * GROUP * LENGTHS[0], 1):
        monkeypatch.setattr(observer, "TILE_SCORES", room)
        check(tiny_config, "tokens", "reference", 2e-5)
        check(tiny_config, "tokens", "reference", 2e-5, pads=4, window=40)


def test_nothing_is_computed_for_nobody(tiny_config, monkeypatch):
    """The two functions that compute it are called for an observer only, and the outputs are the same to the bit."""
    calls = []
    for module, name in ((model_attention, "prompt_lse"), (cache_attend, "merged_lse")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=original: calls.append(own.__name__) or own(*args))
    outs = []
    for observers in ([], [Heard()]):
        layer, generator = make_layer(tiny_config, "tokens", "reference"), torch.Generator().manual_seed(1)
        layer.observers += observers
        assert not calls
        for new in LENGTHS:
            shapes = [(BATCH, heads, new, HEAD_DIM) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]
            numbers = [torch.randn(shape, generator=generator) for shape in shapes]
            outs.append(forward(layer, *numbers, None, None, {}))
    assert sorted(calls) == ["merged_lse"] * (len(LENGTHS) - 1) + ["prompt_lse"]
    for left, right in zip(outs[: len(LENGTHS)], outs[len(LENGTHS) :], strict=True):
        assert torch.equal(left, right)


def test_another_attention_shows_nothing_and_is_refused(tiny_config):
    layer = make_layer(tiny_config, "tokens", "reference")
    layer.observers.append(Heard())
    keys = torch.randn(BATCH, KV_HEADS, 9, HEAD_DIM)
    layer.update(keys, keys)
    with pytest.raises(CacheError, match="another attention"):
        layer.update(keys, keys)


def test_a_copy_has_observers_of_its_own(tiny_config):
    layer = make_layer(tiny_config, "tokens", "reference")
    layer.observers.append(Heard())
    twin = copy.deepcopy(layer)
    numbers = [torch.randn(BATCH, heads, 9, HEAD_DIM) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]
    forward(twin, *numbers, None, None, {})
    assert len(twin.observers[0].lse) == 1
    assert not layer.observers[0].lse
