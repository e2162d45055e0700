"""What one KV head gets: codecs, transforms and token policy, and which of them go together."""

from dataclasses import dataclass, field

from kvq.codecs.spec import CodecSpec
from kvq.errors import RecipeError
from kvq.transforms import Transforms
from kvq.transforms.frame import FRAME_TOKENS
from kvq.transforms.spec import PLACES

# Counters on a device are int32.
MOST_TOKENS = 2**31 - 1


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
            if value > MOST_TOKENS:
                raise RecipeError(f"tokens.{name}={value} is more than any context: use at most {MOST_TOKENS}.")

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
        for name in ("placement", "frame"):
            given = getattr(self.value, name)
            if given is not None:
                raise RecipeError(f"value.{name}={given!r}: values have no rotary embedding; remove it.")
        self._check_frame()

    def _check_frame(self) -> None:
        place, codec = self.transforms.key_place, self.key.placement
        if place != PLACES[0] and codec not in (None, place):
            raise RecipeError(
                f"key.placement={codec} and key transforms at {place} are two places for one codec: leave the "
                "placement out, the codec stands where the last transform does."
            )
        for step in self.transforms.key if place == PLACES[0] and self.key_place != place else ():
            if not step.commutes_with_rope:
                raise RecipeError(
                    f"key.placement={codec} and the key transform {step.kind!r} exclude each other, because it does "
                    f"not commute with the rotary embedding: give the transform 'at: {codec}', or remove one of them."
                )
        if self.key.frame is not None and self.key_place != "page":
            raise RecipeError(
                f"key.frame={self.key.frame} says how many tokens share an origin, and these keys have none: stand "
                "something at page, or remove it."
            )
        if self.key.is_calibrated and codec == "page" and self.key.frame not in (None, FRAME_TOKENS):
            raise RecipeError(
                f"key.frame={self.key.frame}: what calibration makes for the codec is measured on blocks of "
                f"{FRAME_TOKENS} tokens; leave it out."
            )

    @property
    def key_place(self) -> str:
        """Where the key codec stands, of ``kvq.transforms.spec.PLACES``."""
        return self.key.placement or self.transforms.key_place

    @property
    def frame_tokens(self) -> int | None:
        """Tokens whose keys share an origin, 1 where keys stand before RoPE; None: the codec sees them after it."""
        return {"post_rope": None, "page": self.key.frame or FRAME_TOKENS, "pre_rope": 1}[self.key_place]

    @property
    def framed_steps(self) -> int:
        """How many of the last key transforms act in that frame."""
        return self.transforms.framed_steps

    def codec_steps(self, side: str) -> int:
        """How many of the last transforms of a side leave exact tokens alone."""
        return self.transforms.codec_steps(side)

    def stored_dim(self, side: str, head_dim: int) -> int:
        """Channels of a head that the codec stores."""
        return self.transforms.width(side, head_dim)

    def framing(self, side: str) -> dict[str, int | None]:
        """What ``kvq.transforms.fit.fit_steps`` wants to know of it."""
        return {"framed": self.framed_steps, "block": self.frame_tokens} if side == "key" else {}

    @property
    def is_bound_to_positions(self) -> bool:
        """True if something is fitted to keys after RoPE that suits the positions of the calibration text alone."""
        outside = self.transforms.key[: len(self.transforms.key) - self.framed_steps]
        codec = self.key_place == PLACES[0] and self.key.has_channel_numbers
        return codec or any(step.is_fitted_to_positions for step in outside)

    @property
    def is_exact(self) -> bool:
        return self.key.is_exact

    @property
    def has_head_scales(self) -> bool:
        """True if keys or values have one static scale a head."""
        return self.key.has_head_scales or self.value.has_head_scales
