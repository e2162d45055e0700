"""Metadata formats, exhaustively against their definitions."""

import itertools

import pytest
import torch

from kvq.pages.meta import from_e4m3, from_ue5m3, load_pair, store_range, to_e4m3, to_ue5m3


def ue5m3_numbers() -> list[float]:
    """By definition: 5 exponent bits, bias 15, 3 mantissa bits, no sign; exponent 31 is not a number."""
    subnormal = [m / 8 * 2.0**-14 for m in range(8)]
    return subnormal + [(1 + m / 8) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(8)]


def test_every_ue5m3_byte_stands_for_its_number():
    table = ue5m3_numbers()
    assert len(table) == 0xF8
    decoded = from_ue5m3(torch.arange(0xF8, dtype=torch.int32).to(torch.uint8), torch.float64)
    assert decoded.tolist() == table


def test_every_fp16_number_goes_to_the_nearest_ue5m3_ties_to_even():
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16)
    codes, table = to_ue5m3(halves), ue5m3_numbers()
    found = from_ue5m3(codes, torch.float64)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]
    lower = torch.bucketize(halves.double(), torch.tensor(middles, dtype=torch.float64))
    upper = torch.bucketize(halves.double(), torch.tensor(middles, dtype=torch.float64), right=True)
    even = torch.where(lower % 2 == 0, lower, upper)
    assert torch.equal(found, torch.tensor(table, dtype=torch.float64)[even])
    assert codes[-1] == 0xF7


def test_e4m3_saturates():
    assert from_e4m3(to_e4m3(torch.tensor([1e5, -1e5, 448.0, 0.0])), torch.float32).tolist() == [448, -448, 448, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["float16", "e4m3", "zero8", "range8"])
def test_what_is_stored_is_near_what_was_wanted(form, bits):
    generator = torch.Generator().manual_seed(0)
    low = -torch.rand(7, 64, generator=generator, dtype=torch.float64) * 3
    high = torch.rand(7, 64, generator=generator, dtype=torch.float64) * 3 + 0.1
    sections = store_range(low, high, bits, form)
    scale, minimum = load_pair(sections, bits, form, low.dtype)
    steps = 2**bits - 1
    relative = {"float16": 2**-11, "e4m3": 2**-4, "zero8": 2**-4, "range8": 2**-4}[form]
    if form == "e4m3":
        relative = max(relative, 2.0**-10 / float((high - low).min() / steps))
    wanted = (high - minimum) / steps if form == "range8" else (high - low) / steps
    assert ((scale - wanted).abs() <= wanted * relative * 1.01).all()
    slack = {
        "float16": low.abs() * 2**-11,
        "e4m3": low.abs() * 2**-4 + 2.0**-10,
        # A byte of the span, and what rounding the scale moves the span by.
        "zero8": scale * steps / 510 + low.abs() * 2**-4,
        "range8": (low.amax(-1, keepdim=True) - low.amin(-1, keepdim=True)) / 255 * 1.01,
    }[form]
    assert ((minimum - low).abs() <= slack * 1.01 + 1e-12).all()


def test_range8_never_starts_above_the_lowest_number():
    low = torch.randn(50, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    _, minimum = load_pair(store_range(low, low + 1, 2, "range8"), 2, "range8", low.dtype)
    assert (minimum <= low).all()


@pytest.mark.parametrize("constant", [0.0, 2.0, -3.5])
def test_constant_groups(constant):
    """fp16 stores the constant; zero8 keeps it to the precision of its scale, and range8 to that of its minima."""
    low = torch.full((3, 16), constant, dtype=torch.float64)
    for form, slack in (("float16", 0.0), ("e4m3", 0.0), ("zero8", abs(constant) / 14), ("range8", 0.0)):
        scale, minimum = load_pair(store_range(low, low.clone(), 2, form), 2, form, low.dtype)
        code = torch.zeros_like(low) if constant < 0 or form != "zero8" else torch.full_like(low, 3)
        assert ((code * scale + minimum - constant).abs() <= slack).all(), form
