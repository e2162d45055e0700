"""Which implementation runs: by name and no other, and a reason for everything that ``auto`` takes."""

import pytest
import torch

from kvq.bench.samples import layout_of
from kvq.errors import KernelError
from kvq.kernels import dispatch
from kvq.kernels.dispatch import choose, why_no_layout
from kvq.pages.layout import PageLayout, Section, SideLayout

CPU = torch.device("cpu")


def test_names_are_taken_at_their_word(monkeypatch):
    assert choose("reference", CPU).impl == "reference"
    assert choose("cpp", CPU, no_cpp=None).impl == "cpp"
    with pytest.raises(KernelError, match="not an implementation: use auto, triton, cpp, reference"):
        choose("fast", CPU)
    with pytest.raises(KernelError, match=r"this has no C\+\+ kernel"):
        choose("cpp", CPU)
    with pytest.raises(KernelError, match=r"cannot run: rows are odd; use impl='reference' or impl='auto'"):
        choose("cpp", CPU, no_cpp="rows are odd")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(KernelError, match=r"tensors are on cpu, and the kernels run on CUDA devices|not installed"):
        choose("triton", CPU)
    with pytest.raises(KernelError, match="runs on the CPU"):
        choose("cpp", torch.device("cuda"), no_cpp=None)


def test_auto_never_takes_the_interpreter():
    assert choose("auto", CPU, no_cpp=None).impl == "cpp"
    found = choose("auto", CPU)
    assert (found.impl, "this has no C++ kernel" in found.reason) == ("reference", True)


def test_auto_takes_triton_on_a_cuda_device_and_says_why_not(monkeypatch):
    monkeypatch.setattr(dispatch, "why_no_triton", lambda device: None)
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    cuda = torch.device("cuda")
    assert choose("auto", cuda).impl == "triton"
    assert str(choose("auto", cuda, obstacle="queries of float64")) == "reference (queries of float64)"
    with pytest.raises(KernelError, match="queries of float64"):
        choose("triton", cuda, obstacle="queries of float64")


@pytest.mark.parametrize("width", ["4", "2", "3s", "8", "e4m3", "2c32", "nf4", "mx4", "book3", "dense"])
def test_layouts_that_are_read_as_they_are(width):
    assert why_no_layout(layout_of(width, width, 64)) is None


def test_layouts_that_are_not_say_which_side_and_why():
    plain = layout_of("4", "4", 64).key
    sparse = SideLayout(
        format="affine",
        bits=4,
        head_dim=64,
        page_tokens=64,
        group=64,
        extras=(Section(name="outlier_index", shape=(2,)),),
    )
    assert why_no_layout(PageLayout(key=plain, value=sparse)) == "value: section 'outlier_index'"
    narrow = SideLayout(format="affine", bits=4, head_dim=64, page_tokens=64, group=8)
    assert why_no_layout(PageLayout(key=narrow, value=plain)) == "key: groups of 8 channels, not a multiple of 16"
