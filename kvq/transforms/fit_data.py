"""What a step's numbers are chosen from: measured keys, values and queries of one layer, as the step will see them.

Shape letters: K KV heads, H query heads, G = H / K, T tokens, D head dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from kvq.codecs import Codec
from kvq.errors import DataError
from kvq.models.rope import Rope
from kvq.transforms.chain import Chain
from kvq.transforms.frame import Frame, block_origins, turned_moments


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


# Queries that read a block stand at such distances from its origin: all that a long context has, evenly.
LONGEST_DISTANCE, DISTANCES = 4096, 128

# Measurements of one tensor by KV head, float64: absmax, absmean, mean [K, D]; covariance [K, D, D], about the mean;
# joint [K D, K D], that of the channels of all heads.
Measured = Mapping[str, torch.Tensor]


def measure(x: torch.Tensor, weights: torch.Tensor | None = None) -> Measured:
    """Measure tokens x [K, n, D]; ``weights`` [K, n] weigh mean and covariance."""
    x = x.double()
    weights = torch.ones_like(x[..., 0]) if weights is None else weights.double()
    share = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)
    mean = (x * share).sum(-2)
    centred = x - mean.unsqueeze(-2)
    covariance = centred.transpose(-1, -2) @ (centred * share)
    return {"absmax": x.abs().amax(-2), "absmean": x.abs().mean(-2), "mean": mean, "covariance": covariance}


@dataclass(frozen=True, kw_only=True, eq=False)
class FitData:
    """One layer, seen from one side (``key`` or ``value``).

    heads      KV heads.
    windows    of text, with the steps before the one in question applied.
    given      measurements over more text than the windows, of ``query``, ``key`` and ``value``, and of ``query_pre``
               and ``key_pre``, which are before RoPE; what is missing is measured on the windows.
    codec      the side's codec, with which candidates are tried.
    scaling    what the model multiplies logits with; softcap: its logit softcap.
    partner    [D]: the other channel of a rotary pair, the channel itself where there is none; second [D] bool: the
               channel is the second of its pair.
    output     [H, hidden, D]: blocks of the output projection, or None if they are not at hand.
    projection [K, D, hidden]: blocks of the side's own projection, or None.
    bias       [K, D]: bias of the key projection, before RoPE, or None.
    shared     one scale must serve all KV heads (a norm that they share stands between the projection and the cache).
    after      later steps that need no numbers (Hadamard), for trying candidates.
    centred    a later step takes the mean away, so that only what varies costs range.
    exact      first tokens that the recipe keeps exact; window: last ones.
    rope       the model's rotary embedding, None where it leaves the layer's keys alone; longest: positions it has.
    frame      where the step in question and the steps before it act, with these as its chain; None: after RoPE. The
               windows are after RoPE all the same.
    """

    side: str
    heads: int
    windows: tuple[Window, ...]
    codec: Codec
    scaling: float
    partner: torch.Tensor
    second: torch.Tensor
    given: Mapping[str, Measured]
    softcap: float | None = None
    output: torch.Tensor | None = None
    projection: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    shared: bool = False
    after: Chain = field(default_factory=Chain)
    centred: bool = False
    exact: int = 0
    window: int = 0
    rope: Rope | None = None
    longest: int = LONGEST_DISTANCE
    frame: Frame | None = None

    def tokens(self, name: str) -> torch.Tensor:
        """All tokens of the windows by KV head, [K, n, D] float64. Raises DataError if there are no windows."""
        if self.frame is not None and name == "query":
            raise DataError(
                "the statistics hold no 'query_pre.moments', of queries before RoPE: run 'kvq calibrate' again with "
                "--for RECIPE, or with --full."
            )
        if not self.windows:
            raise DataError(
                "the statistics hold no token vectors ('reservoir'): run 'kvq calibrate' again with --for RECIPE, or "
                "with --full."
            )
        found = [window.grouped(name) for window in self.windows]
        if self.frame is not None and name == "key":
            found = [self.entered(key[:, self.exact :]) for key in found]
        return torch.cat(found, dim=1).double()

    def entered(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys after RoPE of one text, the first being that after the exact ones, [K, T, D], as the step sees them."""
        return self.frame.enter(keys.unsqueeze(0), self._origins(keys)).squeeze(0)

    def left(self, keys: torch.Tensor) -> torch.Tensor:
        """Inverse of ``entered``."""
        return self.frame.leave(keys.unsqueeze(0), self._origins(keys)).squeeze(0)

    def _origins(self, keys: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(self.exact, self.exact + keys.shape[1]).unsqueeze(0)
        return block_origins(positions, self.frame.block)

    def absmax(self, name: str) -> torch.Tensor:
        """Largest magnitude of ``query``, ``key`` or ``value``, [K, D]."""
        return self._of(name, "absmax")

    def absmean(self, name: str) -> torch.Tensor:
        """Mean magnitude, [K, D]."""
        return self._of(name, "absmean")

    def mean(self, name: str) -> torch.Tensor:
        """[K, D]."""
        return self._of(name, "mean")

    def covariance(self, name: str) -> torch.Tensor:
        """Second moment about the mean, [K, D, D]."""
        return self._of(name, "covariance")

    def joint_covariance(self, name: str) -> torch.Tensor:
        """The same of the channels of all heads together, [K D, K D]."""
        given = self.given.get(name, {})
        if "joint" in given:
            return given["joint"]
        tokens = self.tokens(name)
        return measure(tokens.transpose(0, 1).flatten(1).unsqueeze(0))["covariance"][0]

    def moment(self, name: str) -> torch.Tensor:
        """Second moment about zero, [K, D, D]."""
        mean = self.mean(name)
        return self.covariance(name) + mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def _of(self, name: str, what: str) -> torch.Tensor:
        given = self.given.get(name, {})
        if what in given:
            return given[what]
        if name not in self._measured:
            self._measured[name] = measure(self.tokens(name))
        return self._measured[name][what]

    @cached_property
    def _measured(self) -> dict[str, Measured]:
        return {}

    def framed(self, block: int) -> "FitData":
        """The same where keys stand relative to blocks of so many tokens, from what is given of keys and queries before
        RoPE: a key at every offset in its block alike, a query at every distance that attention has."""
        far = min(LONGEST_DISTANCE, self.longest)
        offsets = {"key": torch.arange(block), "query": torch.arange(0, far, max(1, far // DISTANCES))}
        given = dict(self.given)
        for name, own in offsets.items():
            held = self.given.get(f"{name}_pre", {})
            given[name] = {}
            if "mean" in held:
                outer = held["mean"].unsqueeze(-1) * held["mean"].unsqueeze(-2)
                second = held.get("covariance", 0) + outer
                mean, second = turned_moments(self.rope, held["mean"], second, own, reads=name == "query")
                given[name] = {"mean": mean}
                if "covariance" in held:
                    given[name]["covariance"] = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
                if "joint" in held:
                    given[name]["joint"] = self._turned_joint(held, own) - torch.outer(mean.flatten(), mean.flatten())
        size = len(self.partner)
        frame = Frame(rope=self.rope, block=block, heads=self.heads, head_dim=size, chain=Chain())
        return replace(self, given=given, frame=frame)

    def _turned_joint(self, held: Measured, offsets: torch.Tensor) -> torch.Tensor:
        """Second moment about zero over all heads, [K D, K D], of keys in a frame: heads are turned alike."""
        mean = held["mean"].flatten()
        second = held["joint"] + torch.outer(mean, mean)
        size = len(self.partner)
        # Blocks of two heads, which come out transposed.
        blocks = second.view(self.heads, size, self.heads, size).permute(0, 2, 3, 1).flatten(0, 1)
        _, turned = turned_moments(self.rope, torch.zeros_like(blocks[..., 0]), blocks, offsets)
        return turned.view(self.heads, self.heads, size, size).transpose(1, 2).reshape(second.shape)

    def through(self, step) -> "FitData":
        """What the next step sees."""
        chain = Chain((step,))
        functions = {self.side: chain.forward}
        if self.side == "key":
            functions["query"] = chain.transform_query
        # What comes before a frame commutes with RoPE.
        if self.frame is None:
            functions |= {f"{name}_pre": function for name, function in functions.items() if name != "value"}
        if step.joint:
            # Measurements by head do not say what it leaves: token vectors do.
            functions = {self.side: chain.forward}
            given = {name: {} if name in ("query", self.side) else held for name, held in self.given.items()}
        else:
            given = {
                name: _moved(held, functions[name]) if name in functions else held for name, held in self.given.items()
            }
        if self.frame is not None:
            frame = replace(self.frame, chain=Chain((*self.frame.chain.steps, step)))
            return replace(self, frame=frame, given=given)
        moves = {name: function for name, function in functions.items() if not name.endswith("_pre")}
        return replace(self, windows=tuple(window.moved(moves) for window in self.windows), given=given)


def _moved(held: Measured, function: Callable) -> Measured:
    """Measurements after an affine function: mean and covariance; magnitudes too if it only scales channels."""
    if not held:
        return {}
    heads, size = next(iter(held.values())).shape[:2]
    zero = function(torch.zeros(heads, 1, size, dtype=torch.float64))
    linear = function(torch.eye(size, dtype=torch.float64).expand(heads, size, size)) - zero
    found = {}
    if "mean" in held:
        found["mean"] = function(held["mean"].unsqueeze(-2)).squeeze(-2)
    if "covariance" in held:
        found["covariance"] = linear.transpose(-1, -2) @ held["covariance"] @ linear
    if "joint" in held:
        every = torch.block_diag(*linear)
        found["joint"] = every.T @ held["joint"] @ every
    scale = linear.diagonal(dim1=-2, dim2=-1)
    if not bool(zero.any()) and torch.equal(linear, torch.diag_embed(scale)):
        found |= {name: held[name] * scale.abs() for name in ("absmax", "absmean") if name in held}
    return found
