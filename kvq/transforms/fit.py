"""Fit the steps of one side of one layer, each on what the steps before it leave."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvq.specs import TransformSpec
from kvq.transforms import KINDS, build_chain
from kvq.transforms.evidence import Evidence

# Learns a step that has no closed form: (spec, evidence) to its tensors.
Learner = Callable[[TransformSpec, Evidence], dict[str, torch.Tensor]]


def fit_steps(
    specs: Sequence[TransformSpec], evidence: Evidence, learn: Learner | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of all steps, by the names of ``kvq.transforms.needed_tensors``.

    learn   for learned steps; without it a recipe must have none.
    """
    size, found = len(evidence.partner), {}
    for i, spec in enumerate(specs):
        kind = KINDS[spec.kind]
        if kind.tensors:
            after = build_chain([s for s in specs[i + 1 :] if not KINDS[s.kind].tensors], size)
            seen = replace(evidence, after=after)
            numbers = kind.fit(spec, seen) if kind.fit else learn(spec, seen)
            found |= {f"transforms.{i}.{name}": tensor.contiguous() for name, tensor in numbers.items()}
        else:
            numbers = {}
        evidence = evidence.through(kind.build(spec, size, numbers))
    return found
