"""Transforms: exact changes of basis that move outliers out of a codec's way.

A kind of transform is a row of ``KINDS``: the tensors that it needs, how they are fitted, and the step that they make.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvq.errors import RecipeError
from kvq.transform_specs import TransformSpec
from kvq.transforms.align import fit_align
from kvq.transforms.balance import fit_balance
from kvq.transforms.chain import Chain, Step
from kvq.transforms.evidence import Evidence
from kvq.transforms.hadamard import Hadamard, hadamard_matrix, known_order
from kvq.transforms.principal import fit_principal
from kvq.transforms.rope_bias import RopeBias, RopeOffset, fit_rope_bias
from kvq.transforms.smooth import fit_smooth
from kvq.transforms.spectral import fit_spectral
from kvq.transforms.steps import Diagonal, Matrix, Pairs, Shift

__all__ = [
    "KINDS",
    "Chain",
    "Hadamard",
    "RopeBias",
    "RopeOffset",
    "Step",
    "build_chain",
    "hadamard_matrix",
    "needed_tensors",
]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of transform.

    build     (spec, head_dim, tensors by name) to its step.
    tensors   by name, their shapes in the letters K (KV heads) and D (head dimension); 1 for one of all heads.
    fit       (spec, evidence) to the tensors; None if there are none, or if they are learned.
    """

    build: Callable[[TransformSpec, int, Mapping[str, torch.Tensor]], Step]
    tensors: Mapping[str, str]
    fit: Callable[[TransformSpec, Evidence], dict[str, torch.Tensor]] | None = None


def fit_shift(spec: TransformSpec, evidence: Evidence) -> dict[str, torch.Tensor]:
    """``mean`` [K, D], over all tokens measured."""
    return {"mean": evidence.mean(evidence.side).float()}


def _hadamard(spec: TransformSpec, head_dim: int, tensors: Mapping[str, torch.Tensor]) -> Hadamard:
    block = spec.block or head_dim
    if head_dim % block or not known_order(block):
        fits = [b for b in range(head_dim, 1, -1) if head_dim % b == 0 and known_order(b)]
        raise RecipeError(
            f"hadamard block={block} does not fit head_dim={head_dim}: use {', '.join(map(str, fits[:3]))}, blocks for "
            "which a Hadamard matrix is known."
        )
    return Hadamard(block=block, seed=spec.seed)


def _scale(spec: TransformSpec, head_dim: int, tensors: Mapping[str, torch.Tensor]) -> Diagonal:
    return Diagonal(tensors["scale"])


def _pairs(spec: TransformSpec, head_dim: int, tensors: Mapping[str, torch.Tensor]) -> Pairs:
    return Pairs(tensors["real"], tensors["imaginary"], tensors["partner"].long())


def _matrix(spec: TransformSpec, head_dim: int, tensors: Mapping[str, torch.Tensor]) -> Matrix:
    return Matrix(tensors["matrix"])


_PAIRS = {"real": "KD", "imaginary": "KD", "partner": "D"}

KINDS = {
    "hadamard": Kind(build=_hadamard, tensors={}),
    "smooth": Kind(build=_scale, tensors={"scale": "KD"}, fit=fit_smooth),
    "align": Kind(build=_pairs, tensors=_PAIRS, fit=fit_align),
    "shift": Kind(build=lambda spec, size, found: Shift(found["mean"]), tensors={"mean": "KD"}, fit=fit_shift),
    "rope_bias": Kind(
        build=lambda spec, size, found: RopeBias(found["bias"]), tensors={"bias": "KD"}, fit=fit_rope_bias
    ),
    "spectral": Kind(build=_matrix, tensors={"matrix": "1DD"}, fit=fit_spectral),
    "balance": Kind(build=_matrix, tensors={"matrix": "KDD"}, fit=fit_balance),
    "principal": Kind(build=_matrix, tensors={"matrix": "KDD"}, fit=fit_principal),
    "learned_pairs": Kind(build=_pairs, tensors=_PAIRS),
    "learned_scale": Kind(build=_scale, tensors={"scale": "KD"}),
    "learned_rotation": Kind(build=_matrix, tensors={"matrix": "KDD"}),
    "learned_matrix": Kind(build=_matrix, tensors={"matrix": "KDD"}),
}


def needed_tensors(specs: Sequence[TransformSpec], kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name, ``transforms.{i}.{what}``, of what the steps of one side of one layer need."""
    sizes = {"K": kv_heads, "D": head_dim, "1": 1}
    return {
        f"transforms.{i}.{name}": tuple(sizes[letter] for letter in shape)
        for i, spec in enumerate(specs)
        for name, shape in KINDS[spec.kind].tensors.items()
    }


def build_chain(
    specs: Sequence[TransformSpec],
    head_dim: int,
    artefacts: Mapping[str, torch.Tensor] | None = None,
    folded: int = 0,
) -> Chain:
    """Build the transforms of one side of one layer, for all its KV heads.

    artefacts   what calibration made, by the names of ``needed_tensors``.
    folded      how many of the first steps the model's weights have taken over.

    Raises RecipeError for a step that does not fit the head dimension, or that lacks its tensors.
    """
    steps = []
    for i, spec in enumerate(specs):
        prefix, kind = f"transforms.{i}.", KINDS[spec.kind]
        found = {name: artefacts[prefix + name] for name in kind.tensors if prefix + name in (artefacts or {})}
        if len(found) < len(kind.tensors):
            raise RecipeError(
                f"transform {spec.kind!r} needs statistics of this model: run 'kvq calibrate MODEL --for RECIPE -o "
                "STATS' and pass --stats STATS."
            )
        steps.append(kind.build(spec, head_dim, found))
    return Chain(tuple(steps), folded)
