"""Fit the steps of one side of one layer, each on what the steps before it leave."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvq.transforms.fit_data import FitData
from kvq.transforms.spec import TransformSpec, build_chain

# Tensors of a learned step: (its place in the chain, what it sees).
Learner = Callable[[int, FitData], dict[str, torch.Tensor]]


def fit_steps(
    specs: Sequence[TransformSpec],
    data: FitData,
    learn: Learner | None = None,
    framed: int = 0,
    block: int | None = None,
) -> tuple[dict[str, torch.Tensor], FitData]:
    """Tensors of all steps, by the names of ``kvq.transforms.needed_tensors``, and what the codec sees after them.

    learn   gives the tensors of learned steps; without it there must be none.
    framed  how many of the last steps act on keys relative to blocks of ``block`` tokens.
    """
    size, found = len(data.partner), {}
    for i, spec in enumerate(specs):
        if framed and i == len(specs) - framed:
            data = data.framed(block)
        numbers = {}
        if spec.tensors:
            after = build_chain([later for later in specs[i + 1 :] if not later.tensors], spec.width(size))
            seen = replace(data, after=after, centred=any(later.takes_mean for later in specs[i + 1 :]))
            numbers = learn(i, seen) if spec.is_learned else spec.fit(seen)
            found |= {f"transforms.{i}.{name}": tensor.contiguous() for name, tensor in numbers.items()}
        data = data.through(spec.build(size, numbers))
        size = spec.width(size)
    return found, data
