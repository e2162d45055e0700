"""Keys relative to their block: where a codec may stand so that what is fitted to keys holds at every position.

A key after RoPE is R_j k, j its position. With o the position of the first token of the key's block of u tokens,

    stored     enter(R_j k) = forward(R_(j-o) k)                    angles of 0 to u - 1, whatever the text's length
    read       (R_i q) . (R_j k) = q'' . stored + bias              one rotation of the query for each block
               q'' = transform_query(R_-o R_i q),  bias = (R_-o R_i q) . inverse(0)

u = 1 is before RoPE. Statistics of such keys follow from those before RoPE: the second moment is the mean over r < u of
R_r S R_r^T, the mean likewise. Exact tokens stay as the model gives them, so a chain in a frame may lose channels
(``Latent``), of keys that stay after RoPE and of values too: then there is no rotation, and no origin matters. YaRN
scales rotated keys and queries: what is stored is without that factor, and queries carry it twice.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from kvq.kernels.types import KeyFrame
from kvq.models.rope import Rope
from kvq.transforms.chain import Chain

# Tokens of a block that share an origin, where a recipe says no more.
FRAME_TOKENS = 64
# Offsets that are averaged over at a time.
_OFFSETS = 16
# What bounds a column of the matrix that the Triton kernels read with (``kvq.kernels.types.KeyFrame``).
_LONGEST_COLUMN = 1.0
_Reader = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """Where the codec of ``heads`` KV heads sees keys, or values.

    rope    the model's rotary embedding; None: this layer's keys are not rotated, or stay so, or these are values.
    block   tokens that share an origin, the position of the first of them; 1: keys stand before RoPE.
    chain   steps in these coordinates.
    """

    rope: Rope | None
    block: int
    heads: int
    head_dim: int
    chain: Chain

    def enter(self, keys: torch.Tensor, origins: torch.Tensor | None = None) -> torch.Tensor:
        """Keys [B, K, T, D] after RoPE to what the codec sees; ``origins`` [B or 1, T]: of their blocks, where there is
        a rotation.

        16-bit keys come out in float32.
        """
        turned = keys if self.rope is None else self.rope.inverse(keys, origins)
        return self._chain(turned).forward(turned)

    def leave(self, stored: torch.Tensor, origins: torch.Tensor | None = None) -> torch.Tensor:
        """Inverse of ``enter``."""
        turned = self._chain(stored).inverse(stored)
        return turned if self.rope is None else self.rope.rotate(turned, origins)

    def queries(self, q: torch.Tensor, origins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(q'' [B, K, N, M, R], bias [B, K, N, M]) of queries [B, K, M, D] at their positions, for N blocks with
        ``origins`` [B or 1, N]: q . leave(stored) = q'' . stored + bias.

        R: stored channels of a head, those of all heads where they are ``joint`` (as ``merged`` has them)."""
        B, K, M, D = q.shape
        blocks = origins.shape[1]
        turned = q.unsqueeze(2).expand(B, K, blocks, M, D).reshape(B, K, blocks * M, D)
        if self.rope is not None:
            turned = self.rope.transposed(turned, origins.repeat_interleave(M, dim=1))
        shape = (B, K, blocks, M)
        if self.joint:
            back, mean = self._shared(turned)
            return (turned @ back.transpose(-1, -2)).view(*shape, -1), (turned * mean.unsqueeze(-2)).sum(-1).view(shape)
        chain = self._chain(turned)
        mean = chain.inverse(turned.new_zeros(K, 1, self.width))
        return chain.transform_query(turned).view(*shape, -1), (turned * mean).sum(-1).view(shape)

    def outputs(self, stored: torch.Tensor) -> torch.Tensor:
        """What attention gives of values, [B, K, M, D], from sums of stored ones with weights that sum to one, [B, K,
        M, R] as for ``queries``."""
        if not self.joint:
            return self._chain(stored).inverse(stored)
        back, mean = self._shared(stored)
        return stored @ back + mean.unsqueeze(-2)

    @property
    def joint(self) -> bool:
        """Whether every head's numbers are spread over the stored channels of all."""
        return self.chain.joint

    @property
    def loses(self) -> bool:
        """Whether what is stored is less than the model's numbers, or of all heads together."""
        return self.joint or self.width < self.head_dim

    @cached_property
    def width(self) -> int:
        """Stored channels of a head."""
        return self.chain.forward(torch.zeros(self.heads, 1, self.head_dim, dtype=torch.float64)).shape[-1]

    def _shared(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P [K, K R, D], m [K, D]) of ``inverse`` of joint channels: head k has x P[k] + m[k]."""
        key = like.device, like.dtype
        if key not in self._backs:
            unit = torch.eye(self.heads * self.width, dtype=torch.float64)
            parts = self.chain.inverse(unit.view(-1, self.heads, 1, self.width))
            mean = self.chain.inverse(unit.new_zeros(self.heads, 1, self.width))
            back = (parts - mean).squeeze(2).transpose(0, 1)
            self._backs[key] = back.to(like).contiguous(), mean.squeeze(1).to(like)
        return self._backs[key]

    def reader(self, device: torch.device, dtype: torch.dtype, *, of_keys: bool = False) -> _Reader:
        """(matrix [K, D, D], mean [K, D]) with q'' = t matrix and bias = t . mean for t = R_-o q: what kernels take.
        None for what changes nothing. ``of_keys``: the matrix transposed, for keys that leave the frame instead."""
        if not self.chain:
            return None, None
        key = device, dtype, of_keys
        if key not in self._readers:
            unit = torch.eye(self.head_dim, dtype=torch.float64).expand(self.heads, -1, -1)
            mean = self.chain.inverse(torch.zeros_like(unit[:, :1]))[:, 0]
            matrix = self.chain.transform_query(unit)
            matrix = (matrix.transpose(-1, -2) if of_keys else matrix).to(device, dtype).contiguous()
            self._readers[key] = matrix, mean.to(device, dtype).contiguous() if bool(mean.any()) else None
        return self._readers[key]

    def key_frame(self, index: torch.Tensor, turns: torch.Tensor) -> KeyFrame:
        """As the Triton kernels read it. index [B, blocks] int32: by block, its row of ``turns`` [origins, 2, D] fp32,
        (cos, sin) of ``self.turns``; where both are. Heads must have all channels, and a basis of their own."""
        assert not self.loses, "the Triton kernels read one matrix a head"
        device = turns.device
        if device not in self._kernel_readers:
            matrix, mean = self.reader(torch.device("cpu"), torch.float64)
            scale = 1.0
            if matrix is not None:
                longest = float(matrix.norm(dim=1).max().clamp_min(1e-30))
                scale = 2.0 ** math.floor(math.log2(_LONGEST_COLUMN / longest))
                matrix = (matrix * scale).half().to(device)
            mean = None if mean is None else mean.float().to(device)
            numbers = {"matrix": matrix, "matrix_scale": scale, "mean": mean}
            growth = 1.0 if self.rope is None else self.rope.factor**0.5
            self._kernel_readers[device] = numbers | {"partner": self.partner.int().to(device), "growth": growth}
        return KeyFrame(block=self.block, index=index, turns=turns, **self._kernel_readers[device])

    def turns(self, origins: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [*origins, D], of t = R_-o q in whatever layout the model has its pairs:
        t[c] = cos[c] q[c] + sin[c] q[partner[c]], with ``partner`` of this frame."""
        if self.rope is None:
            shape = *origins.shape, self.head_dim
            return torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        flat, second = origins.reshape(1, -1), self._second
        ones = second.to(dtype).expand(1, 1, flat.shape[1], -1)
        by_second = self.rope.transposed(ones, flat)[0, 0]
        by_first = self.rope.transposed(1 - ones, flat)[0, 0]
        cos, sin = torch.where(second, by_second, by_first), torch.where(second, by_first, by_second)
        return cos.view(*origins.shape, -1), sin.view(*origins.shape, -1)

    @property
    def partner(self) -> torch.Tensor:
        """[D] int64: the other channel of every rotary pair, the channel itself where there is none."""
        return self._pairs[0]

    @property
    def _second(self) -> torch.Tensor:
        return self._pairs[1]

    @cached_property
    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rope is None:
            return torch.arange(self.head_dim), torch.zeros(self.head_dim, dtype=torch.bool)
        return self.rope.partners(self.head_dim)

    @cached_property
    def _backs(self) -> dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]]:
        return {}

    @cached_property
    def _readers(self) -> dict[tuple[torch.device, torch.dtype, bool], _Reader]:
        return {}

    @cached_property
    def _kernel_readers(self) -> dict[torch.device, dict]:
        return {}

    def _chain(self, x: torch.Tensor) -> Chain:
        return self.chain.to(x.device, x.dtype)


def turned_moments(
    rope: Rope | None, mean: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor, *, reads: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [K, D] and second moment [K, D, D] of keys in a frame, from those before RoPE: averages over the ``offsets``
    [n] at which they stand in their block. ``reads``: of queries instead, at offsets from the block's origin."""
    if rope is None:
        return mean, second
    found = [torch.zeros_like(mean), torch.zeros_like(second)]
    for part in offsets.split(_OFFSETS):

        def turned(x: torch.Tensor, part=part) -> torch.Tensor:
            x = x.expand(len(part), *x.shape[-3:])
            places = part.unsqueeze(1).expand(-1, x.shape[2])
            back = rope.transposed if reads else rope.inverse
            return back(rope.rotate(x, places), torch.zeros_like(places))

        found[0] += turned(mean.unsqueeze(-2)).sum(0).squeeze(-2)
        found[1] += turned(turned(second).transpose(-1, -2)).sum(0)
    return found[0] / len(offsets), found[1] / len(offsets)


def merged(stored: torch.Tensor) -> torch.Tensor:
    """Stored channels of all heads side by side: [B, K, ..., R] to [B, 1, ..., K R]."""
    return stored.movedim(1, -2).flatten(-2).unsqueeze(1)


def block_origins(positions: torch.Tensor, block: int) -> torch.Tensor:
    """Origins [B, T] of tokens at ``positions`` [B, T], the first of which begins a block."""
    return positions[:, ::block].repeat_interleave(block, dim=1)[:, : positions.shape[1]]
