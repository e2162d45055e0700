"""The reservoir keeps whole windows, the same ones whatever the batches, within its bytes."""

import pytest
import torch

from kvq.calib.observers.reservoir import Reservoir, choose_windows
from kvq.calib.observers.tokens import window_priorities
from kvq.errors import DataError

# Bytes of one token: (4 query heads + 2 * 2 KV heads) * 8 channels * 4 bytes.
TOKEN = 8 * 8 * 4


def draw(seed: int = 0, windows: int = 6, tokens: int = 5):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(windows, heads, tokens, 8, generator=g) for heads in (4, 2, 2))
    return q, k, v, window_priorities(torch.randint(0, 99, (windows, tokens), generator=g), None)


def observe(q, k, v, priority, rows, valid=None, capacity=10**9, **settings) -> Reservoir:
    facts = {"rows": rows, "priority": priority, "scaling": 0.5, "capacity": capacity} | settings
    return Reservoir.observe(q, k, v, valid, **facts)


def same(a: Reservoir, b: Reservoir) -> bool:
    return all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())


def nbytes(reservoir: Reservoir) -> int:
    return sum(x.nbytes for x in (reservoir.query, reservoir.key, reservoir.value))


def test_windows_come_back_whole_by_priority():
    q, k, v, priority = draw()
    reservoir = observe(q, k, v, priority, rows=range(6))
    order = priority.argsort().tolist()
    assert reservoir.priority.tolist() == sorted(priority.tolist())
    for row, (query, key, value) in zip(order, reservoir.windows(), strict=True):
        assert torch.equal(query, q[row])
        assert torch.equal(key, k[row])
        assert torch.equal(value, v[row])
    assert nbytes(reservoir) == 6 * 5 * TOKEN


@pytest.mark.parametrize("room", [0, 1, 3, 6, 9])
def test_joining_batches_in_any_order_keeps_what_choosing_at_once_keeps(room):
    q, k, v, priority = draw()
    capacity = room * 5 * TOKEN + 1
    chosen = choose_windows(priority, [5 * TOKEN] * 6, capacity)
    assert int(chosen.sum()) == min(room, 6)
    whole = observe(q, k, v, priority, rows=chosen.nonzero().flatten().tolist(), capacity=capacity)
    parts = [observe(q[i], k[i], v[i], priority[i], rows=range(2), capacity=capacity) for i in ([0, 1], [2, 3], [4, 5])]
    a, b, c = parts
    for merged in (a.merge(b).merge(c), c.merge(b.merge(a)), b.merge(c).merge(a)):
        assert nbytes(merged) <= capacity
        assert same(merged, whole)
    assert same(whole.merge(whole), whole)


def test_padding_is_left_out():
    q, k, v, priority = draw(windows=2)
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    reservoir = observe(q, k, v, priority, rows=[0, 1], valid=valid)
    assert sorted(reservoir.lengths.tolist()) == [3, 4]
    for row, window in zip(priority.argsort().tolist(), reservoir.windows()):
        assert torch.equal(window[1], k[row][:, valid[row]])


def test_float64_is_kept_as_float32_and_16_bits_stay():
    q, k, v, priority = draw()
    for dtype, kept in ((torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)):
        reservoir = observe(q.to(dtype), k.to(dtype), v.to(dtype), priority, rows=[0])
        assert reservoir.query.dtype == reservoir.value.dtype == kept


def test_an_empty_reservoir_is_neutral_and_keeps_its_shape():
    q, k, v, priority = draw()
    empty, some = observe(q, k, v, priority, rows=[]), observe(q, k, v, priority, rows=[3])
    assert empty.query.shape == (0, 4, 8)
    assert list(empty.windows()) == []
    wide = observe(q.double(), k.double(), v.double(), priority, rows=[])
    assert same(wide.merge(some), some)
    assert same(empty.merge(some), some)
    assert same(some.merge(empty), some)


def test_what_is_stored_is_restored():
    q, k, v, priority = draw()
    reservoir = observe(q, k, v, priority, rows=[0, 4])
    again = Reservoir.restore(reservoir.tensors(), reservoir.facts())
    assert same(again, reservoir)
    assert (again.scaling, again.capacity) == (reservoir.scaling, reservoir.capacity)


def test_different_capacities_cannot_be_joined():
    q, k, v, priority = draw()
    with pytest.raises(DataError, match="different capacity"):
        observe(q, k, v, priority, rows=[0]).merge(observe(q, k, v, priority, rows=[1], capacity=1))
