"""What stands between a model's weights and its cache, layer by layer: what decides where a transform may be folded.

Everything is read from the model's own code, built without memory on the meta device: projections by their names and
sizes, norms by trying them on random numbers. A part that is not recognised is a reason not to fold, never a guess.
"""

import copy
import functools
import json
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from kvq.errors import UnsupportedModelError
from kvq.models.names import shared_layers

_QUERY, _KEY, _VALUE = ("q_proj",), ("k_proj",), ("v_proj",)
_FUSED = ("qkv_proj", "query_key_value")
_OUTPUT = ("o_proj", "out_proj", "dense", "Wo")
_QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
_KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
_GATES = ("gate_proj", "g_proj", "output_gate")
# Parts that leave keys and values as they are.
_HARMLESS = ("Dropout", "Identity")
# Layers that do not rotate keys, where the code decides by other attributes than ``use_rope``.
_UNROTATED = {
    "cohere2": lambda module: module.sliding_window is None,
    "cohere2_moe": lambda module: module.sliding_window is None,
    "exaone4": lambda module: module.sliding_window is not None and not module.is_sliding,
    "exaone_moe": lambda module: module.sliding_window is not None and not module.is_sliding,
    "opt": lambda module: True,
}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear map by its tensors' names, and the rows (of the output projection: columns) of every head."""

    weight: str
    bias: str | None
    heads: tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm between a projection and the cache.

    weight, bias   names of its tensors, None where it has none.
    offset         gamma = offset + weight (1 in Gemma's convention).
    shared         one gamma of head_dim entries serves all heads; else it has an entry for every channel of every head.
    rotates        it commutes with rotations of a head: RMS(x R) = RMS(x) R, which takes a norm without weight.
    """

    weight: str | None
    bias: str | None
    offset: int
    shared: bool
    rotates: bool


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention.

    query, output     projections of the layers that read this layer's cache, by layer index: its own, and those of
                      layers that share its keys and values.
    key, value        projections that write it; None if there is none of a known form.
    query_norm        by reading layer.
    key_norm, value_norm   between projection and cache.
    rotary            keys are rotated by their position.
    gate              something multiplies the attention output before the output projection, channel by channel.
    scaling           factor of the logits; softcap: of the logits, or None; sinks: learned ones.
    obstacles         by side, why nothing of it can be folded.
    """

    index: int
    query: dict[int, Projection] = field(default_factory=dict)
    output: dict[int, Projection] = field(default_factory=dict)
    key: Projection | None = None
    value: Projection | None = None
    query_norm: dict[int, Norm | None] = field(default_factory=dict)
    key_norm: Norm | None = None
    value_norm: Norm | None = None
    rotary: bool = True
    gate: bool = False
    scaling: float = 1.0
    softcap: float | None = None
    sinks: bool = False
    obstacles: dict[str, str] = field(default_factory=dict)


def describe_attention(config: PretrainedConfig) -> dict[int, Attention]:
    """The attention of every layer that has one, by layer index.

    Raises UnsupportedModelError if the model cannot be built from its config.
    """
    return _described(config.to_json_string(use_diff=False), type(config))


@functools.lru_cache(maxsize=8)
def _described(text: str, kind: type) -> dict[int, Attention]:
    config = kind(**json.loads(text))
    modules = attention_modules(meta_model(config))
    uses: dict[int, int] = {}
    for _, module in modules.values():
        for parameter in module.parameters():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    owners = shared_layers(config)
    readers: dict[int, dict[int, tuple[str, torch.nn.Module]]] = {i: {} for i in modules if i not in owners}
    for i, module in modules.items():
        readers[owners.get(i, i)][i] = module
    return {index: _describe_layer(config, index, own, uses) for index, own in readers.items()}


def meta_model(config: PretrainedConfig) -> torch.nn.Module:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{config.model_type!r} cannot be built from its config ({type(error).__name__}), so kvq cannot tell where "
            "transforms may go: use a recipe without them."
        ) from None


def attention_modules(model: torch.nn.Module) -> dict[int, tuple[str, torch.nn.Module]]:
    """Name and module of the decoder's attention, by layer index."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and _first(module, _OUTPUT) and index not in found:
            found[index] = (name, module)
    return found


def _describe_layer(config, index: int, readers: dict[int, tuple[str, torch.nn.Module]], uses) -> Attention:
    name, module = readers[index]
    own = getattr(config, "per_layer_config", None)
    own = own[index] if own is not None and index < len(own) else config
    size = getattr(module, "head_dim", None) or getattr(own, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    parts = _Parts(name, module, size)
    obstacles = parts.obstacles()
    key, value = parts.projection("key"), parts.projection("value")
    if any(uses[id(parameter)] > 1 for parameter in module.parameters()):
        obstacles = dict.fromkeys(("key", "value"), "its weights serve several layers")
    if getattr(config, "clip_qkv", None) is not None:
        obstacles = dict.fromkeys(("key", "value"), "what its projections give is clipped (clip_qkv)")
    queries, outputs, norms, gate = {}, {}, {}, False
    for reader, (path, other) in readers.items():
        theirs = _Parts(path, other, size)
        queries[reader], outputs[reader], gated = theirs.query_and_output()
        gate = gate or gated
        norms[reader] = theirs.norm(_QUERY_NORMS)
        if reader != index:
            obstacles = theirs.obstacles(reads_only=True) | obstacles
    return Attention(
        index=index,
        query={r: q for r, q in queries.items() if q},
        output={r: o for r, o in outputs.items() if o},
        key=key,
        value=value,
        query_norm=norms,
        key_norm=parts.norm(_KEY_NORMS),
        value_norm=parts.norm(("v_norm",)),
        rotary=_is_rotary(config, module),
        gate=gate,
        scaling=float(getattr(module, "scaling", None) or size**-0.5),
        softcap=getattr(config, "attn_logit_softcapping", None),
        sinks=getattr(module, "sinks", None) is not None,
        obstacles=obstacles,
    )


def _is_rotary(config, module: torch.nn.Module) -> bool:
    if not getattr(module, "use_rope", True):
        return False
    return not _UNROTATED.get(config.model_type, lambda module: False)(module)


@dataclass(frozen=True)
class _Parts:
    """The parts of one attention module, of heads of ``size`` channels."""

    name: str
    module: torch.nn.Module
    size: int

    def obstacles(self, reads_only: bool = False) -> dict[str, str]:
        """Why a side cannot be folded, by side."""
        found = {}
        unknown = [part for part, child in self.module.named_children() if not self._is_known(part, child)]
        unknown += [part for part, _ in self.module.named_parameters(recurse=False) if part != "sinks"]
        if unknown:
            reason = f"kvq does not know what {unknown[0]!r} of {type(self.module).__name__} does"
            return {"key": reason, "value": reason}
        query, output, _ = self.query_and_output()
        if query is None or (self.projection("key") is None and not reads_only):
            found["key"] = "its key and query projections are not of a known form"
        if output is None or (self.projection("value") is None and not reads_only):
            found["value"] = "its value and output projections are not of a known form"
        return found

    def _is_known(self, part: str, child: torch.nn.Module) -> bool:
        known = (*_QUERY, *_KEY, *_VALUE, *_OUTPUT, *_QUERY_NORMS, *_KEY_NORMS, *_GATES, "v_norm", *_FUSED)
        return part in known or type(child).__name__ in _HARMLESS or "Rotary" in type(child).__name__

    def query_and_output(self) -> tuple[Projection | None, Projection | None, bool]:
        """Projections of queries and outputs, and whether a gate stands before the second."""
        output_name = _first(self.module, _OUTPUT)
        output = getattr(self.module, output_name)
        if not isinstance(output, torch.nn.Linear) or output.in_features % self.size:
            return None, None, False
        heads = output.in_features // self.size
        out = self._of(output_name, self._spans(heads, 0, self.size))
        fused = self._fused(heads, "query")
        if fused is not None:
            return fused, out, self._has_gate()
        name = _first(self.module, _QUERY)
        rows = getattr(self.module, name).out_features if name else 0
        if rows == heads * self.size:
            return self._of(name, self._spans(heads, 0, self.size)), out, self._has_gate()
        if rows == 2 * heads * self.size:
            # Every head's query is followed by a gate (Qwen3-Next).
            return self._of(name, self._spans(heads, 0, 2 * self.size)), out, True
        return None, out, self._has_gate()

    def _has_gate(self) -> bool:
        return _first(self.module, _GATES) is not None

    def projection(self, what: str) -> Projection | None:
        """The projection of ``key`` or ``value``."""
        output = getattr(self.module, _first(self.module, _OUTPUT))
        fused = self._fused(getattr(output, "in_features", 0) // self.size, what)
        if fused is not None:
            return fused
        name = _first(self.module, _KEY if what == "key" else _VALUE)
        linear = getattr(self.module, name) if name else None
        if not isinstance(linear, torch.nn.Linear) or linear.out_features % self.size:
            return None
        return self._of(name, self._spans(linear.out_features // self.size, 0, self.size))

    def _fused(self, heads: int, what: str) -> Projection | None:
        """The rows of ``query``, ``key`` or ``value`` in one projection for all three.

        Phi-3: all queries, all keys, all values. GPT-NeoX: query, key and value of one head after the other.
        """
        part, size = _first(self.module, _FUSED), self.size
        rows = getattr(getattr(self.module, part), "out_features", 0) if part else 0
        place = ("query", "key", "value").index(what)
        if part == "query_key_value" and type(self.module).__name__.startswith("GPTNeoX") and rows == 3 * heads * size:
            return self._of(part, self._spans(heads, place * size, 3 * size))
        groups = getattr(self.module, "num_key_value_groups", None)
        kv_heads = (rows - heads * size) // (2 * size)
        if part != "qkv_proj" or not groups or heads != groups * kv_heads or rows != (heads + 2 * kv_heads) * size:
            return None
        start = (0, heads, heads + kv_heads)[place] * size
        return self._of(part, self._spans(heads if what == "query" else kv_heads, start, size))

    def _spans(self, heads: int, start: int, step: int) -> tuple[slice, ...]:
        return tuple(slice(start + i * step, start + i * step + self.size) for i in range(heads))

    def _of(self, part: str, heads: tuple[slice, ...]) -> Projection:
        bias = getattr(self.module, part).bias is not None
        return Projection(
            weight=f"{self.name}.{part}.weight", bias=f"{self.name}.{part}.bias" if bias else None, heads=heads
        )

    def norm(self, names: tuple[str, ...]) -> Norm | None:
        part = _first(self.module, names)
        return _probe_norm(f"{self.name}.{part}", getattr(self.module, part), self.size) if part else None


def _first(module: torch.nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), torch.nn.Module)), None)


@torch.no_grad()
def _probe_norm(name: str, meta: torch.nn.Module, size: int) -> Norm:
    """Find out what a norm does with its weight, by running it. Unknown behaviour gives a norm without weight."""
    opaque = Norm(weight=None, bias=None, offset=0, shared=True, rotates=False)
    weight = getattr(meta, "weight", None)
    if set(dict(meta.named_parameters())) - {"weight", "bias"} or (weight is not None and weight.numel() % size):
        return opaque
    norm = copy.deepcopy(meta).to_empty(device="cpu").double()
    generator = torch.Generator().manual_seed(0)
    width = size if weight is None else weight.numel()
    x = torch.randn(3, width, dtype=torch.float64, generator=generator)
    # A weight of one row for every head (Cohere) sees heads apart.
    shaped = x.unflatten(-1, weight.shape) if weight is not None and weight.ndim > 1 else x
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.zero_()
    try:
        if weight is None:
            turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
            rotates = torch.allclose(norm(x).double() @ turn, norm(x @ turn).double(), atol=1e-4)
            return Norm(weight=None, bias=None, offset=0, shared=True, rotates=rotates)
        given = torch.rand(weight.shape, dtype=torch.float64, generator=generator) + 0.5
        zero, one, some = (
            _norm_with(norm, w, shaped) for w in (torch.zeros_like(given), torch.ones_like(given), given)
        )
    except (RuntimeError, TypeError, ValueError):
        return opaque
    for offset in (0, 1):
        unit = one / (1 + offset)
        if torch.allclose(zero, unit * offset, atol=1e-4) and torch.allclose(some, unit * (given + offset), atol=1e-4):
            return Norm(
                weight=f"{name}.weight",
                bias=f"{name}.bias" if bias is not None else None,
                offset=offset,
                shared=weight.numel() == size,
                rotates=False,
            )
    return opaque


def _norm_with(norm: torch.nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    norm.weight.copy_(weight)
    return norm(x).double()
