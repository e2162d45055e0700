"""The plain export of the embedded model in stock transformers, in a process that never sees kvq."""

import subprocess
import sys

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.data import builtin_text
from kvq.calib.needs import needs_of
from kvq.exporting.exporter import export
from kvq.models.describe import describe
from kvq.models.resolve import load_model, load_tokenizer, weights_fingerprint
from kvq.recipe import load_recipe

TOKENS = 96
STOCK = (
    "import sys, torch; from transformers import AutoModelForCausalLM\n"
    "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)\n"
    "assert 'kvq' not in sys.modules and not any(info.values()), info\n"
    "torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
)


@pytest.mark.model
def test_logits_differ_as_random_rounding_of_the_weights_makes_them_differ(builtin_dir, tmp_path):
    """KL(original || plain) is within five times that of weights moved by up to half a unit in their last place."""
    recipe, model = load_recipe("qoq4"), load_model(builtin_dir, dtype=torch.float32)
    ids = load_tokenizer(builtin_dir)(builtin_text("calibration")[:4000])["input_ids"]
    windows = torch.tensor(ids[:512]).view(2, 256)
    stats = collect(
        model,
        windows,
        needs=needs_of(recipe, describe(model.config)),
        weights_fingerprint=weights_fingerprint(builtin_dir),
    )
    result = export(builtin_dir, recipe, tmp_path / "out", stats=stats, target="plain")
    assert result.check["loaded"] is None
    tokens = windows[:1, :TOKENS]
    torch.save(tokens, tmp_path / "ids.pt")
    arguments = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, timeout=300, cwd=tmp_path)
    with torch.no_grad():
        before = model(tokens).logits.double().log_softmax(-1)
    after = torch.load(tmp_path / "logits.pt").double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0 < kl < 5 * result.check["noise_kl"]
    assert float((before.argmax(-1) == after.argmax(-1)).double().mean()) > 0.95
