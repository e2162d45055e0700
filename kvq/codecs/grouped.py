"""Settings that say which numbers share a scale."""

from dataclasses import dataclass

from kvq.codecs.spec import BLOCK_TOKENS, CodecSpec
from kvq.errors import RecipeError
from kvq.settings import is_count


@dataclass(frozen=True, kw_only=True)
class GroupedSpec(CodecSpec):
    """Settings ``axis`` and ``group`` of a codec, which a derived class declares.

    axis    ``token`` shares a scale among ``group`` channels of one token; ``channel`` shares it among ``group``
            consecutive tokens of one channel (KIVI keys).
    group   numbers that share a scale; ``head`` for the whole head dimension and ``token`` for all heads that are
            stored alike (axis token only).
    """

    def check_group(self) -> None:
        if self.axis not in ("token", "channel"):
            raise RecipeError(f"axis={self.axis!r} is not an axis: use 'token' or 'channel'.")
        if self.axis == "channel" and self.group not in BLOCK_TOKENS:
            raise RecipeError(
                f"group={self.group!r} does not divide a page of tokens: axis 'channel' takes "
                f"{', '.join(map(str, BLOCK_TOKENS))}."
            )
        if self.axis == "token" and self.group not in ("head", "token") and not is_count(self.group):
            raise RecipeError(f"group={self.group!r} is not a group size: use a positive number, 'head' or 'token'.")

    @property
    def own_block_tokens(self) -> int:
        return self.group if self.axis == "channel" else 1

    def group_size(self, head_dim: int) -> int:
        """Numbers per scale for this head dimension; refuses a group that does not divide it (axis token)."""
        group = head_dim if self.group in ("head", "token") else int(self.group)
        if self.axis != "channel" and head_dim % group:
            fits = [g for g in (16, 32, 64, 128, 256) if head_dim % g == 0]
            ways = ", ".join(map(str, fits)) + (" or " if fits else "") + "'head'"
            raise RecipeError(f"group={group} does not divide head_dim={head_dim}; use {ways}.")
        return group

    @property
    def why_no_channel_groups(self) -> str | None:
        if self.axis == "channel":
            return "permute changes which channels share a group, and axis channel has groups of tokens: remove one."
        if self.group in ("head", "token"):
            return f"permute does nothing to group={self.group!r}, which holds every channel: remove one."
        return None
