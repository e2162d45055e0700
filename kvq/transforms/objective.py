"""How much a layer's attention output changes when its keys or values are quantized: what every search minimises."""

import torch

from kvq.quantizers import AffineCodec, Codec
from kvq.transforms.evidence import Evidence


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of the queries at ``rows`` [R]: query [H, T, D], key and value [K, T, D] to [H, R, D]."""
    heads = key.shape[0]
    q = query.unflatten(0, (heads, -1))[:, :, rows]
    scores = (q.flatten(1, 2) @ key.transpose(-1, -2)).unflatten(1, q.shape[1:3]) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    future = torch.arange(key.shape[1], device=key.device) > rows.unsqueeze(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (weights.flatten(1, 2) @ value).unflatten(1, q.shape[1:3]).flatten(0, 1)


def block_output(heads: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
    """What the layer adds to the residual stream, [R, hidden], of head outputs [H, R, D]; without ``output`` the head
    outputs themselves."""
    return heads if output is None else torch.einsum("hrd,hnd->rn", heads, output.to(heads))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Mean square of the difference over the mean square of what is exact, []."""
    return (found - exact).square().sum() / exact.square().sum().clamp_min(torch.finfo(exact.dtype).tiny)


def attention_error(evidence: Evidence, step, windows: int = 4, queries: int = 64) -> float:
    """Relative error of the attention output if the side goes through ``step`` (and the steps after it) and its codec.

    Every token is quantized but those that the recipe keeps exact at the start; for codecs that work on blocks of
    tokens, as far as whole blocks reach. The queries are spread over the second half of a window.
    """
    codec, total = evidence.codec, 0.0
    chosen = evidence.windows[:windows]
    for window in chosen:
        q, k, v = (x.float() for x in (window.query, window.key, window.value))
        tokens = k.shape[1]
        rows = torch.linspace(tokens // 2, tokens - 1, min(queries, tokens - tokens // 2)).long()
        exact = attention(q, k, v, rows, evidence.scaling, evidence.softcap)
        x = k if evidence.side == "key" else v
        first = min(evidence.exact, tokens)
        whole = first + (tokens - first) // codec.block_tokens * codec.block_tokens
        stored = evidence.after.write(step.write(x[:, first:whole]))
        decoded = step.undo(evidence.after.undo(codec.decode(codec.encode(stored), torch.float32)))
        x = torch.cat([x[:, :first], decoded, x[:, whole:]], dim=1)
        k, v = (x, v) if evidence.side == "key" else (k, x)
        found = attention(q, k, v, rows, evidence.scaling, evidence.softcap)
        total += float(relative_error(*(block_output(o, evidence.output) for o in (found, exact))))
    return total / len(chosen)


def fake_quantized(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """What the codec gives back for x [..., T, D], with gradients: straight through rounding and, for affine codes,
    through scale and minimum to the numbers that set them. fp16 rounding of the metadata is left out there."""
    if not isinstance(codec, AffineCodec):
        return x + (codec.decode(codec.encode(x.detach()), x.dtype) - x.detach())
    grouped, dim = codec.grouped(x)
    low, high = torch.aminmax(grouped, dim=dim, keepdim=True)
    if codec.clip < 1:
        cut = (high - low) * ((1 - codec.clip) / 2)
        low, high = low + cut, high - cut
    steps = 2**codec.bits - 1
    scale = ((high - low) / steps).clamp_min(torch.finfo(torch.float16).tiny)
    codes = (grouped - low) / scale
    codes = (codes + (codes.round() - codes).detach()).clamp(0, steps)
    return (codes * scale + low).reshape(x.shape)
