"""Massive activations are found by the paper's rule (arXiv 2402.17762): above 100 and 1,000 times the median."""

import pytest
import torch

from kvq.calib.observers.massive import Massive
from kvq.calib.observers.tokens import window_priorities
from kvq.calib.observers.tops import WINDOWS, Tops


def draw(windows: int = 3, tokens: int = 20, channels: int = 64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(windows, tokens, channels, generator=g), torch.randint(4, 90, (windows, tokens), generator=g)


def observe(hidden, tokens, valid=None) -> Massive:
    return Massive.observe(hidden, tokens, valid, window_priorities(tokens, valid))


def test_a_massive_token_and_its_channel_are_named():
    hidden, tokens = draw()
    hidden[:, 0, 17] = -3000.0
    hidden[1, 7, 40] = 2000.0
    found = observe(hidden, tokens)
    exact = float(hidden.abs().median())
    assert 0.8 * exact <= found.median <= 1.2 * exact
    assert found.channels == [17, 40]
    assert found.peak == 3000.0
    assert found.share == pytest.approx(4 / 60)
    row = found.tops.priority.tolist().index(int(window_priorities(tokens, None)[1]))
    assert found.tops.position[row, :2].tolist() == [0, 7]
    assert found.tops.extra[row, :2].tolist() == [17, 40]
    assert found.tops.token[row, :2].tolist() == [int(tokens[1, 0]), int(tokens[1, 7])]


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e4])
def test_large_numbers_alone_are_not_massive(factor):
    """Neither a normal hidden state, nor a scaled one, has massive activations; 300 times the median is not enough."""
    hidden, tokens = draw()
    hidden[:, 3, 5] = 200.0
    found = observe(hidden * factor, tokens)
    assert found.channels == []
    assert found.share == 0


def test_small_entries_are_not_massive_even_against_a_tiny_median():
    hidden, tokens = draw()
    hidden *= 1e-3
    hidden[0, 0, 9] = 50.0
    assert observe(hidden, tokens).channels == []


def test_batches_and_padding_change_nothing():
    hidden, tokens = draw()
    whole = observe(hidden, tokens)
    parts = [observe(hidden[i : i + 1], tokens[i : i + 1]) for i in range(3)]
    for side in ((4, 0), (0, 4)):
        wide = torch.nn.functional.pad(hidden, (0, 0, *side), value=float("nan"))
        ids = torch.nn.functional.pad(tokens, side)
        valid = torch.nn.functional.pad(torch.ones(3, 20, dtype=torch.bool), side, value=False)
        for got in (observe(wide, ids, valid), parts[2].merge(parts[0]).merge(parts[1])):
            for name, expected in whole.tensors().items():
                assert torch.equal(got.tensors()[name], expected), name


def test_bad_numbers_are_noticed():
    hidden, tokens = draw()
    assert bool(observe(hidden, tokens).channel_peak.isfinite().all())
    hidden[0, 1, 2] = float("nan")
    assert not bool(observe(hidden, tokens).channel_peak.isfinite().all())


def test_what_is_stored_is_restored():
    found = observe(*draw())
    again = Massive.restore(found.tensors(), found.facts())
    assert all(torch.equal(again.tensors()[name], x) for name, x in found.tensors().items())


def test_a_bounded_number_of_windows_is_kept_whatever_the_order():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 10**6, (WINDOWS + 40, 6), generator=g)
    strength, priority = torch.rand(len(tokens), 6, generator=g), window_priorities(tokens, None)
    whole = Tops.observe(strength, tokens, None, priority)
    assert whole.priority.tolist() == sorted(priority.tolist())[:WINDOWS]
    a, b = (
        Tops.observe(strength[part], tokens[part], None, priority[part]) for part in (slice(0, 99), slice(99, None))
    )
    for merged in (a.merge(b), b.merge(a), a.merge(b).merge(a)):
        assert all(torch.equal(merged.tensors()[name], x) for name, x in whole.tensors().items())


def test_short_windows_have_fewer_tops():
    tops = Tops.observe(torch.tensor([[1.0, 3.0]]), torch.tensor([[8, 9]]), None, torch.tensor([5]))
    assert tops.strength.tolist() == [[3.0, 1.0, float("-inf"), float("-inf")]]
    assert tops.token.tolist() == [[9, 8, 0, 0]]
