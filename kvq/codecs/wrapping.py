"""What codecs that wrap another have in common: heads side by side, and sections beside the other's."""

import dataclasses

import torch

from kvq.pages.layout import Section, SideLayout


def with_sections(layout: SideLayout, *sections: Section) -> SideLayout:
    """The inner codec's layout with further sections."""
    return dataclasses.replace(layout, extras=(*layout.extras, *sections))


def heads_together(x: torch.Tensor) -> torch.Tensor:
    """[..., K, T, D] to [..., T, K * D]."""
    return x.transpose(-3, -2).flatten(-2)


def heads_apart(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Inverse of ``heads_together``."""
    return x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def by_token(section: torch.Tensor, row_dims: int) -> torch.Tensor:
    """Merge pages and their rows: [B, (K,) P, rows, *shape] to [B, (K,) P * rows, *shape]; row_dims: len(shape)."""
    return section.flatten(-2 - row_dims, -1 - row_dims)
