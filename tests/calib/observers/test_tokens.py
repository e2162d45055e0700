"""A window's priority depends on its real tokens and the seed alone."""

import torch

from kvq.calib.observers.tokens import window_priorities


def test_priorities_do_not_depend_on_padding_batch_or_order():
    tokens = torch.randint(0, 100, (4, 9), generator=torch.Generator().manual_seed(0))
    whole = window_priorities(tokens, None)
    assert len(set(whole.tolist())) == 4
    assert (whole >= 0).all()
    assert torch.equal(window_priorities(tokens[[2, 0]], None), whole[[2, 0]])
    for pads in ((3, 0), (0, 3)):
        padded = torch.nn.functional.pad(tokens, pads, value=7)
        valid = torch.nn.functional.pad(torch.ones(4, 9, dtype=torch.bool), pads, value=False)
        assert torch.equal(window_priorities(padded, valid), whole)
    assert not torch.equal(window_priorities(tokens, None, seed=1), whole)
