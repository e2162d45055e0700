"""One token packed by the compiled kernel: the bytes of the torch reference, to the bit."""

import itertools

import pytest
import torch

pytest.importorskip("numba", reason="the compiled kernel needs numba")

from kvq.cache.arena import Arena
from kvq.codecs import AffineCodec
from kvq.errors import DataError
from kvq.pages.layout import PageLayout

HEADS = 3


def codecs():
    for bits, head_dim in itertools.product((2, 3, 4, 8), (16, 64, 80, 128)):
        for group in {16, head_dim}:
            yield AffineCodec(bits=bits, axis="token", group=group, head_dim=head_dim)


def arenas(codec):
    layout = PageLayout(key=codec.layout(64), value=codec.layout(64))
    pair = [Arena(layout, HEADS, torch.device("cpu")) for _ in range(2)]
    for arena in pair:
        arena.allocate(2)
    return pair


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
        assert compiled.append_token(1, "value", slot, token)
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
        compiled.append_token(0, "key", slot, token)
        reference.write_tokens(0, "key", slot, codec.encode(token.unsqueeze(1)))
        assert torch.equal(compiled.slabs[0], reference.slabs[0]), slot


def test_tokens_of_any_strides():
    codec = AffineCodec(bits=4, axis="token", group=64, head_dim=64)
    compiled, reference = arenas(codec)
    buffer = adversarial(32, 64, torch.float32).permute(1, 2, 0).contiguous().permute(0, 2, 1)
    for slot in range(32):
        compiled.append_token(0, "key", slot, buffer[:, slot])
        reference.write_tokens(0, "key", slot, codec.encode(buffer[:, slot : slot + 1]))
    assert torch.equal(compiled.slabs[0], reference.slabs[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 65600.0])
def test_numbers_that_cannot_be_stored(bad):
    codec = AffineCodec(bits=4, axis="token", group=64, head_dim=64)
    compiled, _ = arenas(codec)
    token = torch.randn(HEADS, 64, generator=torch.Generator().manual_seed(1))
    token[2, 63] = bad
    assert not compiled.append_token(0, "key", 0, token)
    with pytest.raises(DataError, match="65504"):
        codec.encode(token.unsqueeze(1))
