"""Tokens packed by the C++ kernel: the bytes of the torch reference, to the bit."""

import itertools

import pytest
import torch

from kvq.codecs import AffineCodec, Float8Codec
from kvq.errors import DataError
from kvq.kernels.cpp import build, launch
from kvq.kernels.cpp.sides import sides_of
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

HEADS = 3
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def codecs():
    for bits, head_dim in itertools.product((2, 3, 4, 8), (16, 64, 80, 128)):
        for group in {16, head_dim}:
            yield AffineCodec(bits=bits, axis="token", group=group, head_dim=head_dim)
    yield Float8Codec(head_dim=48, scale=0.3)


class Written:
    """A pool, and both ways to write tokens to it."""

    def __init__(self, codec, pages=2):
        self.codec = codec
        self.pool = Pool(PageLayout(key=codec.layout(64), value=codec.layout(64)), HEADS)
        self.pool.allocate(pages)
        self.sides = sides_of({"key": codec, "value": codec}, self.pool.layout)

    def pages(self, *rows) -> Pages:
        return Pages(pool=self.pool, ids=rows)

    def pack(self, ids, side, start, tokens) -> bool:
        """Tokens [HEADS, t, head_dim] of one row by the kernel."""
        return launch.pack(tokens.unsqueeze(0), self.pages(ids), self.sides[side], start)

    def append(self, page, side, slot, token) -> bool:
        return self.pack([page], side, slot, token.unsqueeze(1))

    def write(self, ids, side, start, tokens) -> None:
        """The same by the reference."""
        self.pages(ids).write(side, start, self.codec.encode(tokens.unsqueeze(0)))

    @property
    def bytes(self) -> torch.Tensor:
        (slab,) = self.pool.slabs
        return slab


def adversarial(tokens, head_dim, dtype):
    """Ordinary tokens, then constants, zeros, scales below fp16's normal numbers, ties, and the largest numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HEADS, head_dim, generator=generator, dtype=torch.float64).to(dtype) * 2
    x[1] = 1.375
    x[2] = 0
    x[3] *= 1e-6
    x[4] = torch.arange(head_dim, dtype=dtype) / 2
    # The largest number of bfloat16 that fp16 holds is below 65504.
    x[5] = x[5].sign() * (65280 if dtype == torch.bfloat16 else 65504)
    x[6] *= 1e-9
    x[7, :, ::2] = 300
    # No zero has a sign: torch does not say which of two is the minimum.
    return x + 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", list(codecs()), ids=str)
def test_the_bytes_are_those_of_the_reference(codec, dtype):
    compiled, reference = Written(codec), Written(codec)
    for slot, token in enumerate(adversarial(64, codec.head_dim, dtype)):
        assert compiled.append(1, "value", slot, token)
        reference.write([1], "value", slot, token.unsqueeze(1))
        assert torch.equal(compiled.bytes, reference.bytes), slot
    assert compiled.bytes[1].any()
    assert not compiled.bytes[0].any(), "another page was written"


def test_a_token_written_again_forgets_what_came_after_it():
    codec = AffineCodec(bits=2, axis="token", group=64, head_dim=64)
    compiled, reference = Written(codec), Written(codec)
    x = adversarial(64, 64, torch.float32)
    for slot in (*range(40), *range(7, 12)):
        token = x[(slot * 5) % 64]
        compiled.append(0, "key", slot, token)
        reference.write([0], "key", slot, token.unsqueeze(1))
        assert torch.equal(compiled.bytes, reference.bytes), slot


def test_tokens_of_any_strides():
    codec = AffineCodec(bits=4, axis="token", group=64, head_dim=64)
    compiled, reference = Written(codec), Written(codec)
    buffer = adversarial(32, 64, torch.float32).permute(1, 2, 0).contiguous().permute(0, 2, 1)
    for slot in range(32):
        compiled.append(0, "key", slot, buffer[:, slot])
        reference.write([0], "key", slot, buffer[:, slot : slot + 1])
    assert torch.equal(compiled.bytes, reference.bytes)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 65600.0])
def test_numbers_that_cannot_be_stored(bad):
    codec = AffineCodec(bits=4, axis="token", group=64, head_dim=64)
    compiled = Written(codec)
    token = torch.randn(HEADS, 64, generator=torch.Generator().manual_seed(1))
    token[2, 63] = bad
    assert not compiled.append(0, "key", 0, token)
    with pytest.raises(DataError, match="65504"):
        codec.encode(token.unsqueeze(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "head_dim"), list(itertools.product((2, 3, 4, 8), (16, 80, 128))))
def test_groups_of_tokens_by_channel(bits, head_dim, dtype):
    """Whole groups, over the end of a page, and from the middle of one."""
    codec = AffineCodec(bits=bits, axis="channel", group=16, head_dim=head_dim)
    compiled, reference = Written(codec), Written(codec)
    x = adversarial(128, head_dim, dtype).transpose(0, 1)
    for start, stop in ((0, 16), (16, 112), (112, 128)):
        assert compiled.pack([1, 0], "key", start, x[:, start:stop])
        reference.write([1, 0], "key", start, x[:, start:stop])
        assert torch.equal(compiled.bytes, reference.bytes)


def test_a_prompt_of_several_rows_in_one_call():
    codec = AffineCodec(bits=3, axis="token", group=64, head_dim=64)
    compiled, reference = Written(codec, pages=6), Written(codec, pages=6)
    x = torch.randn(2, HEADS, 150, 64, generator=torch.Generator().manual_seed(3))
    table = [[4, 0, 2], [1, 5, 3]]
    assert launch.pack(x, compiled.pages(*table), compiled.sides["value"], 10)
    for row, ids in enumerate(table):
        reference.write(ids, "value", 10, x[row])
    assert torch.equal(compiled.bytes, reference.bytes)
