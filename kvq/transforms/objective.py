"""How much a layer's attention output changes when its keys or values are quantized: what every search minimises."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from kvq.transforms.fit_data import FitData, Window


@dataclass(frozen=True, eq=False)
class Probe:
    """The first tokens of a window, and some queries with what they see exactly.

    rows      [R]: positions of the queries.
    query     [K, G, R, D]; key, value [K, T, D]; scores [K, G, R, T], masked; output [R, hidden] or head outputs.
    read      [R, T] bool: tokens that the query reads from packed pages.
    packed    slice of the tokens that can be packed.
    """

    rows: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scores: torch.Tensor
    output: torch.Tensor
    read: torch.Tensor
    packed: slice

    @classmethod
    def of(cls, data: FitData, window: Window, rows: torch.Tensor) -> "Probe":
        """Queries at ``rows`` [R] of a window and all tokens up to the last of them."""
        tokens = int(rows.max()) + 1
        key, value = window.key[:, :tokens].float(), window.value[:, :tokens].float()
        query = window.query.float().unflatten(0, (len(key), -1))[:, :, rows]
        first, block = min(data.exact, tokens), data.codec.block_tokens
        packed = slice(first, first + (tokens - first) // block * block)
        column = torch.arange(tokens)
        # Recent tokens and the query's own are exact.
        read = column < rows.unsqueeze(1) - data.window
        read &= (column >= packed.start) & (column < packed.stop)
        hidden = column > rows.unsqueeze(1)
        scores = _scores(data, query, key).masked_fill(hidden, -torch.inf)
        output = _output(data, _weighted(scores.softmax(-1), value))
        return cls(rows, query, key, value, scores, output, read, packed)

    def error(self, data: FitData, stored: torch.Tensor) -> torch.Tensor:
        """Relative error of the attention output, [], if packed tokens are read as ``stored`` [K, packed, D]."""
        if data.side == "key":
            key = torch.cat([self.key[:, : self.packed.start], stored, self.key[:, self.packed.stop :]], dim=1)
            weights = torch.where(self.read, _scores(data, self.query, key), self.scores).softmax(-1)
            heads = _weighted(weights, self.value)
        else:
            weights = self.scores.softmax(-1)
            change = stored - self.value[:, self.packed]
            heads = _weighted(weights, self.value) + _weighted((weights * self.read)[..., self.packed], change)
        return relative_error(_output(data, heads), self.output)


def _scores(data: FitData, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    scores = (query.flatten(1, 2) @ key.transpose(-1, -2)).unflatten(1, query.shape[1:3]) * data.scaling
    return scores if data.softcap is None else data.softcap * torch.tanh(scores / data.softcap)


def _weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[K, G, R, T] times [K, T, D]: [K, G, R, D]."""
    return (weights.flatten(1, 2) @ value).unflatten(1, weights.shape[1:3])


def _output(data: FitData, heads: torch.Tensor) -> torch.Tensor:
    """What the layer adds to the residual stream, [R, hidden], of head outputs [K, G, R, D]; without the output
    projection the head outputs themselves."""
    heads = heads.flatten(0, 1)
    if data.output is None:
        return heads
    joined = data.output.to(heads).permute(1, 0, 2).flatten(1)
    return heads.transpose(0, 1).flatten(1) @ joined.T


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Mean square of the difference over the mean square of what is exact, []."""
    return (found - exact).square().sum() / exact.square().sum().clamp_min(torch.finfo(exact.dtype).tiny)


def attention_error(data: FitData, step) -> float:
    """Relative error of the attention output if the side goes through ``step`` (and the steps after it) and its codec,
    under the recipe's token policy."""
    return attention_errors(data, [step])[0]


def attention_errors(data: FitData, steps: Iterable, windows: int = 4, queries: int = 64) -> list[float]:
    """``attention_error`` of each step. The queries are spread over the second half of each of the first windows."""
    probes = [Probe.of(data, window, spread(window, queries)) for window in data.windows[:windows]]

    def quantize(x: torch.Tensor) -> torch.Tensor:
        return data.codec.decode(data.codec.encode(x), x.dtype)

    return [probes_error(data, probes, step, quantize) for step in steps]


def spread(window: Window, queries: int) -> torch.Tensor:
    """Positions of queries over the second half of a window."""
    tokens = window.key.shape[1]
    return torch.linspace(tokens // 2, tokens - 1, min(queries, tokens - tokens // 2)).long()


@torch.no_grad()
def probes_error(data: FitData, probes: list[Probe], step, quantize: Callable) -> float:
    """Mean error over probes, with ``quantize`` as the codec's round trip."""
    errors = [probe.error(data, stored(data, probe, step, quantize)) for probe in probes]
    return float(sum(errors)) / len(errors)


def stored(data: FitData, probe: Probe, step, quantize: Callable) -> torch.Tensor:
    """What packed tokens of a probe are read as, in the model's basis, [K, packed, D]."""
    x = (probe.key if data.side == "key" else probe.value)[:, probe.packed]
    framed = data.frame is not None
    x = data.entered(x) if framed else x
    written = step.forward(x)
    mean = step.forward(data.mean(data.side).to(x).unsqueeze(-2)) if data.centred else 0
    found = step.inverse(data.after.inverse(quantize(data.after.forward(written - mean))) + mean)
    return data.left(found) if framed else found
