"""What kvq must know of a model: which layers own a KV cache, and of which shape.

The answer is read from the cache that transformers itself builds for the config, so layer types, shared layers and
per-layer head counts follow the installed release instead of a list kept here.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from kvq.errors import CheckpointError, UnsupportedModelError, one_line
from kvq.models.config_numbers import LARGEST, check_numbers

# The packed word layout works in atoms of 16 channels (pages/layout.py).
HEAD_DIM_UNIT = 16


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer's cache.

    kind      ``full``: keys and values of every token (quantizable); ``sliding``: a bounded window, left exact;
              ``state``: no cache of its own (linear attention, convolution, or another layer's keys and values).
    kv_heads, head_dim   shape of one token's keys (and values), 0 where there is none.
    window    tokens kept by a sliding layer, else None.
    """

    index: int
    kind: str
    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's cache geometry. ``fingerprint`` is a hash of everything here except the dtype.

    config   the model's own, for what only some recipes need to know.
    """

    model_type: str
    layers: tuple[LayerSpec, ...]
    num_heads: int
    hidden_size: int
    vocab_size: int
    max_length: int
    dtype: torch.dtype
    config: PretrainedConfig | None = field(default=None, repr=False, compare=False)

    @property
    def full_layers(self) -> tuple[LayerSpec, ...]:
        return tuple(layer for layer in self.layers if layer.kind == "full")

    @property
    def cached_layers(self) -> tuple[LayerSpec, ...]:
        """Layers that keep keys and values of their own, all of them or a window."""
        return tuple(layer for layer in self.layers if layer.kind in ("full", "sliding"))

    @property
    def fingerprint(self) -> str:
        rows = [(la.index, la.kind, la.kv_heads, la.head_dim, la.window) for la in self.layers]
        facts = [self.model_type, self.num_heads, self.hidden_size, self.vocab_size, rows]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The cache geometry as plain data; sizes are of the layers that can be quantized, in 16 bits."""
        return {
            "model_type": self.model_type,
            "fingerprint": self.fingerprint,
            "max_length": self.max_length,
            "quantizable_layers": len(self.full_layers),
            "fp16_bytes_per_token": sum(2 * 2 * layer.kv_heads * layer.head_dim for layer in self.full_layers),
            "layers": [asdict(layer) | {"quantizable": layer.kind == "full"} for layer in self.layers],
        }


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The decoder's config: the config itself, or the text part of a vision-language model."""
    return config.get_text_config(decoder=True)


def describe(config: PretrainedConfig) -> ModelSpec:
    """Describe a model's cache from its config.

    Raises CheckpointError for numbers that no model can have; UnsupportedModelError for an encoder, a model without a
    KV cache, or one whose cache does not hold plain keys and values (MLA latents).
    """
    name = config.model_type
    text = text_config(config)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name!r} is an encoder-decoder model: kvq quantizes decoder-only models; use one of those."
        )
    _refuse_no_decoder(config, name)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name!r} caches MLA latents (kv_lora_rank={text.kv_lora_rank}), not keys and values: recipes for keys "
            "and values would corrupt it; serve it unquantized."
        )
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise UnsupportedModelError(f"{name!r} has no attention heads, so it has no KV cache to quantize.")
    check_numbers({field: _of_all_layers(text, field) for field in LARGEST}, name)
    try:
        layers = tuple(_layer(text, i, layer, heads) for i, layer in enumerate(_cache_layers(text)))
    except (AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the config of {name!r} describes no cache ({one_line(error)}): mend it, or copy or download the model "
            "again."
        ) from None
    spec = ModelSpec(
        model_type=name,
        layers=layers,
        num_heads=heads,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_length=getattr(text, "max_position_embeddings", None) or 2048,
        dtype=getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32,
        config=text,
    )
    _refuse_unquantizable(spec)
    return spec


def _refuse_no_decoder(config: PretrainedConfig, name: str) -> None:
    text_type = text_config(config).model_type
    architectures = getattr(config, "architectures", None) or []
    generative = any(a.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for a in architectures)
    known = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or text_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or (not generative and (architectures or not known)):
        raise UnsupportedModelError(
            f"{name!r} ({', '.join(architectures) or 'no architecture named'}) is not a causal language model, so it "
            "keeps no KV cache: kvq works on decoder-only models such as Llama, Qwen or Gemma."
        )


def _cache_layers(text: PretrainedConfig) -> list:
    layers = DynamicCache(config=text).layers
    if not layers:
        # A config without layer types: transformers adds plain layers on first use.
        layers = [DynamicLayer() for _ in range(text.num_hidden_layers)]
    return layers


def _of_all_layers(text: PretrainedConfig, field: str) -> Any:
    """None too where layers differ, which transformers refuses to answer: each is read as its layer is described."""
    try:
        return getattr(text, field, None)
    except RuntimeError:
        return None


def _layer(text: PretrainedConfig, index: int, layer: object, heads: int) -> LayerSpec:
    own = text.per_layer_config[index] if hasattr(text, "per_layer_config") else text
    kv_heads = getattr(own, "num_key_value_heads", None) or getattr(own, "num_attention_heads", heads)
    head_dim = getattr(own, "head_dim", None) or text.hidden_size // heads
    if isinstance(layer, DynamicSlidingWindowLayer):
        return LayerSpec(index=index, kind="sliding", kv_heads=kv_heads, head_dim=head_dim, window=layer.sliding_window)
    if type(layer) is not DynamicLayer:
        return LayerSpec(index=index, kind="state", kv_heads=0, head_dim=0)
    # Gemma 4 gives its full-attention layers another shape than its sliding ones.
    kv_heads = getattr(own, "num_global_key_value_heads", None) or kv_heads
    head_dim = getattr(own, "global_head_dim", None) or head_dim
    return LayerSpec(index=index, kind="full", kv_heads=kv_heads, head_dim=head_dim)


def _refuse_unquantizable(spec: ModelSpec) -> None:
    if not spec.full_layers:
        kinds = sorted({layer.kind for layer in spec.layers})
        why = (
            "its layers keep only a sliding window, which is bounded already"
            if kinds == ["sliding"]
            else "none of its layers caches keys and values"
        )
        raise UnsupportedModelError(f"{spec.model_type!r} has nothing to quantize: {why}.")
    for layer in spec.full_layers:
        if layer.head_dim % HEAD_DIM_UNIT:
            raise UnsupportedModelError(
                f"layer {layer.index} has head_dim={layer.head_dim}, which is no multiple of {HEAD_DIM_UNIT}: packed "
                "pages work in groups of 16 channels; this model cannot be packed."
            )
