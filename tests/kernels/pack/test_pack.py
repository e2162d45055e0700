"""Pack: the bytes of the kernel are those of the codec in torch."""

import pytest
import torch

from kvq.bench.samples import codec_of, codecs_of, layout_of
from kvq.codecs import codec_spec
from kvq.errors import KernelError
from kvq.kernels.pack import pack_tokens, why_no_pack
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Pages

CODECS = [
    ("4", "4", 64, torch.bfloat16),
    ("2", "2", 64, torch.float32),
    ("2c32", "2/32", 64, torch.bfloat16),
    ("3", "8", 80, torch.float32),
    ("3c64", "e4m3", 64, torch.float32),
    ("4/16", "4c32", 96, torch.bfloat16),
    # Metadata in bytes, or shared by heads; clips; tiers, some of them without bits.
    ("2c16r", "2zx", 80, torch.float32),
    ("4c32z", "3/16f", 48, torch.float16),
    ("8st", "4t", 80, torch.float32),
    ("4.2.0.8.3c32rx", "4sf", 80, torch.float32),
    ("0.2.0.3c64", "3s", 64, torch.bfloat16),
    ("3c32s", "2/16x", 64, torch.float32),
    # Norms and books.
    ("2c32n", "4/16", 80, torch.float32),
    ("8stn", "book3", 80, torch.float16),
    ("book4l", "even2", 64, torch.float32),
    ("nf4", "even3l", 80, torch.bfloat16),
    ("mx4", "nv4", 96, torch.float32),
]


def drawn(*shape: int) -> torch.Tensor:
    """Ordinary tokens, then constants, zeros, ties, small and large numbers."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[0, 0, 5] = 1.5
    x[:, :, 6] = 0
    x[:, :, 7] *= 1e-6
    x[:, :, 8] = torch.arange(shape[-1]) / 2
    x[:, :, 9] *= 100
    return x


@pytest.mark.parametrize(("key", "value", "head_dim", "dtype"), CODECS, ids=str)
def test_bulk_packing_gives_the_bytes_of_the_codec(key, value, head_dim, dtype, device, empty_pages, source_of):
    """In pieces that end inside of pages where the codec takes single tokens."""
    layout, codecs = layout_of(key, value, head_dim), codecs_of(key, value, head_dim)
    x = drawn(1, 2, 64, head_dim).to(dtype).to(device)
    made = [empty_pages(layout, 1, 2, 1, device) for _ in range(2)]
    for pages, impl in zip(made, ("triton", "reference")):
        for side, codec in codecs.items():
            unit = codec.block_tokens
            for start, stop in [(0, 64 - unit), (64 - unit, 64)] if unit > 1 else [(0, 21), (21, 22)]:
                if stop > start:
                    own = source_of(x[:, :, start:stop], [(start, stop)])
                    assert pack_tokens(own, pages, side, codec, impl=impl).impl == impl
    assert torch.equal(made[0].pool.base, made[1].pool.base)
    assert torch.equal(made[0].pool.value_limit, made[1].pool.value_limit)
    assert made[0].pool.base.any()


def test_rows_of_different_length_are_packed_at_once(device, empty_pages, source_of):
    layout, codecs = layout_of("2c16", "3s", 64), codecs_of("2c16", "3s", 64)
    x = drawn(2, 1, 96, 64).to(device)
    made = [empty_pages(layout, 2, 1, 2, device) for _ in range(2)]
    for pages, impl in zip(made, ("triton", "reference")):
        for side, codec in codecs.items():
            pack_tokens(source_of(x, [(0, 80), (0, 48)]), pages, side, codec, impl=impl)
    assert torch.equal(made[0].pool.base, made[1].pool.base)
    assert torch.equal(made[0].pool.value_limit, made[1].pool.value_limit)


def test_numbers_that_no_codec_holds_poison_what_is_read(device, empty_pages, source_of):
    """A NaN or an infinity is never packed as an ordinary number: its group, or its token, reads as such."""
    x = drawn(1, 2, 32, 32).to(device)
    for bad in (torch.nan, torch.inf):
        x[0, 1, 20, 17] = bad
        for name in ("4", "2z", "2c16r", "8st", "book2"):
            codec = codec_of(name, 32)
            pages = empty_pages(layout_of(name, name, 32), 1, 2, 1, device)
            pack_tokens(source_of(x, [(0, 32)]), pages, "key", codec, impl="triton")
            read = codec.decode(Pages(pool=pages.pool, ids=[[0]]).encoded("key"), torch.float32)
            assert not read[0, 1, 20, 17].isfinite(), name
            assert read[0, 0, 0].isfinite().all(), name


def test_heads_that_lie_more_than_2_gib_apart(device, empty_pages, source_of):
    """Heads times their stride exceed 32 bits where neither does: a long prompt of many heads."""
    layout, stride = layout_of("4", "4", 64), (1 << 30) + 64
    near = torch.randn(1, 3, 16, 64, generator=torch.Generator().manual_seed(0)).half().to(device)
    far = torch.empty(2 * stride + 16 * 64, dtype=torch.float16, device=device)
    far = far.as_strided(near.shape, (0, stride, 64, 1)).copy_(near)
    made = [empty_pages(layout, 1, 3, 1, device) for _ in range(2)]
    for pages, x in zip(made, (near, far)):
        pack_tokens(source_of(x, [(0, 16)]), pages, "key", codec_of("4", 64), impl="triton")
    assert torch.equal(made[0].pool.base, made[1].pool.base)
    assert made[0].pool.records(0)[2].any()


def test_vectors_that_are_not_in_one_piece_are_refused_by_name(device, empty_pages, source_of):
    pages = empty_pages(layout_of("4", "4", 64), 1, 2, 1, device)
    apart = source_of(torch.zeros(1, 2, 64, 64, device=device).transpose(2, 3), [(0, 16)])
    with pytest.raises(KernelError, match="tokens of stride 64 in the last dimension"):
        pack_tokens(apart, pages, "key", codec_of("4", 64), impl="triton")
    assert pack_tokens(apart, pages, "key", codec_of("4", 64)).impl == "reference"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scale": "moments", "axis": "token", "group": "head", "levels": "lloyd_max"}, "chooses its numbers in torch"),
        ({"scale": "absmax", "axis": "channel", "group": 32, "levels": "normal_float"}, "chooses its numbers in torch"),
        ({"scale": "unit", "levels": "lloyd_max", "low_rank": {"rank": 2, "block": 64}}, "beside the codes"),
    ],
)
def test_what_the_kernel_does_not_pack_is_said(settings, reason, device, empty_pages, source_of):
    codec = codec_spec("book", bits=4, **settings).build(64)
    layout = PageLayout(key=codec.layout(64), value=codec.layout(64))
    assert reason in why_no_pack(codec.view(64), layout)
    own = source_of(torch.zeros(1, 2, 64, 64, device=device), [(0, 64)])
    with pytest.raises(KernelError, match=reason):
        pack_tokens(own, empty_pages(layout, 1, 2, 1, device), "key", codec, impl="triton")
