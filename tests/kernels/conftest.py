"""Device kernels: in Triton's interpreter on CPU tensors by default, on a GPU with TRITON_INTERPRET=0."""

import pytest
import torch

from kvq.kernels.dispatch import interpreted, triton_version
from kvq.kernels.types import Source
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; skips where they cannot."""
    if triton_version() is None:
        pytest.skip("triton is not installed")
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 asks for a CUDA device, and there is none")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def empty_pages():
    """Function: pages of zeros, every row's with a table of its own."""

    def made(layout: PageLayout, rows: int, heads: int, pages: int, device) -> Pages:
        memory = torch.zeros(rows * pages, layout.page_bytes(heads), dtype=torch.uint8, device=device)
        table = torch.arange(rows * pages, dtype=torch.int32, device=device).flip(0).view(rows, pages)
        return Pages(pool=Pool.borrow(memory, layout, heads), numbers=table)

    return made


@pytest.fixture(scope="session")
def source_of():
    """Function: tokens [start, stop) of every sequence, the first of them at x[:, :, 0]."""

    def made(x: torch.Tensor, ranges: list[tuple[int, int]]) -> Source:
        bounds = torch.tensor(ranges, dtype=torch.int32, device=x.device)
        return Source(x=x, ranges=bounds, offsets=-bounds[:, 0].contiguous(), longest=max(b - a for a, b in ranges))

    return made
