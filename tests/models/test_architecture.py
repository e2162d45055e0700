"""What stands between weights and cache is read from each family's own code."""

import pytest
import torch
from transformers import AutoConfig

from kvq.errors import UnsupportedModelError
from kvq.models.architecture import Norm, _probe_norm, describe_attention
from kvq.models.rope import rope_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
WIDE = {k: v for k, v in SMALL.items() if k != "head_dim"} | {"hidden_size": 128}


def attention(kind, layer=0, **settings):
    return describe_attention(AutoConfig.for_model(kind, **(SMALL | settings)))[layer]


def test_heads_and_their_rows_are_read_from_the_projections():
    found = attention("llama")
    assert [len(p.heads) for p in (found.query[0], found.key, found.value, found.output[0])] == [4, 2, 2, 4]
    assert found.key.heads == (slice(0, 32), slice(32, 64))
    assert found.key.weight == "model.layers.0.self_attn.k_proj.weight"
    assert found.scaling == pytest.approx(32**-0.5)
    assert (found.key.bias, found.key_norm, found.gate, found.sinks, found.softcap) == (None, None, False, False, None)
    assert not found.obstacles


def test_biases_are_named():
    found = attention("qwen2", hidden_size=128)
    assert found.key.bias == "model.layers.0.self_attn.k_proj.bias"
    assert found.output[0].bias is None


@pytest.mark.parametrize(
    ("kind", "offset", "shared"),
    [("qwen3", 0, True), ("gemma3_text", 1, True), ("olmo2", 0, False), ("cohere", 0, False)],
)
def test_norms_are_tried_for_their_convention(kind, offset, shared):
    settings = {"use_qk_norm": True} if kind == "cohere" else {}
    norm = attention(kind, hidden_size=128, **settings).key_norm
    assert (norm.offset, norm.shared, norm.rotates) == (offset, shared, False)
    assert norm.weight.endswith("k_norm.weight")


def test_a_norm_without_weight_may_commute_with_rotations():
    found = attention("gemma4_text", hidden_size_per_layer_input=16, vocab_size_per_layer_input=64, global_head_dim=32)
    assert found.value_norm == Norm(weight=None, bias=None, offset=0, shared=True, rotates=True)


class Halving(torch.nn.Module):
    """A norm by another rule: its weight enters squared."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * self.weight.square()


class MaxNorm(torch.nn.Module):
    """Without weight, and no function of the length alone."""

    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True)


def test_a_norm_that_does_something_else_has_no_usable_weight():
    with torch.device("meta"):
        odd, layer, top = Halving(16), torch.nn.LayerNorm(16), MaxNorm()
    assert _probe_norm("x", odd, 16).weight is None
    assert _probe_norm("x", layer, 16) == Norm(weight="x.weight", bias="x.bias", offset=0, shared=True, rotates=False)
    assert not _probe_norm("x", top, 16).rotates


def test_fused_projections_are_cut_where_each_family_cuts_them():
    phi = attention("phi3", hidden_size=128)
    assert {p.weight for p in (phi.query[0], phi.key, phi.value)} == {"model.layers.0.self_attn.qkv_proj.weight"}
    assert (phi.query[0].heads[1], phi.key.heads[0], phi.value.heads[1]) == (
        slice(32, 64),
        slice(128, 160),
        slice(224, 256),
    )
    neox = attention("gpt_neox", hidden_size=128)
    assert (neox.query[0].heads[1], neox.key.heads[0], neox.value.heads[3]) == (
        slice(96, 128),
        slice(32, 64),
        slice(352, 384),
    )


def test_gates_sinks_and_softcaps_are_seen():
    gated = attention("qwen3_next", layer_types=["full_attention", "full_attention"], num_experts=4)
    assert gated.gate
    # Every head's query is followed by its gate.
    assert gated.query[0].heads[1] == slice(64, 96)
    assert attention("gpt_oss", num_local_experts=4).sinks
    assert attention("gemma2").softcap == 50.0


def test_layers_that_do_not_rotate_keys():
    found = describe_attention(AutoConfig.for_model("smollm3", **(WIDE | {"no_rope_layers": [1, 0]})))
    assert (found[0].rotary, found[1].rotary) == (True, False)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    found = describe_attention(AutoConfig.for_model("cohere2", **(SMALL | kinds)))
    assert (found[0].rotary, found[1].rotary) == (True, False)


def test_layers_that_share_a_cache_are_its_readers():
    settings = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 64,
        "global_head_dim": 64,
    }
    found = describe_attention(AutoConfig.for_model("gemma4_text", **(SMALL | settings)))
    assert set(found) == {0, 1}
    assert (set(found[0].query), set(found[1].output)) == ({0, 2}, {1, 3})
    # The full layers have heads of their own size.
    assert found[1].key.heads[0] == slice(0, 64)


@pytest.mark.parametrize(
    ("kind", "settings", "part"),
    [
        ("bitnet", {}, "attn_sub_norm"),
        ("llama4_text", {"use_qk_norm": True, "num_local_experts": 2}, "qk_norm"),
        ("deepseek_v3", {}, "q_a_proj"),
    ],
)
def test_an_unknown_part_is_a_reason_not_to_fold(kind, settings, part):
    found = attention(kind, **settings)
    assert set(found.obstacles) == {"key", "value"}
    assert f"does not know what {part!r}" in found.obstacles["key"]


def test_an_unknown_fusion_is_a_reason_not_to_fold():
    config = AutoConfig.for_model("falcon", **{k: v for k, v in WIDE.items() if k != "num_key_value_heads"})
    assert "not of a known form" in describe_attention(config)[0].obstacles["value"]


def test_clipped_projections_are_an_obstacle():
    assert "clip_qkv" in attention("olmo", hidden_size=128, clip_qkv=8.0).obstacles["value"]
    assert not attention("olmo", hidden_size=128).obstacles


def test_a_config_that_builds_nothing_is_refused():
    config = AutoConfig.for_model("llama", **SMALL)
    config.hidden_act = "nonsense"
    with pytest.raises(UnsupportedModelError, match="cannot be built from its config"):
        describe_attention(config)


@pytest.mark.parametrize(
    ("kind", "settings", "turning", "first_pair"),
    [
        ("llama", {}, 32, (0, 16)),
        ("phi", {"partial_rotary_factor": 0.5, "hidden_size": 128}, 16, (0, 8)),
        ("cohere", {"hidden_size": 128}, 32, (0, 1)),
        ("glm4", {"partial_rotary_factor": 0.5}, 16, (0, 1)),
    ],
)
def test_rotary_pairs_are_read_from_the_rotation(kind, settings, turning, first_pair):
    rope = rope_of(AutoConfig.for_model(kind, **(SMALL | settings)))
    partner, second = rope.partners(32)
    assert int((partner != torch.arange(32)).sum()) == turning
    assert torch.equal(partner[partner], torch.arange(32))
    a, b = first_pair
    assert (int(partner[a]), int(partner[b])) == (b, a)
    assert (bool(second[a]), bool(second[b])) == (False, True)
    # The orientation: turning by a position multiplies first + i second by a positive angle.
    x = torch.zeros(1, 1, 1, 32, dtype=torch.float64)
    x[..., a] = 1
    assert float(rope.rotate(x, torch.tensor([[1]]))[..., b]) > 0
