"""Keys without the bias of their projection (Qwen2-type models, whose key biases dwarf what keys say).

A key is RoPE_t(W x + b) = RoPE_t(W x) + RoPE_t(b). The second part is known without storing it, so it is taken away
before the codec and added again as keys are read, by the positions that the forward was given. Exact tokens keep it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvq.errors import RecipeError, UnsupportedModelError
from kvq.models.architecture import Attention
from kvq.models.rope import Rope
from kvq.transforms.chain import Chain, Step
from kvq.transforms.fit_data import FitData
from kvq.transforms.spec import TransformSpec, register_transform

NO_BIAS = (
    "transform 'rope_bias' takes away the bias of the key projection, and this model has none that reaches the cache: "
    "remove it from the recipe."
)


@dataclass(frozen=True, eq=False)
class RopeBias(Step):
    """bias [K, D], of the key projection before RoPE. As a step of the chain it changes nothing: ``RopeOffset`` acts
    where the codec is."""

    bias: torch.Tensor

    stays = "what it takes away is added again as keys are read"

    @property
    def offset(self) -> torch.Tensor:
        return self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    transform_query = inverse = forward

    def of_heads(self, heads: Sequence[int]) -> "RopeBias":
        return RopeBias(self.bias[list(heads)])


@dataclass(frozen=True, eq=False)
class RopeOffset:
    """Stands where ``Frame`` does: the codec sees keys after RoPE, less what the bias adds to them there.

    rope    the model's rotary embedding; chain: all steps of the keys, folded or not; bias [K, D].
    """

    rope: Rope
    chain: Chain
    bias: torch.Tensor

    # Every token has an offset of its own.
    block: ClassVar[int] = 1

    def enter(self, x: torch.Tensor, origins: torch.Tensor) -> torch.Tensor:
        """Stored keys [B, K, T, D] at positions ``origins`` [B or 1, T] to what the codec sees."""
        return x - self._offset(x, origins)

    def leave(self, x: torch.Tensor, origins: torch.Tensor) -> torch.Tensor:
        """Inverse of ``enter``."""
        return x + self._offset(x, origins)

    def _offset(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """RoPE_t(b) in the basis of the stored keys, [B or 1, K, T, D]."""
        tokens = positions.shape[1]
        bias = self.bias.to(x)[None, :, None].expand(len(positions), -1, tokens, -1)
        whole = self.chain.whole.to(x.device, x.dtype)
        return whole.forward(self.rope.rotate(bias, positions)) - whole.forward(torch.zeros_like(bias[:1, :, :1]))


@register_transform("rope_bias")
class RopeBiasSpec(TransformSpec):
    """Keys: take away the rotated bias of the key projection, and add it again when read."""

    sides = ("key",)
    tensors: ClassVar = {"bias": "KD"}
    # As a step of the chain it changes nothing.
    keeps_magnitudes = True
    why_not_framed = "takes away what is rotated already (before RoPE, 'shift' does the same)"
    # The bias is the model's own.
    is_fitted_to_positions = False

    def check_chain(self, side, before, after) -> None:
        for spec in after:
            if spec.tensors:
                raise RecipeError(
                    f"key transform {spec.kind!r} comes after 'rope_bias', and is fitted on keys with their bias: list "
                    "it before."
                )
        for spec in before:
            if spec.takes_mean:
                raise RecipeError(
                    f"key transforms 'rope_bias' and {spec.kind!r} take away one mean twice: remove one of them."
                )

    def lacking(self, attention: Attention) -> str | None:
        has_none = attention.key and (attention.key.bias is None or attention.key_norm)
        return NO_BIAS if has_none else None

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        if data.bias is None:
            raise UnsupportedModelError(NO_BIAS)
        return {"bias": data.bias.float()}

    def build(self, head_dim, tensors) -> RopeBias:
        return RopeBias(tensors["bias"])
