"""Transforms: exact changes of basis that move outliers out of a codec's way. They have never seen a model."""

from collections.abc import Mapping, Sequence

import torch

from kvq.errors import RecipeError
from kvq.specs import TransformSpec
from kvq.transforms.chain import Chain, Step
from kvq.transforms.hadamard import Hadamard, hadamard_matrix

__all__ = ["Chain", "Hadamard", "Step", "build_chain", "build_step", "hadamard_matrix"]


def build_chain(
    specs: Sequence[TransformSpec], head_dim: int, artefacts: Sequence[Mapping[str, torch.Tensor]] | None = None
) -> Chain:
    """Build the transforms of one side of one layer.

    artefacts   what calibration made for each spec, by name; None where nothing is needed.
    """
    own = artefacts or [{} for _ in specs]
    return Chain(tuple(build_step(spec, head_dim, found) for spec, found in zip(specs, own)))


def build_step(spec: TransformSpec, head_dim: int, artefacts: Mapping[str, torch.Tensor]) -> Step:
    """Build one transform for a head dimension. Raises RecipeError for one that does not fit it."""
    block = spec.block or head_dim
    if head_dim % block or block & (block - 1):
        raise RecipeError(
            f"hadamard block={block} does not fit head_dim={head_dim}: use a power of two that divides it, such as "
            f"{head_dim & -head_dim}."
        )
    return Hadamard(block=block, seed=spec.seed)
