"""What a step's numbers are chosen from: measured keys, values and queries of one layer, as the step will see them.

Shape letters: K KV heads, H query heads, G = H / K, T tokens, D head dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from kvq.quantizers import Codec
from kvq.transforms.chain import Chain


@dataclass(frozen=True, eq=False)
class Window:
    """One text's queries [H, T, D], keys and values [K, T, D], after RoPE, from its first token on."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def grouped(self, name: str) -> torch.Tensor:
        """Tokens by KV head, [K, n, D]; the queries of a group count as tokens of their KV head."""
        return getattr(self, name).unflatten(0, (self.key.shape[0], -1)).flatten(1, 2)

    def moved(self, functions: Mapping[str, Callable]) -> "Window":
        """Apply functions of [K, n, D] to some of the three."""
        tokens = self.key.shape[1]
        changed = {name: function(self.grouped(name)) for name, function in functions.items()}
        return replace(self, **{name: x.unflatten(1, (-1, tokens)).flatten(0, 1) for name, x in changed.items()})


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

    windows    of text, with the steps before the one in question applied.
    given      measurements over more text than the sample, by ``query``, ``key``, ``value``, ``weighted`` (values as
               attention weighs them); what is missing is measured on the windows.
    codec      the side's codec, with which candidates are tried.
    scaling    what the model multiplies logits with; softcap: its logit softcap.
    partner    [D]: the other channel of a rotary pair, the channel itself where there is none; second [D] bool: the
               channel is the second of its pair.
    output     [H, hidden, D]: blocks of the output projection, or None if they are not at hand.
    bias       [K, D]: bias of the key projection, before RoPE, or None.
    shared     one scale must serve all KV heads (a norm that they share stands between the projection and the cache).
    after      later steps that need no numbers (Hadamard), for trying candidates.
    exact      first tokens that the recipe keeps exact; window: last ones.
    """

    side: str
    windows: tuple[Window, ...]
    codec: Codec
    scaling: float
    partner: torch.Tensor
    second: torch.Tensor
    given: dict[str, Measured]
    softcap: float | None = None
    output: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    shared: bool = False
    after: Chain = field(default_factory=Chain)
    exact: int = 0
    window: int = 0

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.windows[0].key.shape[0]

    def tokens(self, name: str) -> torch.Tensor:
        """All tokens of the windows by KV head, [K, n, D] float64."""
        return torch.cat([window.grouped(name) for window in self.windows], dim=1).double()

    @cached_property
    def key(self) -> Measured:
        return self.given.get("key") or Measured.of(self.tokens("key"))

    @cached_property
    def query(self) -> Measured:
        return self.given.get("query") or Measured.of(self.tokens("query"))

    @cached_property
    def value(self) -> Measured:
        return self.given.get("value") or Measured.of(self.tokens("value"))

    @cached_property
    def weighted(self) -> Measured:
        """Values weighed by k (Q^T Q) k^T, the mean square of their logits (OSCAR)."""
        found = self.given.get("weighted")
        if found is None:
            keys = self.tokens("key")
            weights = ((keys @ self.query.second) * keys).sum(-1)
            found = Measured.of(self.tokens("value"), weights)
        return found

    def through(self, step) -> "Evidence":
        """What the next step sees."""
        chain = Chain((step,))
        functions = {"key": chain.write, "query": chain.dual} if self.side == "key" else {"value": chain.write}
        moved = replace(self, windows=tuple(window.moved(functions) for window in self.windows), given={})
        if "value" in functions and "weighted" in self.given:
            functions["weighted"] = chain.write
        kept = {name: held for name, held in self.given.items() if name not in functions}
        for name in functions.keys() & self.given.keys():
            kept[name] = moved._measured(name, self.given[name], functions[name])
        return replace(moved, given=kept)

    def _measured(self, name: str, held: Measured, function: Callable) -> Measured:
        """A given measurement after an affine function: mean and covariance exactly, magnitudes from the windows."""
        heads, size = held.mean.shape
        zero = function(torch.zeros(heads, 1, size, dtype=torch.float64))
        linear = function(torch.eye(size, dtype=torch.float64).expand(heads, size, size)) - zero
        tokens = self.tokens("value" if name == "weighted" else name)
        return Measured(
            absmax=tokens.abs().amax(-2),
            absmean=tokens.abs().mean(-2),
            mean=function(held.mean.unsqueeze(-2)).squeeze(-2),
            covariance=linear.transpose(-1, -2) @ held.covariance @ linear,
        )
