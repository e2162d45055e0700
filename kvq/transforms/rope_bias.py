"""Keys without the bias of their projection (Qwen2-type models, whose key biases dwarf what keys say).

A key is RoPE_t(W x + b) = RoPE_t(W x) + RoPE_t(b). The second part is known without storing it, so it is taken away
before the codec and added again as keys are read, by the positions that the forward was given. Exact tokens keep it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvq.errors import UnsupportedModelError
from kvq.models.rope import Rope
from kvq.transform_specs import TransformSpec
from kvq.transforms.chain import Chain
from kvq.transforms.evidence import Evidence

NO_BIAS = (
    "transform 'rope_bias' takes away the bias of the key projection, and this model has none that reaches the cache: "
    "remove it from the recipe."
)


@dataclass(frozen=True, eq=False)
class RopeBias:
    """bias [K, D], of the key projection before RoPE. As a step of the chain it changes nothing: ``RopeOffset`` acts
    where the codec is."""

    bias: torch.Tensor

    def write(self, x: torch.Tensor) -> torch.Tensor:
        return x

    dual = undo = write

    def of_heads(self, heads: Sequence[int]) -> "RopeBias":
        return RopeBias(self.bias[list(heads)])


@dataclass(frozen=True, eq=False)
class RopeOffset:
    """Stands where ``Rope`` does for keys that are quantized before RoPE: ``undo`` before the codec, ``rotate`` after.

    rope    the model's rotary embedding; chain: all steps of the keys, folded or not; bias [K, D].
    """

    rope: Rope
    chain: Chain
    bias: torch.Tensor

    def undo(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Stored keys [B, K, T, D] at ``positions`` [B or 1, T] to what the codec sees."""
        return x - self._offset(x, positions)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of ``undo``."""
        return x + self._offset(x, positions)

    def _offset(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """RoPE_t(b) in the basis of the stored keys, [B or 1, K, T, D]."""
        tokens = positions.shape[1]
        bias = self.bias.to(x)[None, :, None].expand(len(positions), -1, tokens, -1)
        whole = self.chain.whole.to(x.device, x.dtype)
        return whole.write(self.rope.rotate(bias, positions)) - whole.write(torch.zeros_like(bias[:1, :, :1]))


def fit_rope_bias(spec: TransformSpec, evidence: Evidence) -> dict[str, torch.Tensor]:
    """``bias`` [K, D]."""
    if evidence.bias is None:
        raise UnsupportedModelError(NO_BIAS)
    return {"bias": evidence.bias.float()}
