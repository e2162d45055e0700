"""Layer by layer gives the statistics of the whole model to the bit, resumes from its last layer, and stays small."""

import itertools
import json
import logging
from dataclasses import replace

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.job import Job
from kvq.calib.layerwise import collect_by_layer
from kvq.calib.needs import ALL_NEEDS
from kvq.calib.shell import Shell
from kvq.errors import CheckpointError, UnsupportedModelError
from kvq.models.describe import describe
from kvq.models.resolve import load_model

FAMILIES = (
    "llama", "gemma2", "gemma3_text", "cohere2", "smollm3", "phi3", "glm4", "gpt_oss", "mixtral", "qwen3_moe",
    "qwen3_next", "olmo2", "llama4_text", "gpt_neox", "gpt2", "gptj", "bloom", "falcon",
)  # fmt: skip
TOKENS = torch.randint(4, 100, (7, 17), generator=torch.Generator().manual_seed(0))
VALID = torch.ones(7, 17, dtype=torch.bool)
VALID[2, :5] = VALID[5, 9:] = False


def job_of(model, needs=ALL_NEEDS, **settings) -> Job:
    facts = {"batch_size": 2, "seed": 0, "dtype": model.dtype, "reservoir_bytes": 2**29}
    return Job.of(describe(model.config), TOKENS, VALID, needs, **(facts | settings))


@pytest.fixture
def saved(tmp_path):
    """``saved(model) -> folder`` of many shards."""

    def save(model):
        model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
        return tmp_path / "model"

    return save


def assert_same_bits(one, two):
    assert one.to_parts()[1] == two.to_parts()[1]
    ours, theirs = one.to_parts()[0], two.to_parts()[0]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_bits_of_the_whole_model(tiny_model, family, saved, tmp_path, name):
    folder = saved(tiny_model(family(name)))
    model = load_model(folder)
    whole = collect(model, TOKENS, valid=VALID, needs=ALL_NEEDS, batch_size=2)
    shell = Shell(folder, torch.float32, "cpu")
    calls = []
    by_layer = collect_by_layer(shell, job_of(model), tmp_path / "state", progress=lambda *c: calls.append(c))
    assert_same_bits(by_layer, whole)
    layers = len(shell.layers)
    assert calls[0] == (0, 7 * layers)
    assert calls[-1] == (7 * layers, 7 * layers)
    assert all(b[0] > a[0] for a, b in itertools.pairwise(calls))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_too(tiny_model, saved, tmp_path, dtype):
    folder = saved(tiny_model(dtype=dtype))
    model = load_model(folder, dtype=dtype)
    # Weights that need no conversion stay in the mapped file, at any multiple of 8 bytes, and on some processors the
    # last bit of a product depends on that.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    whole = collect(model, TOKENS, valid=VALID, needs=ALL_NEEDS, batch_size=2)
    by_layer = collect_by_layer(Shell(folder, dtype, "cpu"), job_of(model), tmp_path / "state")
    assert_same_bits(by_layer, whole)


def test_one_layers_weights_are_held_at_a_time(tiny_model, saved):
    model = tiny_model(layers=3)
    folder = saved(model)
    shell = Shell(folder, torch.float32, "cpu")

    def held() -> int:
        return sum(p.numel() for p in shell.model.parameters() if not p.is_meta)

    small = model.model.norm.weight.numel()
    layer = sum(p.numel() for p in model.model.layers[1].parameters())
    assert held() == small
    for index in (1, 0, 2):
        with shell.layer(index):
            assert held() == small + layer
            for name, parameter in model.model.layers[index].named_parameters():
                assert torch.equal(shell.layers[index].get_parameter(name), parameter)
        assert held() == small
    with shell.embeddings():
        assert held() == small + model.model.embed_tokens.weight.numel()
    assert held() == small


def test_a_layer_that_is_not_in_the_checkpoint_is_named(tiny_model, saved):
    folder = saved(tiny_model(layers=2))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    shell = Shell(folder, torch.float32, "cpu")
    with pytest.raises(CheckpointError, match="lacks weights of layer 2, first"), shell.layer(2):
        pass


class Stop:
    """Progress that interrupts at the first call at or after ``step``, and records every call."""

    def __init__(self, step: int):
        self.step, self.calls = step, []

    def __call__(self, done: int, total: int):
        self.calls.append(done)
        if done >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 7, 9, 14, 20])
def test_an_interrupted_run_continues_from_its_last_layer_to_the_same_bits(tiny_model, saved, tmp_path, step):
    model = tiny_model(layers=3)
    folder, state = saved(model), tmp_path / "state"
    whole = collect_by_layer(Shell(folder, torch.float32, "cpu"), job_of(model), tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        collect_by_layer(Shell(folder, torch.float32, "cpu"), job_of(model), state, progress=Stop(step))
    calls = []
    resumed = collect_by_layer(
        Shell(folder, torch.float32, "cpu"), job_of(model), state, progress=lambda *c: calls.append(c[0])
    )
    # A layer is finished with its last window, and 7 windows went through each.
    assert calls[0] == (step - 1) // 7 * 7
    assert_same_bits(resumed, whole)
    assert not list(state.glob("hidden-*"))


def test_the_state_of_another_run_is_not_used(tiny_model, saved, tmp_path, caplog):
    model = tiny_model(layers=2)
    folder, state = saved(model), tmp_path / "state"
    collect_by_layer(Shell(folder, torch.float32, "cpu"), job_of(model), state)
    with caplog.at_level(logging.WARNING):
        job = job_of(model, batch_size=3)
        again = collect_by_layer(Shell(folder, torch.float32, "cpu"), job, state)
    assert "Starting over" in caplog.text
    assert_same_bits(again, collect(model, TOKENS, valid=VALID, needs=ALL_NEEDS, batch_size=3))


def test_layers_that_read_each_other_are_refused(tiny_model, family, saved, tmp_path):
    with pytest.raises(UnsupportedModelError, match="read another layer's keys and values; leave --layer-by-layer"):
        Shell(saved(tiny_model(family("gemma3n_text"))), torch.float32, "cpu")


def test_a_layer_that_takes_the_embeddings_too_is_refused(tiny_model, saved, tmp_path, monkeypatch):
    """Made of Llama, as Zamba 2 is made: the decoder gives every layer the embeddings beside the hidden states."""
    from transformers.models.llama import modeling_llama

    model = tiny_model(layers=3)
    folder = saved(model)
    own = modeling_llama.LlamaModel.forward

    def with_embeddings(self, input_ids=None, inputs_embeds=None, **kwargs):
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hook = self.layers[1].register_forward_pre_hook(
            lambda _, args: (args[0] + embeddings, *args[1:]),
        )
        try:
            return own(self, inputs_embeds=embeddings, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_embeddings)
    with pytest.raises(UnsupportedModelError, match="its layer 1 takes more than the hidden states of the one before"):
        collect_by_layer(Shell(folder, torch.float32, "cpu"), job_of(model), tmp_path / "state")


def test_what_is_missing_is_the_same(tiny_model, family, saved, tmp_path):
    folder = saved(tiny_model(family("bloom")))
    model = load_model(folder)
    with pytest.raises(UnsupportedModelError, match="cannot be measured"):
        collect_by_layer(Shell(folder, torch.float32, "cpu"), job_of(model), tmp_path / "a", strict=True)
    stats = collect_by_layer(Shell(folder, torch.float32, "cpu"), job_of(model), tmp_path / "b")
    whole = collect(model, TOKENS, valid=VALID, needs=ALL_NEEDS, batch_size=2)
    assert stats.missing == whole.missing != {}
    assert_same_bits(stats, replace(whole))
