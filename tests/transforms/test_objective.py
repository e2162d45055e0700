"""The error that searches minimise is that of the attention block as the cache would feed it."""

import dataclasses

import pytest
import torch

from kvq.transforms.chain import Chain
from kvq.transforms.hadamard import Hadamard
from kvq.transforms.objective import Probe, attention_error, attention_errors, spread


def slow_output(data, window, row, keys, values):
    """One query's attention block output, head by head."""
    out = 0
    for head in range(4):
        q, k, v = (
            x.double() for x in (window.query[head, row], keys[head // 2, : row + 1], values[head // 2, : row + 1])
        )
        logits = k @ q * data.scaling
        if data.softcap:
            logits = data.softcap * torch.tanh(logits / data.softcap)
        out = out + data.output[head].double() @ (torch.softmax(logits, 0) @ v)
    return out


def slow_error(data, window):
    """Every packed token replaced by what the codec gives back, for each query by its own window of exact tokens."""
    codec, step = data.codec, Hadamard(block=16)
    change = total = 0
    for row in spread(window, 5).tolist():
        stored = {"key": window.key.clone(), "value": window.value.clone()}
        x = stored[data.side]
        first = data.exact
        last = first + (row + 1 - first) // codec.block_tokens * codec.block_tokens
        whole = x[:, first : first + (96 - first) // codec.block_tokens * codec.block_tokens]
        decoded = step.inverse(codec.decode(codec.encode(step.forward(whole)), torch.float32))
        read = range(first, min(row - data.window, last if codec.block_tokens == 1 else first + whole.shape[1]))
        for t in read:
            x[:, t] = decoded[:, t - first]
        exact = slow_output(data, window, row, window.key, window.value)
        found = slow_output(data, window, row, stored["key"], stored["value"])
        change, total = change + (found - exact).square().sum(), total + exact.square().sum()
    return float(change / total)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(
    "settings", [{}, {"exact": 4, "window": 16}, {"softcap": 3.0}, {"axis": "channel", "group": 16, "window": 16}]
)
def test_the_error_is_that_of_attention_over_what_the_codec_gives_back(side, settings, make_fit_data):
    data = make_fit_data(side, windows=1, bits=2, **settings)
    (found,) = attention_errors(data, [Hadamard(block=16)], queries=5)
    assert found == pytest.approx(slow_error(data, data.windows[0]), rel=2e-3)
    assert found > 1e-4


def test_later_steps_are_part_of_what_is_tried(make_fit_data):
    data = make_fit_data()
    identity = Chain()
    behind = dataclasses.replace(data, after=Chain((Hadamard(block=16),)))
    assert attention_error(behind, identity) == pytest.approx(attention_error(data, Hadamard(block=16)), rel=1e-5)


def test_what_is_stored_exactly_costs_nothing(make_fit_data):
    for side in ("key", "value"):
        data = make_fit_data(side)
        window = data.windows[0]
        probe = Probe.of(data, window, spread(window, 9))
        exact = (probe.key if side == "key" else probe.value)[:, probe.packed]
        assert float(probe.error(data, exact)) < 1e-10


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_fake_quantization_is_the_codec_up_to_half_precision_of_its_metadata(axis, make_fit_data):
    codec = make_fit_data(bits=3, axis=axis, group=16).codec
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(codec.fake_quantized(x), codec.decode(codec.encode(x), x.dtype), atol=4e-3)


def test_gradients_reach_the_numbers_and_their_range(make_fit_data):
    codec = make_fit_data(bits=2).codec
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codec.fake_quantized(x)[0, 0, 3].backward()
    touched = x.grad[0, 0].nonzero().flatten().tolist()
    assert set(touched) == {3, int(x.argmin()), int(x.argmax())}


def test_clipped_fake_quantization_saturates(make_fit_data):
    codec = dataclasses.replace(make_fit_data(bits=2).codec, clip=0.5)
    x = torch.linspace(-1, 1, 16).view(1, 1, 16)
    found = codec.fake_quantized(x)
    assert float(found.min()) == pytest.approx(-0.5)
    assert float(found.max()) == pytest.approx(0.5)
