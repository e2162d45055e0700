"""Native prints are lost inside, and nothing else is: not even when the work fails."""

import ctypes
import os

import pytest

from kvq.searching.suppress_stdout import suppress_stdout


def failing():
    with suppress_stdout():
        os.write(1, b"debugging")
        raise ValueError("infeasible")


def test_only_what_is_printed_inside_is_lost(capfd):
    print("before", end="")
    with suppress_stdout():
        os.write(1, b"debugging")
        # Buffered in C, as a solver's prints are.
        ctypes.CDLL(None).printf(b"more debugging")
    print("after", end="")
    with pytest.raises(ValueError, match="infeasible"):
        failing()
    os.write(1, b"-end")
    ctypes.CDLL(None).fflush(None)
    out = capfd.readouterr().out
    assert out.replace("-end", "") == "beforeafter"
    assert "-end" in out
