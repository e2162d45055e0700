"""What the host does in a steady decode step; ``test_host_overhead.py`` runs this file in a process of its own."""

import sys
from pathlib import Path

import pytest
import torch

from kvq.cache.serving import LATENT, why_two_passes
from kvq.kernels.device import launch
from kvq.kernels.dispatch import why_no_triton
from kvq.recipe import list_recipes, load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import host_overhead
from shipped import LATENT_RECIPES

NO_TRITON = why_no_triton(torch.device("cpu"))
pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
# Shipped recipes whose pages are decoded before kernels attend to them, and why.
TWO_PASSES = {
    "biassafe4": "keys are stored without the bias",
    "gear2": "codec 'sparse'",
    "gear2-light": "codec 'lowrank'",
    "gear4": "codec 'sparse'",
    **dict.fromkeys(("klt3", "klt4"), "tokens in a run that shares scales, fewer than 16"),
    **{f"kvquant{bits}{end}": "keys are stored before RoPE" for bits in (2, 3, 4) for end in ("", "-dense")},
    "decoquant4": "codec 'decomposed'",
    **dict.fromkeys(LATENT_RECIPES, LATENT),
    "qjl": "codec 'sketch'",
    "skvq2": "keys are stored before RoPE",
}
# Read in one pass, but keys enter their frame in torch, so the host packs.
FRAMED = {"klt2", "klt2-light"}
RECIPES = [name for name in list_recipes() if not load_recipe(name).is_exact and name not in {*TWO_PASSES, *FRAMED}]


def test_the_control_counts_what_torch_is_known_to_do():
    """DynamicCache with SDPA: 156 calls and 40 operators a layer of a longer model, measured with other means."""
    row = host_overhead.per_layer(None, 1)
    assert 130 <= row["calls"] <= 190
    assert 38 <= row["operators"] <= 48
    assert row["copies"] == row["syncs"] == row["launches"] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_fused_step_stays_below_its_bars(name):
    """And operators and calls do not grow with the batch."""
    plan = host_overhead.plan_of(name)
    rows = [host_overhead.per_layer(plan, batch, steps=2) for batch in (1, 8)]
    for row in rows:
        assert row["ran"].startswith("triton")
        assert {what: row[f"worst_{what}"] for what in ("copies", "syncs")} == {"copies": 0, "syncs": 0}
        assert all(row[what] <= most for what, most in host_overhead.MOST.items()), row
    assert rows[1]["operators"] == rows[0]["operators"]
    assert rows[1]["calls"] == rows[0]["calls"]


def test_every_other_recipe_has_its_reason():
    """A recipe that starts to run fused must be taken off the list."""
    for name, reason in TWO_PASSES.items():
        groups = [group for layer in host_overhead.plan_of(name).layers.values() for group in layer]
        assert all(reason in str(why_two_passes(group)) for group in groups), name
    for name in FRAMED:
        groups = [group for layer in host_overhead.plan_of(name).layers.values() for group in layer]
        assert all(why_two_passes(group) is None and group.frame is not None for group in groups), name


def test_pads_cost_a_few_waits_a_forward_not_a_layer():
    row = host_overhead.per_layer(host_overhead.plan_of("int4"), 8, padded=True)
    # The whole forward's, over its layers.
    assert row["syncs"] * host_overhead.LAYERS <= 3
    assert row["copies"] * host_overhead.LAYERS <= 1
    assert row["calls"] <= host_overhead.MOST["calls"]


def test_what_the_host_does_is_seen(monkeypatch):
    """Negative control: a step that waits, copies and computes in every layer is counted so."""
    from kvq.cache.device_step import DeviceStep

    append = DeviceStep.append

    def careless(self, keys, values):
        assert keys.sum().item() is not None
        torch.arange(3).to(keys.device)
        append(self, keys, values)

    plan = host_overhead.plan_of("int4")
    before = host_overhead.per_layer(plan, 1)
    monkeypatch.setattr(DeviceStep, "append", careless)
    after = host_overhead.per_layer(plan, 1)
    assert (after["syncs"], after["copies"]) == (1, 1)
    assert after["operators"] - before["operators"] >= 2


def test_kernels_run_in_the_device_of_their_tensors(monkeypatch):
    """With several devices a launch enters that of its first tensor, and without it nothing is entered."""
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *raised):
            entered.append(None)

    class Tensor:
        device = torch.device("cuda", 1)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **settings: entered.append((args, settings))

    tensor = Tensor()
    one = launch.Launch(kernel=Kernel(), grid=(1, 1, 1), args=(tensor, 2), constants={"N": 3}, options={})
    monkeypatch.setattr(torch.cuda, "device", Device)
    one.run()
    assert entered == [((tensor, 2), {"N": 3})]
    entered.clear()
    monkeypatch.setattr(launch, "several_devices", lambda: True)
    one.run()
    assert entered == [torch.device("cuda", 1), ((tensor, 2), {"N": 3}), None]
