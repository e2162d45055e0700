"""Runs of positions are the positions themselves, however they arrived."""

import pytest
import torch

from kvq.cache.positions import Positions

ROWS = [[5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 9, 10, 3, 4], [0, 0, 0, 1, 2, 3, 4]]


def stored(cuts=(7,), valid=None):
    held, start = Positions(3), 0
    for stop in cuts:
        held.extend(torch.tensor(ROWS)[:, start:stop], None if valid is None else valid[:, start:stop])
        start = stop
    return held


@pytest.mark.parametrize("cuts", [(7,), (1, 2, 3, 4, 5, 6, 7), (3, 7)])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 6), (3, 3)])
def test_any_span_of_any_row(cuts, start, stop):
    assert stored(cuts).of([0, 2, 1], start, stop).tolist() == [ROWS[b][start:stop] for b in (0, 2, 1)]


def test_one_run_whatever_the_length():
    held = Positions(1)
    for t in range(50):
        held.extend(torch.tensor([[t + 3]]), None)
    assert held.runs == [[(0, 3)]]


def test_pads_have_no_position():
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 1, 1, 1, 1, 1]]).bool()
    held = stored((2, 7), valid)
    assert held.counts == [5, 7, 5]
    assert held.of([0], 0, 5).tolist() == [[7, 8, 9, 10, 11]]
    assert held.of([2], 0, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_cropped_and_selected_rows_go_on():
    held = stored()
    held.crop([4, 4, 4])
    held.select([1, 1, 0])
    held.extend(torch.tensor([[3, 4], [8, 9], [8, 9]]), None)
    assert held.of([0, 1, 2], 0, 5).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 8, 9], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("cuts", [(7,), (1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (1, 7), (2, 6), (3, 3)])
def test_every_stepth_token_is_that_of_the_whole_span(cuts, step, start, stop):
    held = stored(cuts)
    every = held.of([0, 2, 1], start, stop)
    assert held.of([0, 2, 1], start, stop, step).tolist() == every[:, ::step].tolist()
