"""What statistics say of the numbers that a codec sees: the ``Measured`` that codecs are fitted on."""

from collections.abc import Callable

import torch

from kvq.calib.observers.bins import Bins, bin_middles
from kvq.calib.observers.histogram import bin_edges
from kvq.calib.stats import LayerStats
from kvq.errors import DataError


class MeasuredLayer:
    """Some KV heads of one side of a layer (``kvq.codecs.spec.Measured``).

    index         of the layer, for errors.
    tensor        what the statistics call it: ``key``, ``key_pre`` or ``value``.
    heads         which heads of the layer these are.
    transformed   absmax [KV heads, head_dim] after transforms; None: there are none.
    codebook      gives what the codec's levels are learned from.
    """

    def __init__(
        self,
        layer: LayerStats,
        index: int,
        tensor: str,
        heads: tuple[int, ...],
        transformed: torch.Tensor | None = None,
        codebook: Callable[[], Bins] | None = None,
    ):
        self.layer, self.index, self.tensor, self.heads = layer, index, tensor, list(heads)
        self.transformed, self.codebook = transformed, codebook

    def absmax(self) -> torch.Tensor:
        found = self.layer[f"{self.tensor}.range"].absmax if self.transformed is None else self.transformed
        found = found[self.heads]
        if not bool(found.isfinite().all()):
            raise DataError(
                f"the statistics of layer {self.index} hold a {self.tensor} maximum of {float(found.max())}, and a "
                "scale must be finite: calibrate again in float32 or bfloat16."
            )
        return found.double()

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        spread = self.layer[f"{self.tensor}.range"]
        return spread.min[self.heads].double(), spread.max[self.heads].double()

    def quantile(self, share: float) -> torch.Tensor:
        return self.layer[f"{self.tensor}.histogram"].quantile(share)[self.heads].double()

    def counts(self, reader: str) -> torch.Tensor:
        if self.transformed is not None:
            raise DataError(
                f"{reader} reads a histogram, and there is none of {self.tensor}s after transforms: use max."
            )
        return self.layer[f"{self.tensor}.histogram"].counts.sum(1)[self.heads]

    def edges(self) -> torch.Tensor:
        return bin_edges()

    def compared(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bins = self.codebook()
        return bin_middles(), bins.counts, bins.weights
