"""Channels sorted by what their errors cost: the Karhunen-Loeve transform of what is read (transform coding).

With C the covariance of stored tokens and M the second moment of what reads them (``balance.py``), the columns of

    P = M^1/2 U L^-1/4,      U L U^T = M^1/2 C M^1/2,      L falling

make both diagonal: P^T C P = P^-1 M P^-T = L^1/2. So channel c of k' = k P has errors that are independent of those of
the others and cost L_c per unit of its relative error. No basis has a smaller product of costs (Hadamard's inequality),
which is what matters once every channel may have bits of its own, as in the codec ``tiers``.

Low rank is the first channels alone (``rank``): no subspace of r channels loses less of what is read. Papers choose it
by C about zero, without what reads (``metric: stored``; an SVD of weights whitened by inputs has the same subspace), or
by the weights alone (``metric: weights``: C = W W^T, as if inputs were white).

Over a layer (``over: layer``) C is of the channels of all KV heads together, M has a block for each head, and latent
channels are shared out among the heads evenly (``Latent``). Every query then reads the channels of all heads: K times
the products of one head, for a basis that also knows what heads have in common.
"""

from dataclasses import dataclass, replace

import torch

from kvq.errors import DataError, RecipeError
from kvq.pages.layout import ATOM
from kvq.settings import check_choice, is_count, is_number
from kvq.transforms.balance import MomentsSpec, joint_basis, reading_moment, reading_moments
from kvq.transforms.fit_data import FitData
from kvq.transforms.spec import register_transform
from kvq.transforms.spectral import eigenvectors
from kvq.transforms.steps import Latent, Matrix

OVER = ("head", "layer")
METRICS = ("read", "stored", "weights")


@register_transform("principal")
@dataclass(frozen=True, kw_only=True)
class PrincipalSpec(MomentsSpec):
    """Independent channels, sorted by what their errors cost, all of them or the first.

    over     ``head`` (default): each head has a basis; ``layer``: the KV heads of a layer have one together.
    rank     channels that are stored for each head: a multiple of 16, or a share of the head dimension, rounded to
             one; all if not given. Exact tokens keep theirs.
    metric   what an error costs: ``read`` (default), what readers see of it; ``stored``, its own size, the basis being
             orthogonal; ``weights``, the same for inputs that are white, from the weights of the projection.
    """

    over: str | None = None
    rank: int | float | None = None
    metric: str | None = None

    def check(self) -> None:
        check_choice("over", self.over, OVER)
        check_choice("metric", self.metric, METRICS)
        share = is_number(self.rank) and 0 < self.rank < 1
        if self.rank is not None and not share and not (is_count(self.rank) and self.rank % ATOM == 0):
            raise RecipeError(
                f"rank={self.rank!r} is no number of channels: use a multiple of {ATOM}, or a share between 0 and 1."
            )

    def check_chain(self, side, before, after) -> None:
        for step in after:
            if self.over == "layer" and step.tensors:
                raise RecipeError(
                    f"{side} transform {step.kind!r} comes after a basis over the layer, which leaves nothing by head "
                    "that it could be fitted to: list it before, or remove it."
                )

    @property
    def loses(self) -> bool:
        return self.over == "layer" or self.rank is not None

    def width(self, head_dim: int) -> int:
        if self.rank is None:
            return head_dim
        if self.rank >= 1 and self.rank > head_dim:
            raise RecipeError(f"rank={self.rank} is more than head_dim={head_dim}: use at most that, or a share.")
        return int(self.rank) if self.rank >= 1 else max(ATOM, round(self.rank * head_dim / ATOM) * ATOM)

    def needs(self, side):
        found = [f"{side}.range"]
        if self.metric != "weights":
            found.append(f"{side}.joint_moments" if self.over == "layer" else f"{side}.moments")
        return (*found, "query.range", "query.moments") if side == "key" and not self.metric else tuple(found)

    def reads_output(self, side) -> bool:
        return side == "value" and self.metric in (None, "read")

    def reads_projection(self, side) -> bool:
        return self.metric == "weights"

    def artefacts(self, kv_heads, head_dim):
        found = super().artefacts(kv_heads, head_dim)
        if self.over != "layer":
            return found
        size = kv_heads * head_dim
        return {"matrix": replace(found["matrix"], shape=(size, size))}

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        return {"matrix": (self._joint(data) if self.over == "layer" else self._by_head(data)).float()}

    def _by_head(self, data: FitData) -> torch.Tensor:
        if self.metric == "weights":
            return eigenvectors(_weights(data) @ _weights(data).transpose(-1, -2))
        if self.metric == "stored":
            return eigenvectors(data.moment(data.side).double())
        return joint_basis(*reading_moments(data))

    def _joint(self, data: FitData) -> torch.Tensor:
        if self.metric == "weights":
            rows = _weights(data).flatten(0, 1)
            return eigenvectors(rows @ rows.T)
        stored = data.joint_covariance(data.side).double()
        if self.metric == "stored":
            mean = data.mean(data.side).double().flatten()
            return eigenvectors(stored + torch.outer(mean, mean))
        reader = torch.block_diag(*reading_moment(data))
        return joint_basis(stored.unsqueeze(0), reader.unsqueeze(0))[0]

    def build(self, head_dim, tensors) -> Matrix | Latent:
        matrix = tensors["matrix"]
        if not self.loses:
            return Matrix(matrix)
        heads = matrix.shape[0] // head_dim if self.over == "layer" else matrix.shape[0]
        return Latent(matrix, self.width(head_dim), heads)


def _weights(data: FitData) -> torch.Tensor:
    if data.projection is None:
        raise DataError("metric=weights needs the weights of the model: fit it beside its checkpoint.")
    return data.projection.double()
