"""Fit the steps of one side of one layer, each on what the steps before it leave."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvq.transform_specs import TransformSpec
from kvq.transforms import KINDS, build_chain
from kvq.transforms.evidence import Evidence

# Tensors of a learned step: (its place in the chain, what it sees).
Learner = Callable[[int, Evidence], dict[str, torch.Tensor]]


def fit_steps(
    specs: Sequence[TransformSpec], evidence: Evidence, learn: Learner | None = None
) -> tuple[dict[str, torch.Tensor], Evidence]:
    """Tensors of all steps, by the names of ``kvq.transforms.needed_tensors``, and what the codec sees after them.

    learn   gives the tensors of learned steps; without it there must be none.
    """
    size, found = len(evidence.partner), {}
    for i, spec in enumerate(specs):
        kind, numbers = KINDS[spec.kind], {}
        if kind.tensors:
            after = build_chain([later for later in specs[i + 1 :] if not KINDS[later.kind].tensors], size)
            seen = replace(evidence, after=after, centred=any(later.kind == "shift" for later in specs[i + 1 :]))
            numbers = kind.fit(spec, seen) if kind.fit else learn(i, seen)
            found |= {f"transforms.{i}.{name}": tensor.contiguous() for name, tensor in numbers.items()}
        evidence = evidence.through(kind.build(spec, size, numbers))
    return found, evidence
