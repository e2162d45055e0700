"""A model's rotary position embedding, taken from the model's own code: rotate keys to a position and back.

transformers computes cos and sin in a rotary module and applies them with ``apply_rotary_pos_emb`` of the model's file,
which knows whether pairs are halves or neighbours and how many channels rotate. Both are used as they are, so a
family's layout is never guessed; ``rope_of`` checks on random numbers that the inverse is one.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name

from kvq.errors import UnsupportedModelError
from kvq.pages.affine import wide

# These change the frequencies with the length of the text, so a stored key has no one position to go back to.
MOVING_TYPES = ("dynamic", "longrope")
_PROBE_POSITIONS = 7
_GROWTH = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Rope:
    """Rotates keys [B, K, T, D] to absolute positions and back.

    Keys of 16 bits come out in float32: rounding angles and results to 16 bits would add an error of its own.

    channels   how many of the D channels rotate; the others pass through.
    factor     squared length that rotating adds (YaRN's attention factor squared), 1 for most models.
    """

    module: torch.nn.Module
    apply: Any
    arguments: dict[str, Any]
    channels: int
    factor: float
    table: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, ...]]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys as they are before RoPE to keys at ``positions`` [B or 1, T]."""
        x = wide(x)
        cos, sin = self._cos_sin(positions, x)
        return self._applied(x, cos, sin)

    def inverse(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of ``rotate``."""
        out = self.transposed(x, positions)
        if self.factor != 1:
            out = torch.cat([out[..., : self.channels] / self.factor, out[..., self.channels :]], dim=-1)
        return out

    def transposed(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What reads keys from before RoPE: q . rotate(k) = transposed(q) . k; the inverse up to ``factor``."""
        q = wide(q)
        cos, sin = self._cos_sin(positions, q)
        return self._applied(q, cos, -sin)

    def partners(self, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary pairs, as the model's code turns them: (other channel of the pair [D] int64, the channel itself if
        it does not turn; whether it is the second of its pair [D] bool)."""
        unit = torch.eye(head_dim, dtype=torch.float64)[None, None]
        # Slow pairs hardly turn at position 1, and a fast one may be back where it was at a later position.
        turned = [self.rotate(unit, torch.full((1, head_dim), p))[0, 0] for p in (0, 1, 1001)]
        partner, second = torch.arange(head_dim), torch.zeros(head_dim, dtype=torch.bool)
        moves = (turned[1] != 0) | (turned[2] != 0)
        moves.fill_diagonal_(False)
        if not torch.allclose(turned[0], unit[0, 0] * turned[0].diagonal()) or bool((moves.sum(1) > 1).any()):
            return partner, second
        has = moves.any(1)
        partner = torch.where(has, moves.to(torch.int64).argmax(1), partner)
        # e_a turns towards +e_b, e_b towards -e_a.
        second = has & (turned[1].gather(1, partner.unsqueeze(1)).squeeze(1) < 0)
        return partner, second

    def _applied(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if self.channels == x.shape[-1]:
            return _apply(self.apply, x, cos, sin)
        rotated = _apply(self.apply, x[..., : self.channels], cos, sin)
        return torch.cat([rotated, x[..., self.channels :]], dim=-1)

    def _cos_sin(self, positions: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions [B, T], each [B, T, channels], in the dtype of x (float32 or float64)."""
        dtype = x.dtype
        longest = int(positions.max()) + 1 if positions.numel() else 1
        held = self.table.get((dtype, x.device))
        if held is None or held[0].shape[0] < longest:
            made = _tabulate(self.module, self.arguments, -(-longest // _GROWTH) * _GROWTH, dtype)
            held = self.table[dtype, x.device] = tuple(part.to(x.device) for part in made)
        cos, sin = (part[positions.to(x.device)] for part in held)
        return cos, sin


def rope_of(config: PretrainedConfig) -> Rope:
    """The rotary embedding of a model's full-attention layers.

    Raises UnsupportedModelError, with the reason, if keys of this model cannot be taken back to before RoPE.
    """
    name = config.model_type
    if kind := moving_type(config):
        raise _refusal(name, f"its RoPE type {kind!r} changes frequencies with the text's length")
    code = importlib.import_module(
        f"transformers.models.{model_type_to_module_name(name)}.modeling_{model_type_to_module_name(name)}"
    )
    apply = getattr(code, "apply_rotary_pos_emb", None)
    classes = [c for n, c in vars(code).items() if n.endswith("RotaryEmbedding") and inspect.isclass(c)]
    classes = [c for c in classes if "Vision" not in c.__name__]
    if apply is None or not classes:
        raise _refusal(name, "it has no rotary embedding of the usual form")
    try:
        module = classes[0](config=config)
        arguments = {}
        if "layer_type" in inspect.signature(module.forward).parameters:
            arguments["layer_type"] = "full_attention"
        cos, sin = _tabulate(module, arguments, _PROBE_POSITIONS, torch.float64)
        rope = _probed(module, apply, arguments, cos, sin)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise _refusal(name, f"its rotary embedding works differently ({type(error).__name__})") from None
    _check_inverse(rope, name)
    return rope


def moving_type(config: PretrainedConfig) -> str | None:
    """A model's RoPE type if it changes frequencies with the text's length, or None."""
    kind = _parameters(config).get("rope_type", "default")
    return kind if kind in MOVING_TYPES else None


def _parameters(config: PretrainedConfig) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Models with one rotary embedding per layer type nest them.
    return found["full_attention"] if isinstance(found.get("full_attention"), dict) else found


def _tabulate(module, arguments: dict[str, Any], count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0 to count - 1, each [count, channels], as the model computes them (in float32)."""
    with torch.no_grad():
        cos, sin = module(torch.zeros(1, 1, dtype=torch.float32), torch.arange(count).unsqueeze(0), **arguments)
    return cos[0].to(dtype), sin[0].to(dtype)


def _probed(module, apply, arguments, cos: torch.Tensor, sin: torch.Tensor) -> Rope:
    channels = _rotated_channels(apply, cos, sin)
    x = torch.randn(1, 2, len(cos), channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = _apply(apply, x, cos[None], sin[None])
    factor = float(out.square().sum() / x.square().sum())
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    return Rope(module=module, apply=apply, arguments=arguments, channels=channels, factor=factor, table={})


def _rotated_channels(apply, cos: torch.Tensor, sin: torch.Tensor) -> int:
    """As many as cos has, or twice as many in families whose cos has one number a pair."""
    width = cos.shape[-1]
    try:
        _apply(apply, cos.new_zeros(1, 2, len(cos), width), cos[None], sin[None])
        return width
    except RuntimeError:
        return 2 * width


def _check_inverse(rope: Rope, name: str) -> None:
    x = torch.randn(1, 2, _PROBE_POSITIONS, rope.channels, generator=torch.Generator().manual_seed(1)).double()
    positions = torch.arange(_PROBE_POSITIONS).unsqueeze(0)
    back = rope.inverse(rope.rotate(x, positions), positions)
    if back.shape != x.shape or float((back - x).abs().max()) > 1e-5:
        raise _refusal(name, "rotating back does not give the same keys")


def _apply(apply, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The model's function on keys alone; it takes queries and keys, or one tensor."""
    first = list(inspect.signature(apply).parameters)[:2]
    if first[1] in ("k", "key", "key_states"):
        # One head stands for the queries, whose result is not wanted.
        return apply(x[:, :1], x, cos, sin)[1]
    return apply(x, cos, sin)


def _refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"keys of {name!r} cannot be stored before RoPE: {reason}; use a recipe that stores them after RoPE."
    )
