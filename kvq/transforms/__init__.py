"""Transforms: exact changes of basis that move outliers out of a codec's way.

A kind of transform is one file: its settings in a recipe, which say what it needs and how it is fitted
(``TransformSpec``), and the step that it makes (``Step``). The modules of this package register themselves
(``kvq.registry``); nothing lists them.
"""

from kvq.transforms.chain import Chain, Step
from kvq.transforms.spec import (
    TRANSFORMS,
    Transforms,
    TransformSpec,
    build_chain,
    build_transforms,
    needed_tensors,
    register_transform,
    transform_spec,
)

__all__ = [
    "TRANSFORMS",
    "Chain",
    "Step",
    "TransformSpec",
    "Transforms",
    "build_chain",
    "build_transforms",
    "needed_tensors",
    "register_transform",
    "transform_spec",
]
