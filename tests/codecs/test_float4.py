"""MXFP4 and NVFP4 bit for bit, against the formats' definitions in exact fractions."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from kvq.codecs import codec_spec
from kvq.codecs.float4 import Float4Codec
from kvq.errors import RecipeError

E2M1 = [Fraction(0), Fraction(1, 2), Fraction(1), Fraction(3, 2), Fraction(2), Fraction(3), Fraction(4), Fraction(6)]


def e4m3(code: int) -> Fraction:
    """A non-negative E4M3 number: 4 exponent bits, bias 7, 3 mantissa bits."""
    exponent, mantissa = divmod(code, 8)
    return (
        Fraction(mantissa, 8) / 2**6 if exponent == 0 else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    )


E4M3 = [e4m3(code) for code in range(0x7F)]


def nearest_even(x: Fraction, table: list[Fraction]) -> int:
    """Index of the nearest entry, ties to the even index, beyond the last one the last."""
    return min(range(len(table)), key=lambda i: (abs(table[i] - x), i % 2))


def reference(block: list[float], kind: str, scale: float) -> tuple[int, list[int], list[Fraction]]:
    """(scale byte, codes, numbers) of one block by definition."""
    numbers = [Fraction(x) for x in block]
    top = max(abs(x) for x in numbers)
    if kind == "mxfp4":
        exponent = -127 if top == 0 else max(-127, math.floor(math.log2(top)) - 2)
        byte, step = exponent + 127, Fraction(2) ** exponent
    else:
        byte = nearest_even(top / 6 / Fraction(scale), E4M3)
        step = E4M3[byte] * Fraction(scale)
    codes, decoded = [], []
    for x, given in zip(numbers, block):
        magnitude = nearest_even(abs(x) / step, E2M1) if step else 0
        sign = math.copysign(1, given) < 0
        codes.append(magnitude + 8 * sign)
        decoded.append((-1 if sign else 1) * E2M1[magnitude] * step)
    return byte, codes, decoded


def codec_of(kind: str, scale: float = 1.0) -> Float4Codec:
    block, meta = (32, "e8m0") if kind == "mxfp4" else (16, "e4m3")
    return Float4Codec(head_dim=2 * block, block=block, meta=meta, scale=scale)


def check(x: torch.Tensor, codec: Float4Codec, kind: str) -> None:
    """Compare blocks [n, head_dim] with the definition."""
    encoded = codec.encode(x)
    decoded = codec.decode(encoded, torch.float64)
    for row in range(len(x)):
        for i, start in enumerate(range(0, codec.head_dim, codec.block)):
            where = slice(start, start + codec.block)
            byte, codes, numbers = reference(x[row, where].tolist(), kind, codec.scale)
            assert int(encoded.sections["meta"][row, i, 0]) == byte
            assert encoded.codes[row, where].tolist() == codes
            assert [Fraction(v) for v in decoded[row, where].tolist()] == numbers


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_every_code_and_every_tie_between_codes(kind):
    """One block with maximum 6 (scale 1) whose other numbers walk through all magnitudes, middles and neighbours."""
    codec = codec_of(kind)
    points = sorted({float(v) for v in E2M1} | {float((a + b) / 2) for a, b in itertools.pairwise(E2M1)})
    walk = torch.tensor(
        [s * f(p) for p in points for s in (1, -1) for f in (float, _above, _below)], dtype=torch.float64
    )
    walk = walk.clamp(-6, 6)
    size = codec.block - 1
    padded = torch.nn.functional.pad(walk, (0, -len(walk) % size)).view(-1, size)
    blocks = torch.cat([torch.full((len(padded), 1), 6.0, dtype=torch.float64), padded], dim=1)
    check(torch.cat([blocks, blocks.flip(1)], dim=1), codec, kind)


def _above(x: float) -> float:
    return math.nextafter(x, math.inf)


def _below(x: float) -> float:
    return math.nextafter(x, 0)


def test_every_scale_exponent_of_mxfp4():
    """Largest magnitudes from far below to above the range that keys and values have, at and around powers of two."""
    codec = codec_of("mxfp4")
    tops = [2.0**e * m for e in range(-30, 15) for m in (1.0, 1.4999, 1.75, 2 - 2**-20)]
    x = torch.randn(len(tops), 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x / x.abs().amax(1, keepdim=True) * torch.tensor(tops, dtype=torch.float64).unsqueeze(1)
    check(x, codec, "mxfp4")


@pytest.mark.parametrize("scale", [1.0, 0.0037])
def test_every_block_scale_of_nvfp4(scale):
    """Maxima at every E4M3 number times 6 and at every middle between two of them."""
    codec = codec_of("nvfp4", scale)
    edges = E4M3 + [(a + b) / 2 for a, b in itertools.pairwise(E4M3)]
    tops = torch.tensor([float(6 * Fraction(scale) * edge) for edge in edges], dtype=torch.float64)
    x = torch.randn(len(tops), 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x / x.abs().amax(1, keepdim=True) * tops.unsqueeze(1)
    x[:, 0], x[:, 16] = tops, -tops
    x = x.clamp(-tops.unsqueeze(1), tops.unsqueeze(1))
    check_bytes_near_ties(x, codec)


def check_bytes_near_ties(x: torch.Tensor, codec: Float4Codec) -> None:
    """As ``check``; a scale whose quotient is rounded in float64 before E4M3 may fall on either side of a tie."""
    encoded = codec.encode(x)
    decoded = codec.decode(encoded, torch.float64)
    ties = 0
    for row in range(len(x)):
        for i, start in enumerate((0, 16)):
            where = slice(start, start + 16)
            byte, codes, _ = reference(x[row, where].tolist(), "nvfp4", codec.scale)
            found = int(encoded.sections["meta"][row, i, 0])
            if found != byte:
                ties += 1
                assert abs(found - byte) == 1
                continue
            step = float(E4M3[byte]) * codec.scale
            assert torch.allclose(decoded[row, where], _signed(codes) * step, rtol=1e-14, atol=0)
    assert ties <= len(x) // 2


def _signed(codes: list[int]) -> torch.Tensor:
    numbers = [float(E2M1[code % 8]) * (-1 if code >= 8 else 1) for code in codes]
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_block_that_does_not_divide_the_head_is_refused():
    with pytest.raises(RecipeError, match="does not divide head_dim=80"):
        codec_spec(codec="float4", group=32, meta="e8m0").build(80)
