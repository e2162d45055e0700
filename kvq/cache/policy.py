"""The flush rule (``kvq.pages.flush``) of a recipe's side."""

from kvq.codecs.spec import CodecSpec
from kvq.heads import TokenPolicy
from kvq.pages.flush import FlushRule


def flush_rule(spec: CodecSpec, tokens: TokenPolicy) -> FlushRule:
    """Codecs of single tokens slide; those of blocks flush a window's worth at a time, or a block without a window."""
    unit = (tokens.window or spec.block_tokens) if spec.block_tokens > 1 else 1
    return FlushRule(sinks=tokens.sinks, window=tokens.window, unit=unit)
