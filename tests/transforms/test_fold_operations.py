"""Law: a fold is the product that it stands for, in float64, rounded once to each dtype."""

import pytest
import torch

from kvq.transforms import fold as fold_module
from kvq.transforms.fold import Columns, Gamma, Rows, Scale, fold


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_is_the_product_with_its_diagonal_to_the_bit(axis, block, monkeypatch):
    monkeypatch.setattr(fold_module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 31, generator=generator).bfloat16()
    span, factor = slice(5, 18), torch.rand(13, generator=generator, dtype=torch.float64) + 0.5
    product = (Columns if axis else Rows)(span, torch.diag(factor))
    found = fold(weight, (Scale(span, factor, axis),))
    assert torch.equal(found, fold(weight, (product,)))
    assert not torch.equal(found, weight)
    if axis == 0:
        assert torch.equal(fold(weight[:, 0], (Scale(span, factor, 0),)), found[:, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_folded_is_rounded_once_to_any_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(77, 51, generator=generator).bfloat16()
    matrix = torch.randn(26, 26, generator=generator, dtype=torch.float64)
    norm = Gamma(torch.rand(77 * 51, generator=generator, dtype=torch.float64), 1)
    rows = weight.double()
    # In the order of the fold itself: another order of sums may end in another number.
    rows[5:31] = matrix @ weight[5:31].double()
    columns = weight.double()
    columns[:, 5:31] = weight[:, 5:31].double() @ matrix
    for operation, exact in (
        (Rows(slice(5, 31), matrix), rows),
        (Columns(slice(5, 31), matrix), columns),
        (norm, (weight.double().flatten() + 1).mul(norm.factor).sub(1).view(77, 51)),
    ):
        found = fold(weight, (operation,), dtype)
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))
        if dtype.itemsize == 2:
            assert torch.equal(found, fold(weight, (operation,), torch.float32).to(dtype))
            assert not torch.equal(found.double(), exact)
        assert torch.equal(fold(weight, (operation,)), exact.bfloat16())
