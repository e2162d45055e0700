"""Time left and speed of steps of any length."""

import pytest

from kvq.commands.estimate import Estimate


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("seconds", [0.01, 10, 45, 3600])
def test_steps_of_any_length_give_speed_and_time_left(seconds):
    """From the first step on, also where a step takes longer than rich looks back (30 s)."""
    clock = Clock()
    estimate = Estimate(clock)
    estimate.at(2, 10)
    assert estimate.left is None
    for done in (3, 4, 5):
        clock.now += seconds
        estimate.at(done, 10)
        assert estimate.per_second == pytest.approx(1 / seconds)
        assert estimate.left == pytest.approx(seconds * (10 - done))
    # It goes on counting while a step runs.
    clock.now += seconds / 2
    assert estimate.left == pytest.approx(4.5 * seconds)
    clock.now += 100 * seconds
    assert estimate.left == 0


def test_a_share_of_the_first_step_is_enough():
    clock = Clock()
    estimate = Estimate(clock)
    estimate.at(0, 4)
    clock.now += 60
    estimate.at(0.25, 4)
    assert estimate.left == pytest.approx(15 * 60)


def test_what_was_there_before_counts_for_no_speed():
    clock = Clock()
    estimate = Estimate(clock)
    estimate.at(0, 4)
    clock.now += 1
    estimate.at(4, 4)
    estimate.restart()
    estimate.at(90, 100)
    clock.now += 30
    estimate.at(91, 100)
    assert estimate.left == pytest.approx(270)


def test_a_clock_that_stands_gives_no_speed():
    estimate = Estimate(Clock())
    estimate.at(0, 4)
    estimate.at(2, 4)
    assert estimate.per_second is None
    assert estimate.left is None
