"""A codec and a transform of another distribution go the whole way of a shipped one, and no file of kvq knows them."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kvq.cache import packed_layers
from kvq.calib.needs import needs_of
from kvq.cli import main
from kvq.codecs import CODECS, PARTS, CodecSpec, register_codec
from kvq.errors import RecipeError
from kvq.eval.identity import plan_hash
from kvq.models.describe import describe
from kvq.recipe import load_recipe, parse_recipe
from kvq.registry import Registry
from kvq.transforms import TRANSFORMS

ROOT = Path(__file__).parents[2]
# What the documentation tells others to write.
PLUGIN = re.search(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(), re.DOTALL)[1]
SIDE = {"codec": "ladder", "reach": 0.9}
RECIPE = {
    "name": "laddered",
    "summary": "a codec and a transform from outside",
    "tokens": {"sinks": 1, "window": 16},
    "key": SIDE,
    "value": SIDE | {"outliers": {"share": 0.02, "along": "token"}},
    "transforms": {"key": [{"kind": "spread"}, {"kind": "hadamard"}], "value": [{"kind": "spread", "power": 0.3}]},
}
STEPS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
import kvq
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64)
ids = torch.arange(3, 73).unsqueeze(0)
print(model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 70:].tolist())
"""
LOST = "import sys; from kvq.recipe import load_recipe; load_recipe(sys.argv[1])"


def distribution(site, module: str, source: str, **groups: str):
    """A module and the metadata by which an installer would make its entry points known."""
    site.mkdir(exist_ok=True)
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"[{group.replace('_', '.')}]\n{module} = {target}\n" for group, target in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The plug-in's folder, on the path of this process; what it registers is forgotten afterwards."""
    for registry in (CODECS, PARTS, TRANSFORMS):
        registry.names()
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
        monkeypatch.setattr(registry, "_others", False)
    site = distribution(
        tmp_path / "site", "kvq_ladder", PLUGIN, kvq_codecs="kvq_ladder:Ladder", kvq_transforms="kvq_ladder"
    )
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("kvq_ladder", None)


def run(*arguments):
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def fresh(code: str, *arguments, without=None) -> subprocess.CompletedProcess:
    """Run code in another process, which has this one's path or all of it but one folder."""
    path = os.pathsep.join(part for part in sys.path if part and part != str(without))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


@pytest.mark.long
def test_the_whole_way_of_a_registered_codec_and_transform(plugin, tiny_checkpoint, tiny_config, tmp_path):
    """Recipe, needs, calibration, export, loading here and in a fresh process, every way of decoding, evaluation."""
    file, stats, text = tmp_path / "laddered.yaml", tmp_path / "stats.safetensors", tmp_path / "text.txt"
    file.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    text.write_text("The quick brown fox jumps over the lazy dog. " * 180)
    recipe = load_recipe(file)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), source="again").hash == recipe.hash
    assert "valid" in run("recipes", "check", file)
    assert yaml.safe_load(run("recipes", "show", file))["key"] == SIDE
    assert needs_of(recipe, describe(tiny_config(head_dim=32))) == {"key.range", "value.range", "reservoir"}

    source, folder = tiny_checkpoint(head_dim=32, heads=4, kv_heads=2), tmp_path / "exported"
    run("calibrate", source, "--for", file, "-o", stats, "--data", text, "--samples", 2, "--seq-len", 64)
    run("export", source, "--recipe", file, "--stats", stats, "-o", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    # The scale of values is in the weights; that of keys does not commute with the rotary embedding.
    assert {chains["value"].folded for chains in model.kvq.plan.chains.values()} == {1}
    assert {chains["key"].folded for chains in model.kvq.plan.chains.values()} == {0}

    ids = torch.arange(3, 73).unsqueeze(0)
    greedy = model.generate(ids, **STEPS, return_dict_in_generate=True)
    assert len(packed_layers(greedy.past_key_values)) == 2
    assert all(layer.reads_handle for layer in packed_layers(greedy.past_key_values))
    every_way_of_decoding(model, ids, greedy.sequences)
    logits = [m(ids, use_cache=False).logits.detach() for m in (model, plain)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)

    report = tmp_path / "report.json"
    sizes = ("--data", text, "--seq-len", 64, "--stride", 32, "--limit", 2, "--tasks", "perplexity")
    run("eval", folder, *sizes, "--no-cache", "--json", report)
    assert json.loads(report.read_text())

    # Kept results are filed under the plug-in's source, too.
    before, source_file = plan_hash(model.kvq.plan), plugin / "kvq_ladder.py"
    source_file.write_text(f"{PLUGIN}# another version\n")
    assert plan_hash(model.kvq.plan) != before

    done = fresh(FRESH, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == greedy.sequences[0, 70:].tolist()
    lost = fresh(LOST, folder / "recipe.yaml", without=plugin)
    assert lost.returncode != 0
    assert "unknown codec 'ladder'" in lost.stderr.strip().splitlines()[-1]


def every_way_of_decoding(model, ids, greedy):
    assistant = copy.deepcopy(model)
    for more in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}, {"prefill_chunk_size": 32}):
        found = model.generate(ids, **STEPS, **more)
        # A later chunk of a prompt reads the packed chunks before it.
        assert found.shape == greedy.shape if "prefill_chunk_size" in more else torch.equal(found, greedy), more.keys()
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(model.generate(ids, **STEPS | {"do_sample": True, "num_return_sequences": 2}))
    assert torch.equal(*samples)
    beams = model.generate(ids, **STEPS, num_beams=3)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(ids, **STEPS, num_beams=3), beams)
    model.set_attn_implementation("kvq")
    short = torch.cat([torch.zeros(1, 30, dtype=torch.long), ids[:, :40]], dim=1)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :30] = 0
    batch = model.generate(torch.cat([ids, short]), attention_mask=mask, **STEPS)
    assert torch.equal(batch[0], greedy[0])
    assert torch.equal(batch[1, 30:], model.generate(ids[:, :40], **STEPS)[0])


def test_errors_of_a_registered_method_are_those_of_a_shipped_one(plugin):
    with pytest.raises(RecipeError, match=r"key: codec 'ladder' needs 'reach': add 'reach: \.\.\.' beside it\."):
        parse_recipe(RECIPE | {"key": {"codec": "ladder"}}, source="x")
    with pytest.raises(RecipeError, match=r"reach=2 is no share of the range"):
        parse_recipe(RECIPE | {"key": SIDE | {"reach": 2}}, source="x")
    with pytest.raises(RecipeError, match=r"has no setting 'reech'\. Did you mean 'reach'\?"):
        parse_recipe(RECIPE | {"key": SIDE | {"reech": 2}}, source="x")
    with pytest.raises(RecipeError, match=r"unknown codec 'laddr'\. Did you mean 'ladder'\?"):
        parse_recipe(RECIPE | {"key": {"codec": "laddr"}}, source="x")
    behind = {"key": [{"kind": "hadamard"}, {"kind": "spread"}]}
    with pytest.raises(RecipeError, match=r"key transform 'spread' comes after 'hadamard', which has mixed"):
        parse_recipe(RECIPE | {"transforms": behind}, source="x")


def test_a_name_belongs_to_one_class():
    registry = Registry("codec", "kvq.recipes", "kvq.nothing")
    first, second = (type(name, (), {"__module__": "elsewhere"}) for name in ("First", "Second"))
    registry.register("own", "codec")(first)
    registry.add("own", first)
    with pytest.raises(RecipeError, match=r"codec 'own' of elsewhere\.Second is elsewhere\.First already"):
        registry.add("own", second)
    assert (first.codec, registry.get("own")) == ("own", first)


def test_a_class_that_lacks_what_every_one_has_is_refused_by_its_registry():
    with pytest.raises(RecipeError, match=r"codec 'half' of .*Half lacks bind: write them\."):

        @register_codec("half")
        class Half(CodecSpec):
            pass

    assert CODECS.find("half") is None


def test_a_plug_in_that_cannot_be_loaded_is_one_sentence_and_shipped_recipes_go_on(plugin, monkeypatch):
    distribution(plugin, "kvq_broken", "import kvq_lacking\n", kvq_codecs="kvq_broken")
    monkeypatch.setattr(CODECS, "_others", False)
    assert load_recipe("kivi2").key.codec == "affine"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE | {"key": {"codec": "other"}}, source="x")
    assert str(caught.value) == (
        "plug-in 'kvq_broken' of kvq_broken (entry-point group 'kvq.codecs', kvq_broken) cannot be loaded: "
        "ModuleNotFoundError: No module named 'kvq_lacking'; mend it or uninstall it."
    )
