"""Sharing of windows over processes, alone; with real processes in tests/commands/test_calibrate_processes.py."""

import pytest

from kvq.calib.ranks import Ranks, ranks
from kvq.errors import DataError


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_shares_together_are_the_items_in_order(count, world):
    shares = [Ranks(rank, world).share(list(range(count))) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_alone_talks_to_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks() as alone:
        assert alone == Ranks(0, 1)
        assert alone.is_first
        assert alone.agree(7) == 7
        assert alone.gather(lambda: 3) == [3]
        with pytest.raises(DataError, match="bad"):
            alone.gather(lambda: (_ for _ in ()).throw(DataError("bad")))
