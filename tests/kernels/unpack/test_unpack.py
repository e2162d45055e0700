"""Unpack: the numbers of the kernel are those of the reference."""

import pytest
import torch

from kvq.bench.samples import layout_of, random_pages
from kvq.kernels.unpack import unpack_pages

LAYOUTS = [
    ("4", "4", 64),
    ("2", "2", 64),
    ("2c32", "2/32", 64),
    ("3", "8", 80),
    ("3c64", "e4m3", 64),
    ("4/16", "4c32", 96),
    ("book4", "nf4", 64),
    ("book2", "mx4", 64),
    ("2s", "book3", 128),
    ("2c16r", "2/32z", 64),
    ("4.3.0.2c32r", "8.4c64f", 64),
    ("8stn", "4t", 80),
    ("even3", "even2", 64),
    ("dense", "4/16sf", 96),
]


@pytest.mark.parametrize(("key", "value", "head_dim"), LAYOUTS, ids=str)
def test_unpacking_gives_the_numbers_of_the_reference(key, value, head_dim, device):
    layout = layout_of(key, value, head_dim)
    lengths = torch.tensor([64, 80], dtype=torch.int32, device=device)
    pages = random_pages(layout, lengths.tolist(), 2, device=device)
    for side in ("key", "value"):
        found, want = (torch.full((2, 2, 90, head_dim), -7.0, device=device) for _ in range(2))
        assert unpack_pages(pages, side, lengths, found, impl="triton").impl == "triton"
        unpack_pages(pages, side, lengths, want, impl="reference")
        assert torch.allclose(found, want, rtol=1e-6, atol=1e-6)
        assert (found[0, :, 64:] == -7).all()
