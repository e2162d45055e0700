"""Attention of queries that all see the same exact keys: an output and its log-sum-exp, to be merged with others."""

import torch
from torch import Tensor

from kvq.kernels.decode_attention.products import partial_attention
from kvq.shapes import Float, checked


@checked
def exact_partial(
    q: Float[Tensor, "B K M D"], keys: Float[Tensor, "B K T D"], values: Float[Tensor, "B K T D"]
) -> tuple[Float[Tensor, "B K M D"], Float[Tensor, "B K M"]]:
    """Softmax attention of q [B, K, M, D], already scaled, over keys and values [B, K, T, D], nothing hidden.

    Returns the output [B, K, M, D] and the log-sum-exp of its scores [B, K, M]. On a CPU no scores are held.
    """
    if q.device.type == "cpu":
        # The kernel behind scaled_dot_product_attention, which also gives the log-sum-exp.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, False, scale=1.0)
    return partial_attention(q @ keys.transpose(-1, -2), lambda weights: weights @ values)
