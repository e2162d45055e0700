"""The matrix that splits the work evenly between what is stored and what reads it.

Let C be the covariance of stored tokens and M the second moment of what reads them: queries for keys, the output
projection for values. After k' = k P, q' = q P^-T and a quantizer whose error is the same for all channels of a token,

    error  ~  tr(P^T C P) / D  *  tr(P^-1 M P^-T)

Both traces are (tr L^1/2), its least value, where P^T C P = P^-1 M P^-T = L^1/2 with L the eigenvalues of C M:

    P = M^1/2 U L^-1/4,      U L U^T = M^1/2 C M^1/2

(for orthogonal P the error is tr C tr M / D, whatever P). A Hadamard afterwards makes all channels alike. The mean of
keys is left out of C, because it costs nothing once ``shift`` or a scale by channel takes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvq.errors import DataError
from kvq.settings import check_flag
from kvq.shapes import Float, checked
from kvq.transforms.fit_data import FitData
from kvq.transforms.hadamard_matrix import hadamard_matrix
from kvq.transforms.spec import MATRIX, TransformSpec, register_transform
from kvq.transforms.steps import Matrix

# Share of a channel's own moment that is added to it: measured moments of dead directions are noise.
RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class MomentsSpec(TransformSpec):
    """A matrix that follows from the moments of what is stored and of what reads it."""

    tensors = MATRIX
    mixes_channels = True

    def needs(self, side):
        read = ("query.range", "query.moments") if side == "key" else ()
        return (f"{side}.range", f"{side}.moments", *read)

    def reads_output(self, side) -> bool:
        return side == "value"

    def build(self, head_dim, tensors) -> Matrix:
        return Matrix(tensors["matrix"])


@register_transform("balance")
@dataclass(frozen=True, kw_only=True)
class BalanceSpec(MomentsSpec):
    """The closed-form matrix that gives what is stored and what reads it one covariance, then a Hadamard.

    alone   as if all channels were read alike, by the second moment about zero of what is stored: for values, whose
            mean costs range like everything else where no shift takes it. No weights are read.
    """

    alone: bool | None = None

    def check(self) -> None:
        check_flag("alone", self.alone)

    def needs(self, side):
        return (f"{side}.range", f"{side}.moments") if self.alone else super().needs(side)

    def reads_output(self, side) -> bool:
        return side == "value" and not self.alone

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        if self.alone:
            stored = data.moment(data.side).double()
            reader = torch.eye(stored.shape[-1], dtype=torch.float64).expand_as(stored)
        else:
            stored, reader = reading_moments(data)
        return {"matrix": balancing(stored, reader).float()}


def reading_moments(data: FitData) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance of what is stored, and second moment of what reads it, each [K, D, D] float64."""
    return data.covariance(data.side).double(), reading_moment(data)


def reading_moment(data: FitData) -> torch.Tensor:
    """The latter alone."""
    return (data.moment("query") if data.side == "key" else _output_moment(data)).double()


@checked
def balancing(stored: Float[Tensor, "K D D"], reader: Float[Tensor, "K D D"]) -> Float[Tensor, "K D D"]:
    """P H of symmetric [K, D, D] moments."""
    return joint_basis(stored, reader) @ hadamard_matrix(stored.shape[-1])


@checked
def joint_basis(stored: Float[Tensor, "K D D"], reader: Float[Tensor, "K D D"]) -> Float[Tensor, "K D D"]:
    """P of symmetric [K, D, D] moments, columns by falling eigenvalue."""
    stored, reader = _ridged(stored), _ridged(reader)
    values, vectors = torch.linalg.eigh(reader)
    root = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(root @ stored @ root))
    top = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * torch.where(top < 0, -1.0, 1.0)
    # Products of two ridges bound the eigenvalues from below; the clamp is for rounding.
    quarter = values.clamp_min(values.amax(-1, keepdim=True) * 1e-12).pow(-0.25)
    return root @ (vectors * quarter.unsqueeze(-2))


def _ridged(moment: torch.Tensor) -> torch.Tensor:
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    # A channel that was never used has no moment of its own.
    floor = (diagonal.mean(-1, keepdim=True) * RIDGE**2).clamp_min(torch.finfo(moment.dtype).tiny)
    return moment + torch.diag_embed(RIDGE * diagonal + floor)


def _output_moment(data: FitData) -> torch.Tensor:
    """Sum over a KV head's query heads of W_o^T W_o, [K, D, D]."""
    if data.output is None:
        raise DataError("'balance' of values needs the weights of the model: fit it beside its checkpoint.")
    blocks = data.output.double().unflatten(0, (data.heads, -1))
    return torch.einsum("kgnd,kgne->kde", blocks, blocks)
