"""Shapes in signatures are checked while these tests run, and cost nothing outside them."""

import subprocess
import sys

import pytest
import torch
from beartype.roar import BeartypeException
from jaxtyping import TypeCheckError

from kvq import shapes
from kvq.codecs.affine import AffineCodec
from kvq.kernels.decode_attention.exact_partial import exact_partial
from kvq.pages.bits import pack_rows
from kvq.transforms.balance import joint_basis


def _codec() -> AffineCodec:
    return AffineCodec(bits=4, axis="token", group=16, head_dim=32)


REFUSED = (TypeCheckError, BeartypeException)


def test_the_checks_are_on():
    assert shapes.CHECKED


def test_wrong_shapes_are_refused_where_torch_would_broadcast():
    """Each of these calls runs without the checks, and gives numbers that mean nothing."""
    q, keys = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 5, 16)
    exact_partial(q, keys, keys)
    with pytest.raises(REFUSED):
        exact_partial(q, keys[:1], keys[:1])
    moment = torch.eye(8).expand(2, 8, 8)
    joint_basis(moment, moment)
    with pytest.raises(REFUSED):
        joint_basis(moment, moment[:1])


def test_every_codec_is_held_to_the_shapes_of_the_base():
    codec = _codec()
    x = torch.randn(1, 2, 4, 32)
    codec.decode(codec.encode(x), x.dtype)
    with pytest.raises(REFUSED):
        codec.encode(torch.randn(1, 2, 4, 64))
    with pytest.raises(REFUSED):
        codec.encode(x.long())


def test_a_wrong_dtype_is_refused():
    layout = _codec().layout(64)
    with pytest.raises(REFUSED):
        pack_rows(torch.zeros(4, 16, 32, dtype=torch.int64), layout)


def test_outside_the_tests_nothing_is_wrapped_and_no_checker_is_imported():
    code = "import sys, kvq.pages.bits as bits, kvq.shapes as shapes; assert not shapes.CHECKED; "
    code += "assert not hasattr(bits.pack_rows, '__wrapped__'); print({'jaxtyping', 'beartype'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "set()", done.stderr[-1000:]
