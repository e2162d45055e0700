"""Pages of given tokens, and exact tokens to go with made-up pages."""

from dataclasses import dataclass

import torch

from kvq.kernels.types import Exact
from kvq.pages.layout import PageLayout, SideLayout
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool


def pages_of(x: torch.Tensor, codec, page_tokens: int | None = None) -> Pages:
    """Pages whose keys are x [B, K, whole pages of tokens, head_dim] as a codec stores them; values take no room."""
    layout = codec.layout(page_tokens or codec.page_tokens)
    empty = SideLayout(format="sections", bits=0, head_dim=layout.head_dim, page_tokens=layout.page_tokens)
    pool = Pool(PageLayout(key=layout, value=empty), x.shape[1], x.device)
    count = x.shape[2] // layout.page_tokens
    ids = pool.allocate(x.shape[0] * count)
    pages = Pages(pool=pool, ids=[ids[b :: x.shape[0]] for b in range(x.shape[0])])
    pages.write("key", 0, codec.encode(x))
    return pages


def stored_bytes(pages: Pages) -> int:
    """Bytes of the keys' words and sections, without what aligns them."""
    layout, count = pages.layout, sum(map(len, pages.rows))
    places = [place for (side, _), place in layout.places.items() if side == "key"]
    return count * sum(place.nbytes * (1 if place.shared else pages.heads) for place in places)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Tokens of one sequence after the sinks: packed as keys, packed as values, all."""

    key: int
    value: int
    all: int


def random_exact(
    counts: list[Counts],
    heads: int,
    head_dim: int,
    *,
    sinks: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Exact:
    """Exact tokens to go with pages; rings are NaN where no token lies, and start at an offset of their own."""
    generator = torch.Generator().manual_seed(seed)
    B = len(counts)
    rings, offsets = [], []
    for side in ("key", "value"):
        capacity = max([1, *(c.all - getattr(c, side) for c in counts)]) + 3
        offset = torch.randint(0, capacity, (B,), generator=generator, dtype=torch.int32)
        ring = torch.full((B, heads, capacity, head_dim), torch.nan)
        for b, c in enumerate(counts):
            slots = (torch.arange(getattr(c, side), c.all) + int(offset[b])) % capacity
            ring[b, :, slots] = torch.randn(heads, len(slots), head_dim, generator=generator)
        rings.append(ring.to(dtype).to(device))
        offsets.append(offset.to(device))
    kept = [torch.randn(B, heads, sinks, head_dim, generator=generator).to(dtype).to(device) for _ in range(2)]
    lengths = [[min(c.key, c.value), c.key, c.value, c.all] for c in counts]
    return Exact(
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device).view(-1, 4),
        keys=rings[0],
        values=rings[1],
        key_offsets=offsets[0],
        value_offsets=offsets[1],
        sink_keys=kept[0] if sinks else None,
        sink_values=kept[1] if sinks else None,
        mixed_key=any(c.key > c.value for c in counts),
        mixed_value=any(c.value > c.key for c in counts),
    )
