"""FP8 E4M3 against a table of its 256 numbers."""

import pytest
import torch

from kvq.codecs import Float8Codec
from kvq.errors import DataError


def e4m3_numbers() -> torch.Tensor:
    """All finite E4M3 magnitudes by the format's definition: 4 exponent bits, bias 7, 3 mantissa bits, no infinity."""
    numbers = [m / 8 * 2.0**-6 for m in range(8)]
    numbers += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.037])
def test_stored_numbers_are_the_nearest_of_the_format(scale):
    x = torch.randn(65, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20 * scale
    codec = Float8Codec(head_dim=16, scale=scale)
    decoded = codec.decode(codec.encode(x), torch.float64)
    table = torch.cat([-e4m3_numbers(), e4m3_numbers()]) * scale
    nearest = (x.unsqueeze(-1) - table).abs().amin(-1)
    assert torch.allclose((decoded - x).abs(), nearest, rtol=0, atol=1e-12)


def test_numbers_beyond_the_range_saturate():
    codec = Float8Codec(head_dim=16, scale=0.5)
    x = torch.full((1, 16), 1e4)
    assert codec.decode(codec.encode(x), torch.float32).unique().item() == 224.0


def test_nan_is_refused():
    with pytest.raises(DataError, match="NaN"):
        Float8Codec(head_dim=16).encode(torch.full((1, 16), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_toward_zero_takes_the_largest_number_not_beyond(dtype):
    """As a conversion does that cuts bits off: subnormal numbers and numbers beyond the range included."""
    x = torch.cat([torch.randn(4, 16) * scale for scale in (1e-3, 1e-2, 1.0, 200.0)]).to(dtype)
    codec = Float8Codec(head_dim=16, rounding="toward_zero")
    decoded = codec.decode(codec.encode(x), torch.float64)
    numbers = e4m3_numbers()
    wanted = torch.stack([numbers[numbers <= abs(float(v))].max() * (1 if v >= 0 else -1) for v in x.flatten()])
    assert torch.equal(decoded.flatten(), wanted)
