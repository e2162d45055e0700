"""An orthogonal matrix by KV head, by Cayley SGD (SpinQuant's R2, arXiv 2405.16406)."""

import torch

from kvq.transforms.cayley import cayley_step, orthonormal
from kvq.transforms.fit_data import FitData
from kvq.transforms.learned import Dense, LearnedSpec
from kvq.transforms.spec import MATRIX, register_transform
from kvq.transforms.steps import Matrix


class RotationInTheMaking:
    # SpinQuant takes 1.5 for a cross-entropy; this loss is a relative error of a hundredth or less.
    lr = 100.0

    def __init__(self, data: FitData):
        size = len(data.partner)
        self.parameters = [torch.eye(size).repeat(data.heads, 1, 1).requires_grad_()]

    def numbers(self) -> dict[str, torch.Tensor]:
        return {"matrix": orthonormal(self.parameters[0].double()).float()}

    def step(self) -> Dense:
        (x,) = self.parameters
        return Dense(x, x.transpose(-1, -2))

    def descend(self, lr_factor: float) -> None:
        (x,) = self.parameters
        moved = cayley_step(x.detach(), x.grad, self.lr * lr_factor)
        self.parameters = [orthonormal(moved).requires_grad_()]

    def state(self) -> dict[str, torch.Tensor]:
        return {"0": self.parameters[0].detach().clone()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.parameters = [state["0"].clone().requires_grad_()]


@register_transform("learned_rotation")
class LearnedRotationSpec(LearnedSpec):
    """An orthogonal matrix."""

    tensors = MATRIX
    mixes_channels = True

    def learnable(self, data: FitData) -> RotationInTheMaking:
        return RotationInTheMaking(data)

    def build(self, head_dim, tensors) -> Matrix:
        return Matrix(tensors["matrix"])
