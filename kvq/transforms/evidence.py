"""What a step's numbers are chosen from: measured keys, values and queries of one layer, as the step will see them.

Shape letters: W windows of text, K KV heads, H query heads, G = H / K, T tokens, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvq.quantizers import Codec
from kvq.transforms.chain import Chain


@dataclass(frozen=True, eq=False)
class Sample:
    """Contiguous windows of one layer's queries [W, H, T, D] and keys and values [W, K, T, D], after RoPE."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def grouped(self, name: str) -> torch.Tensor:
        """All tokens by KV head, [K, n, D] float64; the queries of a group count as tokens of their KV head."""
        x = getattr(self, name).double()
        heads = self.key.shape[1]
        return x.unflatten(1, (heads, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3)


@dataclass(frozen=True, eq=False)
class Measured:
    """Of one tensor, by KV head: absmax, absmean, mean [K, D]; covariance [K, D, D], about the mean; all float64."""

    absmax: torch.Tensor
    absmean: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, weights: torch.Tensor | None = None) -> "Measured":
        """Measure tokens x [K, n, D]; ``weights`` [K, n] weigh mean and covariance."""
        x = x.double()
        weights = torch.ones_like(x[..., 0]) if weights is None else weights.double()
        share = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)
        mean = (x * share).sum(-2)
        centred = x - mean.unsqueeze(-2)
        covariance = centred.transpose(-1, -2) @ (centred * share)
        return cls(absmax=x.abs().amax(-2), absmean=x.abs().mean(-2), mean=mean, covariance=covariance)

    @property
    def second(self) -> torch.Tensor:
        """Second moment about zero, [K, D, D]."""
        return self.covariance + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """One layer, seen from one side (``key`` or ``value``).

    sample     windows of text, with the steps before the one in question applied.
    given      measurements over more text than the sample, by ``query``, ``key``, ``value``, ``weighted`` (values as
               attention weighs them); what is missing is measured on the sample.
    codec      the side's codec, with which candidates are tried.
    scaling    what the model multiplies logits with; softcap: its logit softcap.
    partner    [D]: the other channel of a rotary pair, the channel itself where there is none; second [D] bool: the
               channel is the second of its pair.
    output     [H, hidden, D]: blocks of the output projection, or None if they are not at hand.
    bias       [K, D]: bias of the key projection, before RoPE, or None.
    shared     one scale must serve all KV heads (a norm that they share stands between the projection and the cache).
    after      later steps that need no numbers (Hadamard), for trying candidates.
    """

    side: str
    sample: Sample
    codec: Codec
    scaling: float
    partner: torch.Tensor
    second: torch.Tensor
    given: dict[str, Measured]
    softcap: float | None = None
    output: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    shared: bool = False
    after: Chain = Chain()

    @cached_property
    def key(self) -> Measured:
        return self.given.get("key") or Measured.of(self.sample.grouped("key"))

    @cached_property
    def query(self) -> Measured:
        return self.given.get("query") or Measured.of(self.sample.grouped("query"))

    @cached_property
    def value(self) -> Measured:
        return self.given.get("value") or Measured.of(self.sample.grouped("value"))

    @cached_property
    def weighted(self) -> Measured:
        """Values weighed by k (Q^T Q) k^T, the mean square of their logits (OSCAR)."""
        found = self.given.get("weighted")
        if found is None:
            keys = self.sample.grouped("key")
            weights = ((keys @ self.query.second) * keys).sum(-1)
            found = Measured.of(self.sample.grouped("value"), weights)
        return found

    def through(self, step) -> "Evidence":
        """What the next step sees."""
        chain = Chain((step,))
        if self.side == "key":
            moved = {"key": chain.write, "query": chain.dual}
        else:
            moved = {"value": chain.write, "weighted": chain.write}
        sample = replace(
            self.sample, **{name: self._by_head(name, moved[name]) for name in moved if name != "weighted"}
        )
        return replace(self, sample=sample, given=self._moved(sample, moved))

    def _by_head(self, name: str, function: Callable) -> torch.Tensor:
        """Apply a function of [..., K, n, D] to a tensor of the sample."""
        x = getattr(self.sample, name)
        heads = self.sample.key.shape[1]
        return function(x.unflatten(1, (heads, -1)).flatten(2, 3)).unflatten(2, (-1, x.shape[2])).flatten(1, 2)

    def _moved(self, sample: Sample, moved: dict[str, Callable]) -> dict[str, Measured]:
        """Given measurements after an affine function: mean and covariance exactly, magnitudes from the sample."""
        found = dict(self.given)
        for name in moved.keys() & found.keys():
            held, function = found[name], moved[name]
            heads, size = held.mean.shape
            zero = function(torch.zeros(heads, 1, size, dtype=torch.float64))
            linear = function(torch.eye(size, dtype=torch.float64).expand(heads, size, size)) - zero
            tokens = sample.grouped("value" if name == "weighted" else name)
            found[name] = Measured(
                absmax=tokens.abs().amax(-2),
                absmean=tokens.abs().mean(-2),
                mean=function(held.mean.unsqueeze(-2)).squeeze(-2),
                covariance=linear.transpose(-1, -2) @ held.covariance @ linear,
            )
        return found

