"""What one KV head gets: codecs, transforms and token policy, and which of them go together."""

from dataclasses import dataclass, field

from kvq.codecs.spec import CodecSpec
from kvq.errors import RecipeError
from kvq.transforms import Transforms


@dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """Tokens that stay exact, in tokens: the first ``sinks`` and the last ``window``.

    A codec that encodes tokens alone (axis ``token``) quantizes each as it leaves the window. For one that encodes
    blocks of tokens (axis ``channel``, low rank) the window is also the flush unit: ``window`` tokens are quantized
    together when it is full (KIVI); window 0 flushes every block.
    """

    sinks: int = 0
    window: int = 0

    def __post_init__(self):
        for name in ("sinks", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise RecipeError(f"tokens.{name}={value!r} is not a number of tokens: use 0 or more.")

    def to_dict(self) -> dict[str, int]:
        return {"sinks": self.sinks, "window": self.window}


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What one KV head of one layer gets: both codecs, the transforms before them, and the token policy."""

    key: CodecSpec
    value: CodecSpec
    tokens: TokenPolicy
    transforms: Transforms = field(default_factory=Transforms)

    def __post_init__(self):
        if self.key.is_exact != self.value.is_exact:
            raise RecipeError("'exact' keys with quantized values (or the reverse) are not stored: set both or none.")
        for side in ("key", "value"):
            spec = getattr(self, side)
            block = spec.block_tokens
            if self.tokens.window % block:
                raise RecipeError(
                    f"tokens.window={self.tokens.window} is no multiple of {side}.{spec.block_setting}={block}: a "
                    f"block of tokens is flushed whole; use a window of 0, {block}, {2 * block}, ..."
                )
            if spec.is_calibrated and not spec.fits_transformed and getattr(self.transforms, side):
                raise RecipeError(
                    f"{side}: what calibration made for the codec is of {side}s without transforms: remove the "
                    "transforms, or the calibrated settings."
                )
        if self.value.keys_only:
            raise RecipeError(f"value.codec={self.value.codec!r} {self.value.keys_only}: use it for keys only.")
        if self.value.placement is not None:
            raise RecipeError(f"value.placement={self.value.placement!r}: values have no rotary embedding; remove it.")
        for step in self.transforms.key if self.key.is_before_rope else ():
            if not step.commutes_with_rope:
                raise RecipeError(
                    f"key.placement=pre_rope and the key transform {step.kind!r} exclude each other, because it does "
                    "not commute with the rotary embedding: remove one of them."
                )

    @property
    def is_exact(self) -> bool:
        return self.key.is_exact

    @property
    def has_head_scales(self) -> bool:
        """True if keys or values have one static scale a head."""
        return self.key.has_head_scales or self.value.has_head_scales
