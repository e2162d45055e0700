"""Steps of ``generate`` that are recorded and replayed give what the model gives.

There is no CUDA here: a stand-in records the operators and kernel launches of a forward on the CPU (kernels in Triton's
interpreter) and runs them again on the same memory, as a graph does. What waits for the device is an error in it, too.
"""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kvq.integrations import decode_graph
from kvq.integrations.runtime import quantized_cache
from kvq.kernels.device.launch import Launch
from kvq.kernels.dispatch import why_no_triton
from kvq.recipe import load_recipe, parse_recipe

NO_TRITON = why_no_triton(torch.device("cpu"))
pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))

# Keys are packed a token after they leave the window of five; the second page of a row is taken at 73 tokens.
INT4 = load_recipe("int4").override({"tokens.sinks": 3, "tokens.window": 5})
ROTATED = load_recipe("quarot4").override({"tokens.window": 8})


class Tape(TorchDispatchMode):
    """A recorder (``decode_graph.Recorder``) without a graph. It runs what it records, so the first replay does
    nothing. ``left_out``: kernels that a replay forgets."""

    def __init__(self, monkeypatch, left_out: tuple[str, ...] = ()):
        super().__init__()
        self.calls: list = []
        self.left_out = left_out
        self.run = Launch.run
        monkeypatch.setattr(Launch, "run", lambda launch, *first: self.launch(launch, first))

    def __call__(self, run):
        self.calls = []
        with self:
            found = run()
        calls, fresh = self.calls, [True]
        return lambda: fresh.pop() if fresh else [call() for call in calls], found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host waits for a number")
        result = func(*args, **(kwargs or {}))
        self.calls.append(lambda: put(func(*args, **(kwargs or {})), result))
        return result

    def launch(self, launch: Launch, first: tuple) -> None:
        if torch._C._len_torch_dispatch_stack() and launch.kernel.__name__ not in self.left_out:
            self.calls.append(lambda: self.run(launch, *first))
        with _disable_current_modes():
            self.run(launch, *first)


def put(found, result) -> None:
    """What an operator gave into the memory of what it gave first; views and what is written in place lie there."""
    for new, old in zip(tree_leaves(found), tree_leaves(result), strict=True):
        if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
            old.copy_(new)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=1, heads=2, kv_heads=1, head_dim=32)


def prompt(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(0))


def decoded(model, recipe, ids, new: int, impl: str = "triton", **given):
    """Logits of every new token, and whatever steps were replayed; ``generate`` within a block."""
    graphs = []

    class Seen(decode_graph.DecodeGraph):
        def __init__(self, *settings):
            super().__init__(*settings)
            graphs.append(self)

    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    with pytest.MonkeyPatch.context() as patch, quantized_cache(model, recipe, impl=impl):
        patch.setattr(decode_graph, "DecodeGraph", Seen)
        found = model.generate(ids, **settings, **given, output_logits=True, return_dict_in_generate=True)
        assert "forward" not in vars(model)
    return torch.stack(found.logits), graphs


@pytest.mark.parametrize(("recipe", "length", "new"), [(INT4, 69, 7), (ROTATED, 20, 4)])
def test_replayed_steps_give_the_models_own_logits(model, monkeypatch, recipe, length, new):
    """Bit by bit, with a batch, transforms, packing in each step, and a page that a row takes on the way."""
    ids = prompt(2, length)
    want, graphs = decoded(model, recipe, ids, new)
    assert not graphs
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", Tape(monkeypatch))
    found, (graph,) = decoded(model, recipe, ids, new)
    assert torch.equal(found, want)
    grown = length < 72 < length + new - 1
    assert graph.records == 1 + grown
    # The prompt gives the first token; the first step, and one that takes a page, are the model's own.
    assert graph.replays == new - 2 - grown


def test_a_replay_that_forgets_a_kernel_gives_other_logits(model, monkeypatch):
    ids = prompt(2, 20)
    want, _ = decoded(model, INT4, ids, 5)
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", Tape(monkeypatch, left_out=("append_tokens",)))
    found, (graph,) = decoded(model, INT4, ids, 5)
    assert graph.replays == 3
    assert torch.equal(found[:3], want[:3])
    assert not torch.equal(found[3:], want[3:])


def said(caplog) -> list[str]:
    mark = "without a CUDA graph: "
    return [record.getMessage().split(mark)[1] for record in caplog.records if mark in record.getMessage()]


@pytest.fixture
def heard(caplog, monkeypatch):
    """transformers' loggers hand nothing on, and say a thing once in a process."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("kvq"), "propagate", True)
    decode_graph.logger.warning_once.cache_clear()
    return caplog


def refused(model, heard, monkeypatch, recipe=INT4, ids=None, impl="triton", **given) -> list[str]:
    """What is said where nothing is replayed."""
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", Tape(monkeypatch))
    _, graphs = decoded(model, recipe, prompt(1, 12) if ids is None else ids, 3, impl, **given)
    assert sum(graph.replays for graph in graphs) == 0
    return said(heard)


def test_hooks_are_not_left_out(model, heard, monkeypatch):
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    try:
        assert refused(model, heard, monkeypatch) == ["module 'lm_head' has a hook, which a graph would leave out."]
    finally:
        hook.remove()


def test_rows_of_different_length_keep_their_masks(model, heard, monkeypatch):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    (reason,) = refused(model, heard, monkeypatch, ids=prompt(2, 12), attention_mask=mask)
    assert reason.startswith("rows of different length")


def test_what_the_device_cannot_step_alone_is_said(model, heard, monkeypatch):
    (reason,) = refused(model, heard, monkeypatch, impl="reference")
    assert reason == "it was not asked for."


def test_two_passes_are_said(model, heard, monkeypatch):
    recipe = load_recipe("gear4").override({"tokens.window": 64})
    (reason,) = refused(model, heard, monkeypatch, recipe=recipe)
    assert reason


def test_plain_layers_grow(tiny_model, heard, monkeypatch):
    data = INT4.to_dict() | {"layers": {"1": {side: {"codec": "exact"} for side in ("key", "value")}}}
    two = tiny_model(layers=2, heads=2, kv_heads=1, head_dim=32)
    (reason,) = refused(two, heard, monkeypatch, recipe=parse_recipe(data, source="half"))
    assert reason.startswith("layers that keep plain tensors")


def test_several_devices_and_moving_rope_are_known(model, monkeypatch):
    with quantized_cache(model, INT4):
        assert decode_graph.why_no_graph(model) is None
        monkeypatch.setitem(model.config.rope_parameters, "rope_type", "dynamic")
        assert "'dynamic'" in decode_graph.why_no_graph(model)
        elsewhere = torch.nn.Parameter(torch.empty(1, device="meta"))
        monkeypatch.setattr(model, "parameters", lambda: iter([*model.lm_head.parameters(), elsewhere]))
        assert "several devices" in decode_graph.why_no_graph(model)


def test_what_cannot_be_recorded_goes_on_as_always(model, heard, monkeypatch):
    """The recorder fails after the host has counted and before the device has done anything, as CUDA's does."""
    ids = prompt(1, 12)
    want, _ = decoded(model, INT4, ids, 4)

    def record(run):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "run", lambda *_: None)
            run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", record)
    found, (graph,) = decoded(model, INT4, ids, 4)
    assert torch.equal(found, want)
    assert graph.replays == 0
    assert said(heard) == ["operation not permitted when stream is capturing."]


def test_it_can_be_switched_off(model, monkeypatch):
    monkeypatch.setitem(decode_graph.RECORDERS, "cpu", Tape(monkeypatch))
    with quantized_cache(model, INT4, impl="triton"):
        model.kvq.graphs = False
        with torch.no_grad(), decode_graph.decoding(model):
            assert "forward" not in vars(model)
        model.kvq.graphs = True
        with torch.no_grad(), decode_graph.decoding(model):
            assert "forward" in vars(model)
