"""Nothing quantized: keys or values stay in the model's dtype."""

from dataclasses import dataclass

from kvq.codecs.spec import CodecSpec, register_codec


@register_codec("exact")
@dataclass(frozen=True, kw_only=True)
class Exact(CodecSpec):
    """No settings, and no codec to build: a cache keeps such layers as they are."""

    is_exact = True
    is_placeable = is_wrappable = False

    def bind(self, head_dim, artefacts, heads):
        raise AssertionError("a layer that stays exact has no codec")
