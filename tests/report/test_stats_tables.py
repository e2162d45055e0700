"""Statistics as tables: tokens that stand out are named."""

import torch

from kvq.calib.collect import collect
from kvq.report.stats_tables import token_rows, tokens_table


def loud_model(tiny_model):
    """Token 3 has a hidden entry of thousands on channel 5, which nothing else has."""
    model = tiny_model(layers=2, head_dim=32)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 5000.0
    return model


def test_a_massive_token_is_named_with_its_place_and_channel(tiny_model):
    windows = torch.randint(4, 100, (3, 32), generator=torch.Generator().manual_seed(0))
    windows[0, 7] = windows[2, 11] = 3
    (row,) = [row for row in token_rows(collect(loud_model(tiny_model), windows)) if row["kind"] == "massive"]
    assert (row["token"], row["positions"], row["windows"], row["channel"]) == (3, [7, 11], 2, 5)
    assert row["strength"] >= 5000.0


def test_without_one_there_is_none(tiny_model):
    windows = torch.randint(4, 100, (3, 64), generator=torch.Generator().manual_seed(0))
    assert [row for row in token_rows(collect(tiny_model(), windows)) if row["kind"] == "massive"] == []


def test_a_sink_gets_its_share(tiny_model):
    """In windows of two tokens every token gets much attention: the first at least half of it in the first layer."""
    windows = torch.tensor([[10, 11], [10, 12]])
    rows = [row for row in token_rows(collect(tiny_model(), windows)) if row["kind"] == "sink"]
    first = next(row for row in rows if row["token"] == 10)
    assert first["positions"] == [0, 0]
    assert first["windows"] == 2
    assert 0.5 <= first["strength"] <= 1.0
    table = tokens_table(rows)
    assert table.row_count == len(rows)
