"""Attention weights are the model's: against an fp64 softmax written row by row, with grouped heads, softcap and
sink logits."""

import math

import pytest
import torch

from kvq.calib import attention as module
from kvq.calib.attention import AttentionOptions, probe_weights, received_weights
from kvq.calib.observers.sinks import POSITIONS, Sinks
from kvq.calib.observers.tokens import window_priorities

OPTIONS = {
    "plain": AttentionOptions(scaling=0.3),
    "softcap": AttentionOptions(scaling=0.3, softcap=2.0),
    "sink logits": AttentionOptions(scaling=0.3, sink_logits=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def draw(batch: int = 2, tokens: int = 11, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, heads, tokens, 8, generator=g, dtype=torch.float64) for heads in (4, 2))
    return query, key


def reference(query, key, options: AttentionOptions) -> torch.Tensor:
    """One window without padding: query [H, T, D], key [K, T, D] -> weights [H, T, T]."""
    heads, tokens, _ = query.shape
    out = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    for h in range(heads):
        for i in range(tokens):
            scores = [float(query[h, i] @ key[h * len(key) // heads, j]) * options.scaling for j in range(i + 1)]
            if options.softcap:
                scores = [options.softcap * math.tanh(s / options.softcap) for s in scores]
            total = sum(math.exp(s) for s in scores)
            total += math.exp(float(options.sink_logits[h])) if options.sink_logits is not None else 0
            out[h, i, : i + 1] = torch.tensor([math.exp(s) / total for s in scores], dtype=torch.float64)
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_received_weights_are_column_sums_over_the_group(name, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 4)
    query, key = draw()
    got = received_weights(query, key, None, OPTIONS[name])
    for row in range(2):
        columns = reference(query[row], key[row], OPTIONS[name]).sum(1)
        torch.testing.assert_close(got[row], columns.view(2, 2, -1).sum(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_probes_are_rows_at_the_ends_of_equal_parts(name):
    query, key = draw()
    got, counts = probe_weights(query, key, None, OPTIONS[name], probes=4)
    assert counts.tolist() == [4, 4]
    rows = [math.ceil(11 * (j + 1) / 4) - 1 for j in range(4)]
    assert rows == [2, 5, 8, 10]
    for row in range(2):
        weights = reference(query[row], key[row], OPTIONS[name])
        torch.testing.assert_close(got[row], weights[:, rows], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_weight_and_changes_none(side):
    """A padded batch equals its rows alone; the padding is NaN."""
    query, key = draw()
    lengths = [11, 7]
    valid = torch.stack([torch.arange(11) < n if side == "right" else torch.arange(11) >= 11 - n for n in lengths])
    q, k = (torch.where(valid[:, None, :, None], x, float("nan")) for x in (query, key))
    received = received_weights(q, k, valid, OPTIONS["sink logits"])
    probes, _ = probe_weights(q, k, valid, OPTIONS["sink logits"], probes=3)
    for row in range(2):
        own = valid[row]
        alone_q, alone_k = query[row : row + 1, :, own], key[row : row + 1, :, own]
        alone = received_weights(alone_q, alone_k, None, OPTIONS["sink logits"])
        torch.testing.assert_close(received[row][:, own], alone[0], rtol=1e-10, atol=1e-12)
        assert (received[row][:, ~own] == 0).all()
        alone, _ = probe_weights(alone_q, alone_k, None, OPTIONS["sink logits"], probes=3)
        torch.testing.assert_close(probes[row][:, :, own], alone[0], rtol=1e-10, atol=1e-12)
        assert (probes[row][:, :, ~own] == 0).all()


def test_a_row_of_padding_alone_has_no_weight():
    query, key = draw()
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1] = False
    probes, counts = probe_weights(query, key, valid, OPTIONS["plain"], probes=3)
    assert counts.tolist() == [3, 0]
    assert (probes[1] == 0).all()
    assert (received_weights(query, key, valid, OPTIONS["plain"])[1] == 0).all()


def test_a_row_of_fewer_tokens_than_probes_has_each_once():
    query, key = draw()
    probes, counts = probe_weights(query, key, None, OPTIONS["plain"], probes=16)
    assert counts.tolist() == [11, 11]
    torch.testing.assert_close(probes[0, :, :11], reference(query[0], key[0], OPTIONS["plain"]))
    assert (probes[:, :, 11:] == 0).all()


@pytest.mark.parametrize("pads", [0, 3])
def test_many_queries_are_stood_for_by_some(pads, monkeypatch):
    """Four of eleven queries, scaled so that a row's weights sum to G times its tokens."""
    monkeypatch.setattr(module, "QUERIES", 4)
    monkeypatch.setattr(module, "_BLOCK", 3)
    query, key = draw()
    q, k = (torch.nn.functional.pad(x, (0, 0, pads, 0), value=float("nan")) for x in (query, key))
    valid = torch.arange(11 + pads).expand(2, -1) >= pads if pads else None
    got = received_weights(q, k, valid, OPTIONS["plain"])[..., pads:]
    for row in range(2):
        columns = reference(query[row], key[row], OPTIONS["plain"])[:, [2, 5, 8, 10]].sum(1) * 11 / 4
        torch.testing.assert_close(got[row], columns.view(2, 2, -1).sum(1))
    torch.testing.assert_close(got.sum(-1), torch.full((2, 2), 22.0, dtype=torch.float64))


def test_a_sink_is_seen_at_its_position():
    """A key that all queries agree with takes the attention; padding on the left does not move it."""
    query, key = draw(batch=1, tokens=32)
    direction = torch.ones(8, dtype=torch.float64)
    query, key = query + direction, key.clone()
    key[:, :, 5] = 20 * direction
    tokens = torch.arange(100, 132)[None]
    for pad in (0, 6):
        q, k = (torch.nn.functional.pad(x, (0, 0, pad, 0)) for x in (query, key))
        ids = torch.nn.functional.pad(tokens, (pad, 0))
        valid = None if not pad else torch.arange(32 + pad)[None] >= pad
        weights, counts = probe_weights(q, k, valid, OPTIONS["plain"], probes=8)
        sinks = Sinks.observe(weights, k, 2 * k, ids, valid, window_priorities(ids, valid), counts)
        assert sinks.share.shape == (4, POSITIONS)
        # The first of eight probes stands before the sink.
        assert (sinks.share[:, 5] > 0.8).all()
        assert sinks.tops.position[0, 0] == 5
        assert sinks.tops.token[0, 0] == 105
        assert (sinks.probes, sinks.windows) == (8, 1)
        torch.testing.assert_close(sinks.first_key, key[0, :, 0])
        torch.testing.assert_close(sinks.first_value, 2 * key[0, :, 0])


def test_sinks_join_as_if_seen_together():
    query, key = draw(batch=4)
    ids = torch.randint(0, 99, (4, 11), generator=torch.Generator().manual_seed(0))
    priority = window_priorities(ids, None)

    def observe(rows):
        weights, counts = probe_weights(query[rows], key[rows], None, OPTIONS["plain"], probes=8)
        return Sinks.observe(weights, key[rows], 2 * key[rows], ids[rows], None, priority[rows], counts)

    whole, merged = observe(slice(0, 4)), observe(slice(3, 4)).merge(observe(slice(0, 3)))
    assert merged.probes == whole.probes == 32
    assert merged.windows == whole.windows == 4
    for name, x in whole.tensors().items():
        torch.testing.assert_close(merged.tensors()[name], x)
    again = Sinks.restore(merged.tensors(), merged.facts())
    assert torch.equal(again.mass, merged.mass)
    assert again.probes == 32
