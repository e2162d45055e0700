"""Pack: the bytes of the kernel are the bytes of the reference."""

import pytest
import torch

from kvq.bench.samples import layout_of
from kvq.errors import KernelError
from kvq.kernels.pack import pack_tokens
from kvq.kernels.unpack import unpack_pages

LAYOUTS = [
    ("4", "4", 64, torch.bfloat16),
    ("2", "2", 64, torch.float32),
    ("2c32", "2/32", 64, torch.bfloat16),
    ("3", "8", 80, torch.float32),
    ("3c64", "e4m3", 64, torch.float32),
    ("4/16", "4c32", 96, torch.bfloat16),
]


@pytest.mark.parametrize(("key", "value", "head_dim", "dtype"), LAYOUTS, ids=str)
def test_bulk_packing_gives_the_bytes_of_the_reference(key, value, head_dim, dtype, device, empty_pages, source_of):
    layout = layout_of(key, value, head_dim)
    x = torch.randn(2, 2, 128, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    x[0, 0, 5] = 1.5
    made = [empty_pages(layout, 2, 2, 2, device) for _ in range(2)]
    for pages, impl in zip(made, ("triton", "reference")):
        for side in ("key", "value"):
            ran = pack_tokens(source_of(x, [(0, 128), (0, 64)]), pages, side, impl=impl)
            assert ran.impl == impl
    assert torch.equal(made[0].pool.base, made[1].pool.base)
    assert torch.equal(made[0].pool.value_limit, made[1].pool.value_limit)
    assert made[0].pool.base.any()


def test_heads_that_lie_more_than_2_gib_apart(device, empty_pages, source_of):
    """Heads times their stride exceed 32 bits where neither does: a long prompt of many heads."""
    layout, stride = layout_of("4", "4", 64), (1 << 30) + 64
    near = torch.randn(1, 3, 16, 64, generator=torch.Generator().manual_seed(0)).half().to(device)
    far = torch.empty(2 * stride + 16 * 64, dtype=torch.float16, device=device)
    far = far.as_strided(near.shape, (0, stride, 64, 1)).copy_(near)
    made = [empty_pages(layout, 1, 3, 1, device) for _ in range(2)]
    for pages, x in zip(made, (near, far)):
        pack_tokens(source_of(x, [(0, 16)]), pages, "key", impl="triton")
    assert torch.equal(made[0].pool.base, made[1].pool.base)
    assert made[0].pool.records(0)[2].any()


def test_vectors_that_are_not_in_one_piece_are_refused_by_name(device, empty_pages, source_of):
    pages = empty_pages(layout_of("4", "4", 64), 1, 2, 1, device)
    apart = source_of(torch.zeros(1, 2, 64, 64, device=device).transpose(2, 3), [(0, 16)])
    with pytest.raises(KernelError, match="tokens of stride 64 in the last dimension"):
        pack_tokens(apart, pages, "key", impl="triton")
    assert pack_tokens(apart, pages, "key").impl == "reference"


def test_clip_in_the_pack_kernel(device, empty_pages, source_of):
    layout = layout_of("4", "4", 64)
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    made = [empty_pages(layout, 1, 2, 1, device) for _ in range(2)]
    for pages, impl in zip(made, ("triton", "reference")):
        pack_tokens(source_of(x, [(0, 64)]), pages, "key", clip=0.9, impl=impl)
    lengths = torch.tensor([64], dtype=torch.int32, device=device)
    dense = [torch.zeros_like(x) for _ in made]
    for pages, out in zip(made, dense):
        unpack_pages(pages, "key", lengths, out, impl="reference")
    assert (dense[0] - dense[1]).abs().max() < 1e-6
