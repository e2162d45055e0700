"""Numbers as text."""

import pytest

from kvq.report.rows import number, with_interval


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 2, "-"),
        (0.0, 2, "0.00"),
        (1234.5678, 2, "1,234.57"),
        (-0.5, 1, "−0.5"),
        (3e-05, 4, "3.0e-05"),
        (-3e-05, 4, "−3.0e-05"),
        (9.7e14, 3, "9.7e+14"),
        (float("inf"), 3, "inf"),
    ],
)
def test_numbers_keep_what_matters(value, digits, text):
    assert number(value, digits) == text


def test_intervals_are_signed_scaled_and_short():
    assert with_interval(-0.021, -0.04, -0.002, 1, 100) == "−2.1 [−4.0, −0.2]"
    assert with_interval(0.5, None, None, 3) == "+0.500"
    assert with_interval(-6.7e14, -6.2e17, 6.1e17, 3) == "−6.7e+14 [−6.2e+17, 6.1e+17]"
