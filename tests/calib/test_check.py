"""Law: statistics serve the model that they were measured on, and no other."""

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from kvq.calib.check import check_stats
from kvq.calib.collect import collect
from kvq.calib.windows import token_windows
from kvq.errors import CheckpointError
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, weights_fingerprint


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture
def stats(folder):
    windows = token_windows(load_tokenizer(folder), ["The quick brown fox. " * 20], samples=2, seq_len=32)
    return collect(
        load_model(folder), windows.tokens, data=windows.identity, weights_fingerprint=weights_fingerprint(folder)
    )


def spec_of(folder):
    return describe(load_config(folder))


def test_its_own_model_is_taken(folder, stats):
    check_stats(stats, spec_of(folder), folder)


def test_another_shape_is_refused(tiny_checkpoint, stats):
    other = tiny_checkpoint(layers=3, name="other")
    with pytest.raises(CheckpointError, match="another shape"):
        check_stats(stats, spec_of(other), other, other_weights=True)


def test_other_weights_are_refused_unless_allowed(tiny_checkpoint, stats):
    other = tiny_checkpoint(seed=1, name="other")
    with pytest.raises(CheckpointError, match="other weights"):
        check_stats(stats, spec_of(other), other)
    check_stats(stats, spec_of(other), other, other_weights=True)


def test_another_tokenizer_is_refused(folder, stats):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("fox")])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        check_stats(stats, spec_of(folder), folder)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        check_stats(stats, spec_of(folder), folder, other_weights=True)


def test_without_a_tokenizer_there_is_nothing_to_compare(folder, stats):
    for file in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        file.unlink()
    check_stats(stats, spec_of(folder), folder)
