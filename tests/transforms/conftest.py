"""Tiny models of every architecture that decides where a transform may go, with nothing left at its initial value."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
# Families whose head dimension is the hidden size over the heads.
WIDE = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"hidden_size": 128}
HYBRID = {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": COMMON,
    "llama_bias": COMMON | {"attention_bias": True},
    "llama_odd_head": COMMON | {"head_dim": 48},
    "mixtral": COMMON | {"num_local_experts": 4},
    "qwen2": WIDE,
    "qwen3": COMMON,
    "gemma2": COMMON | HYBRID | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0},
    "gemma3_text": COMMON | HYBRID | {"query_pre_attn_scalar": 32},
    "gemma4_text": COMMON
    | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
    },
    "gpt_oss": COMMON | HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    "phi": WIDE | {"partial_rotary_factor": 0.5},
    "phi3": WIDE | {"partial_rotary_factor": 0.5},
    "gpt_neox": {k: v for k, v in WIDE.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.25},
    "cohere": WIDE | {"use_qk_norm": True},
    "cohere2": COMMON | HYBRID,
    "glm4": COMMON | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "olmo": WIDE,
    "olmo2": WIDE,
    "smollm3": COMMON | {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "hidden_size": 128},
    "qwen3_next": COMMON
    | {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
    },
    "opt": {
        "vocab_size": 128,
        "hidden_size": 128,
        "ffn_dim": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 128,
        "max_position_embeddings": 1024,
        "init_std": 0.15,
    },
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny products gain nothing from threads, and on a busy machine every start of one waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__)


class KeepDouble(TorchFunctionMode):
    """Models compute norms, rotary tables or softmax in float32 whatever their dtype; inside this block they stay in
    float64, so that what is left of a difference is a mistake."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and function is torch.Tensor.float:
            return args[0]
        if double:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        if function in _PRODUCTS and any(x.dtype == torch.float64 for x in args):
            # Of a table that stayed in float64 with positions, which come as float32.
            args = tuple(x.to(torch.float64) for x in args)
        return function(*args, **kwargs)


@pytest.fixture
def keep_double():
    with KeepDouble():
        yield


@pytest.fixture(scope="session")
def family_model(tiny_model):
    """Factory ``family_model(name, dtype=float64) -> model`` with random norms, biases and sinks."""

    def make(name: str, dtype: torch.dtype = torch.float64, **changes):
        settings = FAMILIES[name] | changes
        kind = name.removesuffix("_bias").removesuffix("_odd_head")
        model = tiny_model(AutoConfig.for_model(kind, **settings), dtype=dtype, seed=3)
        if hasattr(model, "set_experts_implementation"):
            # Grouped products have no float64.
            model.set_experts_implementation("eager")
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[-1] == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
                parameter.data += noise.to(dtype)
        return model

    return make


def pair_layout(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-split rotary pairs: partner [D], second [D]."""
    half = head_dim // 2
    return torch.cat([torch.arange(half) + half, torch.arange(half)]), torch.arange(head_dim) >= half


@pytest.fixture(scope="session")
def make_fit_data():
    """Factory ``make_fit_data(side="key", ...) -> FitData``: two KV heads of two query heads, keys with outlier
    channels and large means, correlated values of unequal channels that the output projection evens out."""
    from kvq.codecs import AffineCodec
    from kvq.transforms.fit_data import FitData, Window

    def make(side="key", *, bits=4, axis="token", group=None, windows=3, tokens=96, size=16, seed=0, **settings):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        gains, mean, mix = normal(2, 1, size).exp(), 4 * normal(2, 1, size), normal(2, size, size)
        mix = mix * (unequal := normal(2, 1, size).exp())
        found = tuple(
            Window(
                query=normal(4, tokens, size) / gains.repeat_interleave(2, 0) * 1.5,
                key=normal(2, tokens, size) * gains + mean,
                value=normal(2, tokens, size) @ mix,
            )
            for _ in range(windows)
        )
        partner, second = pair_layout(size)
        fields = {
            "heads": 2,
            "windows": found,
            "codec": AffineCodec(bits=bits, axis=axis, group=group or size, head_dim=size),
            "scaling": size**-0.5,
            "partner": partner,
            "second": second,
            "given": {},
            "output": normal(4, 24, size) / unequal.repeat_interleave(2, 0),
        }
        return FitData(side=side, **(fields | settings))

    return make
