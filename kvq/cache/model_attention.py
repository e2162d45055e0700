"""The ``kvq`` attention function: packed segments where a layer is packed, the model's own attention elsewhere."""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging

from kvq.cache import HANDLE
from kvq.cache.attend import Options
from kvq.cache.observer import prompt_lse
from kvq.errors import UnsupportedModelError

logger = logging.get_logger(__name__)

NAME = "kvq"
OTHER_ATTENTION = (
    "call model.set_attn_implementation('eager') and begin a new cache, to attend to dequantized tensors instead (in a "
    "quantized_cache block: inside it)."
)


def register() -> None:
    """Register the attention function and its mask under the name ``kvq``; safe to repeat."""
    AttentionInterface.register(NAME, kvq_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def kvq_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, L, D]; returns [B, L, H, D] and no weights.

    ``key`` and ``value`` carry the handle of a packed layer; without one (sliding layers, no cache) this is ordinary
    attention. A model that changes one of them after the cache has lost it there, and gets ordinary attention over
    dequantized tensors.
    """
    options = options_of(module, query, scaling, kwargs)
    handle = _handle_of(module, key, value)
    if handle is not None:
        handle.layer.reads_handle = True
        if not handle.is_prompt:
            return handle.attend(query, attention_mask, options).transpose(1, 2).contiguous(), None
    if options.softcap is None and options.sink_logits is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        out = plain_attention(module, query, key, value, attention_mask, options).transpose(1, 2).contiguous()
    if handle is not None and handle.layer.observers:
        handle.show(query, prompt_lse(query, key, attention_mask, handle.columns, options))
    return out, None


def _handle_of(module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor):
    """The handle that both tensors carry, or None."""
    handles = getattr(key, HANDLE, None), getattr(value, HANDLE, None)
    if handles[0] is handles[1]:
        return handles[0]
    name = "values" if handles[1] is None else "keys"
    logger.warning_once(
        f"kvq: {type(module).__name__} changes {name} between the cache and attention, so packed pages are dequantized "
        "for it in every step."
    )
    return None


def options_of(module: torch.nn.Module, query: torch.Tensor, scaling: float | None, kwargs: dict) -> Options:
    """Read what the model adds to attention. Raises UnsupportedModelError for what the packed path cannot do."""
    for name in ("position_bias", "indices"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to attention, which the packed cache does not support: "
                f"{OTHER_ATTENTION}"
            )
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(f"output_attentions is not available with packed attention: {OTHER_ATTENTION}")
    return Options(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
    )


def plain_attention(module, query, key, value, attention_mask, options: Options) -> torch.Tensor:
    """Exact attention with softcap and learned sink logits, [B, H, L, D]; the scores are materialised."""
    groups = query.shape[1] // key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.to(dtype) @ key.transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if options.sink_logits is not None:
        sink = options.sink_logits.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).to(query.dtype)
