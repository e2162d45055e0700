"""Attention over keys that every query sees: output and log-sum-exp, against the definition in float64."""

import pytest
import torch

from kvq.kernels.decode_attention.exact_partial import exact_partial


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (7, 33), (384, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_log_sum_exp_are_those_of_the_definition(queries, tokens, dtype):
    generator = torch.Generator().manual_seed(queries)
    q, keys, values = (
        torch.randn(2, 3, n, 32, generator=generator, dtype=torch.float64) for n in (queries, tokens, tokens + 5)
    )
    # A part of longer tensors, as two-view attention passes it.
    values = values[:, :, :tokens]
    out, lse = exact_partial(q.to(dtype), keys.to(dtype), values.to(dtype))
    scores = q @ keys.transpose(-1, -2)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert float((out.double() - scores.softmax(-1) @ values).abs().max()) < tolerance
    assert float((lse.double() - scores.logsumexp(-1)).abs().max()) < tolerance
    assert float((lse.double() - scores.amax(-1)).abs().max()) > 1e-3 or tokens == 1
