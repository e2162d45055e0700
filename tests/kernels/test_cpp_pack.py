"""Tokens packed by the C++ kernel: the bytes of the torch reference, to the bit."""

import itertools

import pytest
import torch

from kvq.cache.arena import Arena
from kvq.codecs import AffineCodec, Float8Codec
from kvq.errors import DataError
from kvq.kernels.cpp import build, launch
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Pages

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

HEADS = 3
CODEC_SCALE = {"e4m3": 0.3}


def codecs():
    for bits, head_dim in itertools.product((2, 3, 4, 8), (16, 64, 80, 128)):
        for group in {16, head_dim}:
            yield AffineCodec(bits=bits, axis="token", group=group, head_dim=head_dim)
    yield Float8Codec(head_dim=48, scale=0.3)


def arenas(codec):
    layout = PageLayout(key=codec.layout(64), value=codec.layout(64))
    pair = [Arena(layout, HEADS, torch.device("cpu")) for _ in range(2)]
    for arena in pair:
        arena.allocate(2)
    return pair


def append(arena, page, side, slot, token):
    """One token [HEADS, head_dim] to a page of a pool."""
    return pack(arena, [page], side, slot, token.unsqueeze(1))


def pack(arena, table, side, start, tokens):
    """Tokens [HEADS, t, head_dim] to the pages of one row."""
    scale = {"key_scale": CODEC_SCALE.get(arena.layout.key.format, 1.0)}
    scale["value_scale"] = scale["key_scale"]
    pages = Pages.of(arena.layout, arena.slabs[0], torch.tensor([table]), **scale)
    return launch.pack(tokens.unsqueeze(0), pages, side, start)


def adversarial(tokens, head_dim, dtype):
    """Ordinary tokens, then constants, zeros, scales below fp16's normal numbers, ties, and the largest numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HEADS, head_dim, generator=generator, dtype=dtype) * 2
    x[1] = 1.375
    x[2] = 0
    x[3] *= 1e-6
    x[4] = torch.arange(head_dim, dtype=dtype) / 2
    x[5] = x[5].sign() * 65504
    x[6] *= 1e-9
    x[7, :, ::2] = 300
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("codec", list(codecs()), ids=str)
def test_the_bytes_are_those_of_the_reference(codec, dtype):
    compiled, reference = arenas(codec)
    for slot, token in enumerate(adversarial(64, codec.head_dim, dtype)):
        assert append(compiled, 1, "value", slot, token)
        reference.write_tokens(1, "value", slot, codec.encode(token.unsqueeze(1)))
        assert torch.equal(compiled.slabs[0], reference.slabs[0]), slot
    assert compiled.slabs[0][1].any()
    assert not compiled.slabs[0][0].any(), "another page was written"


def test_a_token_written_again_forgets_what_came_after_it():
    codec = AffineCodec(bits=2, axis="token", group=64, head_dim=64)
    compiled, reference = arenas(codec)
    x = adversarial(64, 64, torch.float32)
    for slot in (*range(40), *range(7, 12)):
        token = x[(slot * 5) % 64]
        append(compiled, 0, "key", slot, token)
        reference.write_tokens(0, "key", slot, codec.encode(token.unsqueeze(1)))
        assert torch.equal(compiled.slabs[0], reference.slabs[0]), slot


def test_tokens_of_any_strides():
    codec = AffineCodec(bits=4, axis="token", group=64, head_dim=64)
    compiled, reference = arenas(codec)
    buffer = adversarial(32, 64, torch.float32).permute(1, 2, 0).contiguous().permute(0, 2, 1)
    for slot in range(32):
        append(compiled, 0, "key", slot, buffer[:, slot])
        reference.write_tokens(0, "key", slot, codec.encode(buffer[:, slot : slot + 1]))
    assert torch.equal(compiled.slabs[0], reference.slabs[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 65600.0])
def test_numbers_that_cannot_be_stored(bad):
    codec = AffineCodec(bits=4, axis="token", group=64, head_dim=64)
    compiled, _ = arenas(codec)
    token = torch.randn(HEADS, 64, generator=torch.Generator().manual_seed(1))
    token[2, 63] = bad
    assert not append(compiled, 0, "key", 0, token)
    with pytest.raises(DataError, match="65504"):
        codec.encode(token.unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("bits", "head_dim"), list(itertools.product((2, 3, 4, 8), (16, 80, 128))))
def test_groups_of_tokens_by_channel(bits, head_dim, dtype):
    """Whole groups, over the end of a page, and from the middle of one."""
    codec = AffineCodec(bits=bits, axis="channel", group=16, head_dim=head_dim)
    compiled, reference = arenas(codec)
    x = adversarial(128, head_dim, dtype).transpose(0, 1)
    for start, stop in ((0, 16), (16, 112), (112, 128)):
        assert pack(compiled, [1, 0], "key", start, x[:, start:stop])
        for at in range(start, stop, 16):
            reference.write_tokens(1 - at // 64, "key", at % 64, codec.encode(x[:, at : at + 16]))
        assert torch.equal(compiled.slabs[0], reference.slabs[0])


def test_a_prompt_of_several_rows_in_one_call():
    codec = AffineCodec(bits=3, axis="token", group=64, head_dim=64)
    layout = PageLayout(key=codec.layout(64), value=codec.layout(64))
    compiled, reference = (Arena(layout, HEADS, torch.device("cpu")) for _ in range(2))
    for arena in (compiled, reference):
        arena.allocate(6)
    x = torch.randn(2, HEADS, 150, 64, generator=torch.Generator().manual_seed(3))
    table = torch.tensor([[4, 0, 2], [1, 5, 3]])
    assert launch.pack(x, Pages.of(layout, compiled.slabs[0], table), "value", 10)
    for row in range(2):
        for first, last in ((10, 64), (64, 128), (128, 160)):
            encoded = codec.encode(x[row, :, first - 10 : last - 10])
            reference.write_tokens(int(table[row, first // 64]), "value", first % 64, encoded)
    assert torch.equal(compiled.slabs[0], reference.slabs[0])
