"""Steps that are learned: by gradients of a layer's attention output, with its keys or values fake-quantized.

What is learned is in ``learned_pairs.py``, ``learned_scale.py``, ``learned_rotation.py`` and ``learned_matrix.py``. All
begin as the identity, so what they begin from are the steps before them (a Hadamard, ``balance``). The loss is the
relative error of the attention block's output on windows of calibration text, under the recipe's own codec and token
policy; SpinQuant's is the cross-entropy of the whole network (``--end-to-end``). Every few steps the candidate is tried
on windows that are not trained on, and the best one is kept, the identity included.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvq.errors import RecipeError
from kvq.progress import tell
from kvq.settings import check_seed, is_count
from kvq.transforms.chain import Step
from kvq.transforms.fit_data import FitData
from kvq.transforms.objective import Probe, probes_error, spread, stored
from kvq.transforms.spec import TransformSpec

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


class Adam:
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


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix whose inverse is known, [K, D, D] each."""

    matrix: torch.Tensor
    inverse_matrix: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inverse_matrix

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        return q @ self.inverse_matrix.transpose(-1, -2)


@dataclass(frozen=True, kw_only=True)
class LearnedSpec(TransformSpec):
    """Settings of a learned step, which begins as the identity, after the steps before it.

    steps   optimiser steps a layer; seed: of their batches.
    """

    steps: int | None = None
    seed: int | None = None

    is_learned = True

    def check(self) -> None:
        check_seed("seed", self.seed)
        if self.steps is not None and not is_count(self.steps):
            raise RecipeError(f"steps={self.steps!r} is not a number of steps: use 1 or more.")

    def needs(self, side):
        return ["reservoir"]

    def reads_output(self, side) -> bool:
        return True

    @abstractmethod
    def learnable(self, data: FitData) -> Learnable:
        """The step in the making."""


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


def learn(spec: LearnedSpec, data: FitData) -> Learned:
    """Learn one step on the windows of ``data``; the last quarter of them, at least one, is only tried on.

    With a single window, training and trials share it. The same data and seed give the same step.
    """
    generator = torch.Generator().manual_seed(spec.seed or 0)
    steps = spec.steps or DEFAULT_STEPS
    held = max(1, len(data.windows) // 4)
    trained = data.windows[:-held] or data.windows
    probes = [Probe.of(data, window, spread(window, QUERIES)) for window in data.windows[-held:]]
    learnable = spec.learnable(data)

    quantize = data.codec.fake_quantized
    losses, trials, best = [], [], None
    for count in range(steps + 1):
        if count % max(1, steps // TRIALS) == 0 or count == steps:
            error = probes_error(data, probes, learnable.step(), quantize)
            if not trials or error < min(e for _, e in trials):
                best = {name: tensor.detach().clone() for name, tensor in learnable.numbers().items()}
            trials.append((count, error))
        if count == steps:
            break
        window = trained[int(torch.randint(len(trained), (1,), generator=generator))]
        probe = Probe.of(data, window, _random_rows(window, generator))
        loss = probe.error(data, stored(data, probe, learnable.step(), quantize))
        loss.backward()
        learnable.descend(cosine(count, steps))
        losses.append(float(loss.detach()))
        tell((count + 1) / steps)
    return Learned(numbers=best, losses=losses, trials=trials)


def _random_rows(window, generator: torch.Generator) -> torch.Tensor:
    """Positions of a step's queries, in the later three quarters of the tokens that it sees."""
    tokens = min(window.key.shape[1], TOKENS)
    first = tokens // 4
    return (first + torch.randperm(tokens - first, generator=generator)[:QUERIES]).sort().values
