"""Attention sinks: tokens that take a large share of everyone's attention (arXiv 2309.17453).

Attention is that of a few probing queries of each window (``kvq.calib.attention.probe_weights``).
"""

from dataclasses import dataclass

import torch

from kvq.calib.observers.base import Statistic
from kvq.calib.observers.tops import Tops

PROBES = 8
# Positions whose attention is kept by head; later ones are summed up.
POSITIONS = 16


@dataclass(frozen=True, kw_only=True)
class Sinks(Statistic):
    """mass     [H, POSITIONS] float64: attention given to each of the first positions, summed over the probes.
    probes   probing queries of each head.
    first_key, first_value   [K, D] float64: of each window's first token (after RoPE), summed over windows. That token
             is nearly the same in all windows, and unlike all others where it is a sink.
    windows  how many.
    tops     the tokens that take most of a window's attention; ``strength`` is the mean share over heads and probes.
    """

    mass: torch.Tensor
    probes: int
    first_key: torch.Tensor
    first_value: torch.Tensor
    windows: int
    tops: Tops

    @classmethod
    def observe(
        cls,
        weights: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: torch.Tensor,
        valid: torch.Tensor | None,
        priority: torch.Tensor,
        counts: torch.Tensor,
    ) -> "Sinks":
        """Measure one batch.

        weights [B, H, PROBES, T] of probing queries, key and value [B, K, T, D], tokens [B, T]; counts int [B]: probes
        of each row.
        """
        share = weights.float().sum(2)  # [B, H, T]
        # Real tokens to the left, so that a column is a position.
        if valid is not None:
            order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)
            left = share.gather(2, order[:, None].expand_as(share))
        else:
            left = share
        mass = left[..., :POSITIONS].double().sum(0)
        mass = torch.nn.functional.pad(mass, (0, POSITIONS - mass.shape[-1]))
        used = counts > 0
        # The first real token of each row; argmax finds the first True.
        first = torch.zeros_like(counts) if valid is None else valid.int().argmax(1)
        place = first[:, None, None, None].expand(-1, key.shape[1], 1, key.shape[3])
        firsts = [x.gather(2, place)[used].double().sum(0).squeeze(1) for x in (key, value)]
        strength = share.mean(1) / counts.clamp(min=1)[:, None]
        return cls(
            mass=mass,
            probes=int(counts.sum()),
            first_key=firsts[0],
            first_value=firsts[1],
            windows=int(used.sum()),
            tops=Tops.observe(strength, tokens, valid, priority),
        )

    @property
    def share(self) -> torch.Tensor:
        """Share of attention on each of the first positions by query head, [H, POSITIONS] float32."""
        return (self.mass / (self.probes or float("nan"))).float()
