"""The plan that the device makes is the one that the rule says, every token is in one item, and waves are filled."""

import pytest
import torch

from kvq.bench.samples import layout_of
from kvq.kernels.decode_attention.decode_plan import DecodePlan, choose_run, work_list


@pytest.mark.parametrize(
    ("lengths", "slots"), [([0, 0], 4), ([1, 5000], 132), ([1000, 37, 0, 640], 4), ([64] * 9, 132)], ids=str
)
def test_the_device_follows_the_rule(lengths, slots, device):
    layout = layout_of("4", "4", 64)
    plan = DecodePlan(layout, batch=len(lengths), heads=2, group=4, device=device, slots=slots, impl="triton")
    plan.update(torch.tensor(lengths, dtype=torch.int32, device=device))
    rounds = [-(-n // plan.geometry.tile.round) for n in lengths]
    run = choose_run(rounds, 2 * plan.geometry.column_blocks, slots, plan.capacity)
    items, spans = work_list(rounds, [0] * len(rounds), run)
    used = plan.items[plan.items[:, 0] >= 0].tolist()
    assert used == items
    assert [span for span in plan.spans.tolist() if span[1]] == [span for span in spans if span[1]]
    for b, count in enumerate(rounds):
        covered = [r for item in used if item[0] == b for r in range(item[1], item[1] + item[2])]
        assert covered == list(range(count))


def test_a_window_lists_only_what_is_seen(device):
    layout = layout_of("4", "4", 64)
    plan = DecodePlan(layout, batch=1, heads=2, group=4, device=device, slots=64, impl="triton")
    lengths = torch.tensor([4000], dtype=torch.int32, device=device)
    plan.update(lengths, torch.tensor([4000], dtype=torch.int32, device=device), 300)
    seen = plan.items[plan.items[:, 0] >= 0].tolist()
    assert min(item[1] for item in seen) == (4001 - 300) // plan.geometry.tile.round
