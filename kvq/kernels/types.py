"""What the operations on packed pages take and give; each operation has a folder of its own."""

from dataclasses import dataclass, field

import torch

from kvq.kernels.dispatch import Choice


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked of the cache.

    q          [B, heads, L, head_dim], the last dimension contiguous; query heads of one KV head are neighbours.
    scale      softmax scale.
    positions  [B] int32: position of query token 0 of each sequence, where the first token of all (a sink, if there are
               sinks) is 0; needed with ``window`` and exact tokens. Packed tokens
               are older than every query; exact ones are masked by position.
    window     sliding window: a query sees itself and the ``window - 1`` tokens before it.
    softcap    bound of the scores, softcap * tanh(score / softcap).
    sink_logits  [heads] fp32: a learned logit a query head, in the softmax but without a value.
    """

    q: torch.Tensor
    scale: float
    positions: torch.Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class KeyFrame:
    """Where packed keys stand that are relative to their block of tokens (``kvq.transforms.frame``), as kernels see it:

        t[c] = cos[c] q[c] + sin[c] q[partner[c]],    q . key = (t matrix) . stored + t . mean

    Exact keys stand where queries do.

    block     tokens that share an origin, counted from the first packed one.
    index     [B, blocks] int32: by block, its row of ``turns``. turns: [origins, 2, head_dim] fp32, cos and sin.
    partner   [head_dim] int32. matrix [KV heads, head_dim, head_dim] fp16 times ``matrix_scale``, no column of which is
              longer than 1; mean [KV heads, head_dim] fp32; None for what changes nothing.
    growth    how many times as long as a query t is at most.
    """

    block: int
    index: torch.Tensor
    turns: torch.Tensor
    partner: torch.Tensor
    matrix: torch.Tensor | None = None
    matrix_scale: float = 1.0
    mean: torch.Tensor | None = None
    growth: float = 1.0

    def left(self, b: int, stored: torch.Tensor) -> torch.Tensor:
        """Packed keys [KV heads, tokens, head_dim] of sequence b, the first on, to where queries stand."""
        if self.matrix is not None:
            stored = stored @ (self.matrix.to(stored) / self.matrix_scale).transpose(-1, -2)
        if self.mean is not None:
            stored = stored + self.mean.to(stored).unsqueeze(1)
        token = torch.arange(stored.shape[1], device=stored.device)
        cos, sin = self.turns[self.index[b, token // self.block].long()].to(stored).unbind(1)
        return (cos * stored).index_add(-1, self.partner.long(), sin * stored)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Exact tokens of a batch.

    lengths      [B, 4] int32, counted without the sinks: tokens packed on both sides, as keys, as values, and all.
    keys         [B, KV heads, capacity, head_dim]; token t is at ``(t + key_offsets[b]) % capacity``. values likewise.
    key_offsets, value_offsets  [B] int32, not negative.
    sink_keys, sink_values      [B, KV heads, sinks, head_dim] or None; a shorter sequence uses the first of them.
    mixed_key    whether tokens may be packed as keys and exact as values; mixed_value: the other way round.
    """

    lengths: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_offsets: torch.Tensor
    value_offsets: torch.Tensor
    sink_keys: torch.Tensor | None = None
    sink_values: torch.Tensor | None = None
    mixed_key: bool = False
    mixed_value: bool = False

    @property
    def sinks(self) -> int:
        return 0 if self.sink_keys is None else self.sink_keys.shape[2]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """out [B, heads, L, head_dim]; lse [B, heads, L], natural logarithm; ran: what computed it."""

    out: torch.Tensor
    lse: torch.Tensor
    ran: Choice = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Tokens of one side that may be packed.

    x        [B, KV heads, capacity, head_dim], the last dimension contiguous; token t of sequence b is at
             ``(t + offsets[b]) % capacity``.
    ranges   [B, 2] int32: tokens [start, stop) to pack, counted from the first token of the pages; whole groups for
             axis channel.
    offsets  [B] int32; for tokens that begin at x[:, :, 0] it is minus the start, so it may be negative.
    longest  most tokens of a range, known to the host.
    """

    x: torch.Tensor
    ranges: torch.Tensor
    offsets: torch.Tensor
    longest: int
