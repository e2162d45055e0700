"""Which numbers of a tensor share metadata: channels of one token, tokens of one channel, or all heads of one token."""

from dataclasses import dataclass

import torch

from kvq.codecs.spec import BLOCK_TOKENS, CodecSpec
from kvq.errors import RecipeError
from kvq.settings import is_count


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Groups of x [..., K, T, head_dim]; the leading K is needed only where heads share a group.

    axis     ``token``: ``group`` consecutive channels of one token; ``channel``: ``group`` consecutive tokens of one
             channel.
    shared   axis token: all channels of all heads of a token are one group, and ``group`` is head_dim.
    """

    axis: str
    group: int
    head_dim: int
    shared: bool = False

    @property
    def dim(self) -> int:
        """The dimension of ``split``'s answer that runs over the numbers of a group."""
        return -2 if self.axis == "channel" else -1

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """View x so that dimension ``dim`` runs over the numbers that share metadata."""
        if self.axis == "channel":
            return x.unflatten(-2, (-1, self.group))
        if self.shared:
            return x.transpose(-3, -2).flatten(-2).unsqueeze(-2)
        return x.unflatten(-1, (-1, self.group))

    def join(self, grouped: torch.Tensor) -> torch.Tensor:
        """Inverse of ``split``."""
        if self.axis == "channel":
            return grouped.flatten(-3, -2)
        if self.shared:
            return grouped.squeeze(-2).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        return grouped.flatten(-2)

    def spread(self, meta: torch.Tensor) -> torch.Tensor:
        """One number per group, [..., rows, groups or channels], to what broadcasts against ``split``'s answer."""
        return meta.unsqueeze(self.dim)


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
