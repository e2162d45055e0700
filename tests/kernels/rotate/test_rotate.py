"""The rotation, from its definition."""

import pytest
import torch

from kvq.kernels.rotate import hadamard
from kvq.kernels.types import Rotation


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_hadamard_kernel(block, inverse, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 128, generator=generator).to(device)
    rotation = Rotation(block=block, signs=(torch.randint(0, 2, (128,), generator=generator) * 2.0 - 1).to(device))
    found, ran = hadamard(x, rotation, inverse=inverse, impl="triton")
    assert ran.impl == "triton"
    # From its definition, entry by entry.
    i = torch.arange(block)
    entries = torch.tensor([[(-1.0) ** bin(int(a & b)).count("1") for b in i] for a in i], dtype=torch.float64)
    matrix = torch.block_diag(*[entries / block**0.5] * (128 // block)).to(device)
    signs = rotation.signs.double()
    want = (x.double() @ matrix) * signs if inverse else (x.double() * signs) @ matrix
    assert (found.double() - want).abs().max() < 1e-5
    back, _ = hadamard(found, rotation, inverse=not inverse, impl="triton")
    assert (back - x).abs().max() < 1e-5
