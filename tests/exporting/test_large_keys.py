"""The effect of vLLM issue 11906: a model with large keys collapses in an FP8 cache at scale 1.0, calibration saves it.

The model is made: keys times a power of two, queries divided by it, so without quantization not a logit changes.
"""

import pytest
import torch

from kvq.cache import make_plan
from kvq.calib.data import builtin_text
from kvq.eval.divergence import divergence
from kvq.eval.likelihood import score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.exporting.exporter import export
from kvq.exporting.simulated_engine import simulated_config, simulated_plan
from kvq.models.describe import describe
from kvq.models.resolve import load_model, load_tokenizer
from kvq.recipe import load_recipe


def scores(folder, ids, windows):
    """Perplexity and KL of the folder's calibrated cache, and of the same cache at scale 1.0."""
    model = load_model(folder, dtype=torch.float32, config=simulated_config(folder))
    unit = load_recipe("fp8").override({"key.scale": "unit", "value.scale": "unit"})
    plans = {"calibrated": simulated_plan(folder), "unit": make_plan(unit, describe(model.config))}
    found = {name: [] for name in plans}
    cut = cut_windows(ids, len(ids) // windows, limit=windows)
    for window in score_windows(model, plans, cut, "simulate"):
        for name, score in window.items():
            found[name].append(score)
    return {name: (perplexity(rows), divergence(rows)) for name, rows in found.items()}


def test_not_a_logit_changes_without_quantization(tiny_checkpoint, large_keys, tmp_path):
    source = tiny_checkpoint(layers=2, head_dim=32)
    large = large_keys(source, tmp_path / "large", 2.0**12)
    ids = torch.arange(3, 90).unsqueeze(0)
    with torch.no_grad():
        before, after = (load_model(f, dtype=torch.float64)(ids).logits for f in (source, large))
    assert (before - after).abs().max() < 1e-9


def test_a_tiny_model_with_large_keys(tiny_checkpoint, large_keys, tmp_path, stats_of):
    """Calibrated, large keys cost what small ones cost; at scale 1.0 they cost far more."""
    found = {}
    source = tiny_checkpoint(layers=2, head_dim=32)
    for name, folder in (("small", source), ("large", large_keys(source, tmp_path / "large", 2.0**12))):
        export(folder, "fp8", tmp_path / f"out-{name}", target="vllm", stats=stats_of(folder))
        ids = torch.randint(3, 100, (512,), generator=torch.Generator().manual_seed(1)).tolist()
        found[name] = scores(tmp_path / f"out-{name}", ids, 4)
    calibrated = {name: rows["calibrated"][1].kl for name, rows in found.items()}
    assert calibrated["large"] == pytest.approx(calibrated["small"], rel=0.2)
    assert found["large"]["unit"][1].kl > 50 * calibrated["large"]


@pytest.mark.model
def test_the_real_model_with_large_keys(builtin_dir, large_keys, tmp_path, stats_of):
    """SmolLM2 with keys 256 times as large (up to 5,000): whole with kvq's scales, ruined at 1.0."""
    large = large_keys(builtin_dir, tmp_path / "large", 256.0)
    tokenizer = load_tokenizer(builtin_dir)
    measured, scored = (
        tokenizer(builtin_text(part)[:6000])["input_ids"][:256] for part in ("calibration", "evaluation")
    )
    windows = torch.tensor(measured).view(1, -1)
    export(large, "fp8", tmp_path / "out", target="vllm", stats=stats_of(large, windows))
    found = scores(tmp_path / "out", scored, 1)
    calibrated, unit = found["calibrated"][0], found["unit"][0]
    assert calibrated.value < 1.1 * calibrated.baseline
    assert unit.value > 5 * unit.baseline
