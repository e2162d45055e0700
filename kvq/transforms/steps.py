"""The few forms that a step takes; how their numbers are chosen is another matter (``smooth.py``, ``balance.py``, ...).

    Diagonal   k' = k / s             q' = q s             s by head and channel
    Pairs      z' = z c               w' = w / conj(c)     z, w: the two channels of a rotary pair as complex numbers
    Shift      k' = k - m             q' = q               adds one number to all logits of a query
    Matrix     k' = k P               q' = q P^-T          P invertible
    Latent     k' = k P_r             q' = q (P^-T)_r      the first r channels of k P, of a head or of all together

Values are undone by the inverse: o = o' P^-1, and o = o' + m since attention weights sum to one. Tensors of a step hold
the KV heads of its group, [K, ...]; x is [..., K, T, D].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvq.errors import RecipeError
from kvq.transforms.chain import Step


@dataclass(frozen=True, eq=False)
class Diagonal(Step):
    """scale [K, D], positive: what a stored number is multiplied with to be the model's again."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.scale.to(x).unsqueeze(-2)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.to(x).unsqueeze(-2)

    # q s . k / s = q . k
    transform_query = inverse

    def of_heads(self, heads: Sequence[int]) -> "Diagonal":
        return Diagonal(self.scale[list(heads)])


@dataclass(frozen=True, eq=False)
class Pairs(Step):
    """Multiply every pair of channels, as a complex number, by one of its own.

    real, imaginary   [K, D]: of the number that belongs to the channel's pair; for the second channel of a pair the
                      imaginary part is negated, and it is 0 for a channel without partner.
    partner           [D] int64: the other channel of the pair, the channel itself if there is none.

    x'[a] = real x[a] - imaginary x[b],  x'[b] = real x[b] + imaginary x[a]  for a pair (a, b).
    """

    real: torch.Tensor
    imaginary: torch.Tensor
    partner: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._times(x, self.real, self.imaginary)

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        # 1 / conj(c) = c / |c|^2
        return self._times(q, *self._inverse)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        real, imaginary = self._inverse
        return self._times(x, real, -imaginary)

    @cached_property
    def _inverse(self) -> tuple[torch.Tensor, torch.Tensor]:
        """c / |c|^2; the inverse of c is its conjugate."""
        real, imaginary = self.real.double(), self.imaginary.double()
        square = real.square() + imaginary.square()
        return real / square, imaginary / square

    def _times(self, x: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
        swapped = x.index_select(-1, self.partner.to(x.device))
        return x * real.to(x).unsqueeze(-2) - swapped * imaginary.to(x).unsqueeze(-2)

    def of_heads(self, heads: Sequence[int]) -> "Pairs":
        own = list(heads)
        return Pairs(self.real[own], self.imaginary[own], self.partner)


@dataclass(frozen=True, eq=False)
class Shift(Step):
    """mean [K, D]: subtracted from what is stored. Exact only where attention weights sum to one and nothing bends the
    logits (no softcap, no sink logits)."""

    mean: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.mean.to(x).unsqueeze(-2)

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        return q

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mean.to(x).unsqueeze(-2)

    def of_heads(self, heads: Sequence[int]) -> "Shift":
        return Shift(self.mean[list(heads)])


@dataclass(frozen=True, eq=False)
class Matrix(Step):
    """matrix [K, D, D], or [1, D, D] for all heads: P of x' = x P."""

    matrix: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.to(x)

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        return q @ self._inverse.transpose(-1, -2).to(q)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._inverse.to(x)

    @cached_property
    def _inverse(self) -> torch.Tensor:
        return torch.linalg.inv(self.matrix.double())

    def of_heads(self, heads: Sequence[int]) -> "Matrix":
        return self if self.matrix.shape[0] == 1 else Matrix(self.matrix[list(heads)])


@dataclass(frozen=True, eq=False)
class Latent(Step):
    """The first channels of k P: of each head's channels, P [K, D, D], or of those of all heads together, P [K D, K D].

    width   channels that are stored for each head.
    heads   K.

    Over all heads channel c of k P lies with head c % K at place c // K, so that the heads' stored channels are alike.
    Readers get the model's channels back (``inverse``), without what lay in the others.
    """

    matrix: torch.Tensor
    width: int
    heads: int

    @property
    def joint(self) -> bool:
        return self.matrix.ndim == 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.joint:
            return x @ self._first.to(x)
        return (x.transpose(-3, -2).flatten(-2) @ self._first.to(x)).unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        if not self.joint:
            return x @ self._back.to(x)
        return (x.transpose(-3, -2).flatten(-2) @ self._back.to(x)).unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        if self.joint:
            raise NotImplementedError("a query reads the channels of all heads: Frame.queries")
        return q @ self._back.transpose(-1, -2).to(q)

    @cached_property
    def _first(self) -> torch.Tensor:
        return self.matrix[..., self._kept]

    @cached_property
    def _back(self) -> torch.Tensor:
        return torch.linalg.inv(self.matrix.double())[..., self._kept, :]

    @property
    def _kept(self) -> torch.Tensor:
        """Columns of P that are stored, head by head."""
        if not self.joint:
            return torch.arange(self.width)
        return torch.arange(self.width * self.heads).view(self.width, self.heads).T.flatten()

    def of_heads(self, heads: Sequence[int]) -> "Latent":
        if not self.joint:
            return Latent(self.matrix[list(heads)], self.width, len(heads))
        if list(heads) != list(range(self.heads)):
            raise RecipeError(
                f"a basis over a layer has channels of all its {self.heads} heads, and heads {list(heads)} are stored "
                "apart: give all heads of the layer the same settings, or take 'over: head'."
            )
        return self
