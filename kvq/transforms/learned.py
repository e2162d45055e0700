"""Steps that are learned: by gradients of a layer's attention output, with its keys or values fake-quantized.

    learned_pairs      exp(l + i t) by rotary pair and KV head              Adam        OmniQuant (2308.13137), exact
    learned_scale      exp(l) by channel of values                          Adam        OmniQuant
    learned_rotation   X by KV head, orthogonal                             Cayley SGD  SpinQuant's R2 (2405.16406)
    learned_matrix     U diag(exp(l)) V^T, U and V by the Cayley transform  AdamW       FlatQuant (2410.09426)

All begin as the identity, so what they begin from are the steps before them (a Hadamard, ``balance``). The loss is the
relative error of the attention block's output on windows of calibration text, under the recipe's own codec and token
policy; SpinQuant's is the cross-entropy of the whole network (``--end-to-end``). Every few steps the candidate is tried
on windows that are not trained on, and the best one is kept, the identity included.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvq.transform_specs import TransformSpec
from kvq.transforms.align import pair_numbers
from kvq.transforms.cayley import cayley, cayley_step, orthonormal
from kvq.transforms.chain import Step
from kvq.transforms.evidence import Evidence
from kvq.transforms.objective import Probe, probes_error, spread, stored
from kvq.transforms.steps import Diagonal, Pairs

DEFAULT_STEPS = 200
# Tokens of a window and queries that one step sees.
TOKENS, QUERIES = 512, 64
TRIALS = 8


class Learnable(Protocol):
    """A step in the making: its parameters, the step that they make now, and the tensors to keep."""

    parameters: list[torch.Tensor]

    def step(self) -> Step: ...

    def numbers(self) -> dict[str, torch.Tensor]: ...

    def descend(self, lr_factor: float) -> None:
        """One optimiser step from the gradients; ``lr_factor`` falls from 1 to 0."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on."""

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take up a state again."""


class _Adam:
    """Parameters under Adam."""

    def __init__(self, parameters: list[torch.Tensor], lr: float):
        self.parameters = [parameter.requires_grad_() for parameter in parameters]
        self.lr, self.optimiser = lr, torch.optim.Adam(self.parameters, lr=lr)

    def descend(self, lr_factor: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimiser.step()
        self.optimiser.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        found = {}
        for i, parameter in enumerate(self.parameters):
            found[f"{i}"] = parameter.detach().clone()
            found |= {f"{i}.{name}": x.clone() for name, x in self.optimiser.state.get(parameter, {}).items()}
        return found

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(state[f"{i}"])
            held = {n.removeprefix(f"{i}."): x.clone() for n, x in state.items() if n.startswith(f"{i}.")}
            if held:
                self.optimiser.state[parameter] = held


class LearnedPairs(_Adam):
    def __init__(self, evidence: Evidence):
        heads = 1 if evidence.shared else evidence.heads
        self.evidence = evidence
        # One number a pair: that of its first channel.
        self.first = torch.where(evidence.second, evidence.partner, torch.arange(len(evidence.partner)))
        self.alone = evidence.partner == torch.arange(len(evidence.partner))
        shape = (heads, len(evidence.partner))
        super().__init__([torch.zeros(shape), torch.zeros(shape)], lr=0.02)

    def numbers(self) -> dict[str, torch.Tensor]:
        logs, angles = (p.index_select(-1, self.first).expand(self.evidence.heads, -1) for p in self.parameters)
        # A norm that heads share takes only scales.
        angles = torch.where(self.alone | torch.tensor(self.evidence.shared), 0.0, angles)
        return pair_numbers(logs.exp() * angles.cos(), logs.exp() * angles.sin(), self.evidence)

    def step(self) -> "_Dense":
        # As matrices: gradients of gathered channels are slow.
        pairs, unit = Pairs(**self.numbers()), torch.eye(len(self.first)).expand(self.evidence.heads, -1, -1)
        return _Dense(pairs.write(unit), pairs.undo(unit))


class LearnedScale(_Adam):
    def __init__(self, evidence: Evidence):
        super().__init__([torch.zeros(evidence.heads, len(evidence.partner))], lr=0.02)

    def numbers(self) -> dict[str, torch.Tensor]:
        return {"scale": self.parameters[0].exp()}

    def step(self) -> Diagonal:
        return Diagonal(**self.numbers())


@dataclass(frozen=True, eq=False)
class _Dense:
    """A matrix whose inverse is known, [K, D, D] each."""

    matrix: torch.Tensor
    inverse: torch.Tensor

    def write(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inverse

    def dual(self, q: torch.Tensor) -> torch.Tensor:
        return q @ self.inverse.transpose(-1, -2)


class LearnedRotation:
    # SpinQuant takes 1.5 for a cross-entropy; this loss is a relative error of a hundredth or less.
    lr = 100.0

    def __init__(self, evidence: Evidence):
        size = len(evidence.partner)
        self.parameters = [torch.eye(size).repeat(evidence.heads, 1, 1).requires_grad_()]

    def numbers(self) -> dict[str, torch.Tensor]:
        return {"matrix": orthonormal(self.parameters[0].double()).float()}

    def step(self) -> _Dense:
        (x,) = self.parameters
        return _Dense(x, x.transpose(-1, -2))

    def descend(self, lr_factor: float) -> None:
        (x,) = self.parameters
        moved = cayley_step(x.detach(), x.grad, self.lr * lr_factor)
        self.parameters = [orthonormal(moved).requires_grad_()]

    def state(self) -> dict[str, torch.Tensor]:
        return {"0": self.parameters[0].detach().clone()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.parameters = [state["0"].clone().requires_grad_()]


class LearnedMatrix(_Adam):
    def __init__(self, evidence: Evidence):
        heads, size = evidence.heads, len(evidence.partner)
        super().__init__(
            [torch.zeros(heads, size, size), torch.zeros(heads, size, size), torch.zeros(heads, size)], 0.005
        )

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right, logs = self.parameters
        u, v = (cayley(p - p.transpose(-1, -2)) for p in (left, right))
        return u, v.transpose(-1, -2), logs.unsqueeze(-1)

    def step(self) -> _Dense:
        u, v, logs = self._factors()
        return _Dense(u @ (logs.exp() * v), v.transpose(-1, -2) @ ((-logs).exp() * u.transpose(-1, -2)))

    def numbers(self) -> dict[str, torch.Tensor]:
        return {"matrix": self.step().matrix}


LEARNABLES: dict[str, Callable[[Evidence], Learnable]] = {
    "learned_pairs": LearnedPairs,
    "learned_scale": LearnedScale,
    "learned_rotation": LearnedRotation,
    "learned_matrix": LearnedMatrix,
}


def composed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of one step that does what two steps of one kind do after each other."""
    if "matrix" in first:
        return {"matrix": first["matrix"] @ second["matrix"]}
    if "scale" in first:
        return {"scale": first["scale"] * second["scale"]}
    # Numbers of the second channel of a pair are conjugate, and conjugates multiply alike.
    a, b, c, d = first["real"], first["imaginary"], second["real"], second["imaginary"]
    return {"real": a * c - b * d, "imaginary": a * d + b * c, "partner": first["partner"]}


def cosine(count: int, steps: int) -> float:
    """Factor of the learning rate after ``count`` of ``steps`` steps: from 1 to 0, as all of the papers do."""
    return 0.5 * (1 + math.cos(math.pi * count / steps))


@dataclass(frozen=True, kw_only=True)
class Learned:
    """numbers   tensors of the step.
    losses    training loss of every step; trials: (step, error on windows not trained on), the first at step 0.
    """

    numbers: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    trials: list[tuple[int, float]] = field(default_factory=list)


def learn(spec: TransformSpec, evidence: Evidence) -> Learned:
    """Learn one step on the windows of ``evidence``; the last quarter of them, at least one, is only tried on.

    With a single window, training and trials share it. The same evidence and seed give the same step.
    """
    generator = torch.Generator().manual_seed(spec.seed or 0)
    steps = spec.steps or DEFAULT_STEPS
    held = max(1, len(evidence.windows) // 4)
    trained = evidence.windows[:-held] or evidence.windows
    probes = [Probe.of(evidence, window, spread(window, QUERIES)) for window in evidence.windows[-held:]]
    learnable = LEARNABLES[spec.kind](evidence)

    quantize = evidence.codec.fake_quantized
    losses, trials, best = [], [], None
    for count in range(steps + 1):
        if count % max(1, steps // TRIALS) == 0 or count == steps:
            error = probes_error(evidence, probes, learnable.step(), quantize)
            if not trials or error < min(e for _, e in trials):
                best = {name: tensor.detach().clone() for name, tensor in learnable.numbers().items()}
            trials.append((count, error))
        if count == steps:
            break
        window = trained[int(torch.randint(len(trained), (1,), generator=generator))]
        probe = Probe.of(evidence, window, _random_rows(window, generator))
        loss = probe.error(evidence, stored(evidence, probe, learnable.step(), quantize))
        loss.backward()
        learnable.descend(cosine(count, steps))
        losses.append(float(loss.detach()))
    return Learned(numbers=best, losses=losses, trials=trials)


def _random_rows(window, generator: torch.Generator) -> torch.Tensor:
    """Positions of a step's queries, in the later three quarters of the tokens that it sees."""
    tokens = min(window.key.shape[1], TOKENS)
    first = tokens // 4
    return (first + torch.randperm(tokens - first, generator=generator)[:QUERIES]).sort().values
