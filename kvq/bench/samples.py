"""Made-up pages for checks and benchmarks: each byte that a kernel could read is set, what it must not is poison."""

import re
from dataclasses import replace

import torch

from kvq.codecs import Codec, codec_spec
from kvq.codecs.levels import even
from kvq.pages.layout import PageLayout, Section, SideLayout
from kvq.pages.meta import largest_scales, to_e4m3, to_ue5m3
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool

NAN_BYTE = 0x7F


def codec_of(width: str, head_dim: int) -> Codec:
    """A codec by a short name.

    4       4-bit codes, a scale and a minimum a token          4c32    per channel, groups of 32 tokens
    4/32    the same for groups of 32 channels                  4s      a scale and no minimum
    e4m3    fp8                                                 book4   levels of a book times a norm a token
    nf4     levels of a book times a scale a token              mx4     levels times a power of two for 32 channels
    nv4     levels times an e4m3 scale for 16 channels          4.2.0.2c64  tiers of channels, 0: not stored
    even2   as book2, levels evenly spaced

    Letters at the end: r metadata in the format range8, z zero8, f e4m3; t one scale for all heads of a token, n norms
    of tokens over all heads, l norms that keep the length, x clipped.
    """
    if width == "e4m3":
        return _built(head_dim, codec="float8", scale="unit")
    if width == "nf4":
        return _built(head_dim, codec="book", bits=4, levels="normal_float", scale="absmax", axis="token", group="head")
    if width == "mx4":
        return _built(head_dim, codec="float4", group=min(32, head_dim), meta="e8m0")
    if width == "nv4":
        return _built(head_dim, codec="float4", group=16, meta="e4m3", scale="unit")
    named = re.fullmatch(r"(book|even)(\d)(l?)", width)
    if named:
        levels = "even" if named[1] == "even" else "lloyd_max"
        norm = {"over": "head"} | ({"correct": "length"} if named[3] else {})
        return _built(head_dim, codec="book", bits=int(named[2]), levels=levels, scale="unit", norm=norm)
    bits, axis, group, marks = re.fullmatch(r"([\d.]+)([c/]?)(\d*)([a-z]*)", width).groups()
    form = next((name for mark, name in (("r", "range8"), ("z", "zero8"), ("f", "e4m3")) if mark in marks), None)
    clip = 0.8 if "x" in marks else None
    if "." in bits:
        widths = tuple(map(int, bits.split(".")))
        return _built(head_dim, codec="tiers", bits=widths, group=int(group), meta=form, clip=clip)
    return _built(
        head_dim,
        codec="affine",
        bits=int(bits),
        axis="channel" if axis == "c" else "token",
        group="token" if "t" in marks else int(group or head_dim),
        meta=form,
        clip=clip,
        symmetric=True if "s" in marks else None,
        norm={"over": "token"} if "n" in marks else None,
    )


def _built(head_dim: int, **settings) -> Codec:
    return codec_spec(**settings).build(head_dim)


def codecs_of(key: str, value: str, head_dim: int = 128) -> dict[str, Codec]:
    return {"key": codec_of(key, head_dim), "value": codec_of(value, head_dim)}


def side_of(width: str, head_dim: int, page_tokens: int) -> SideLayout:
    """The layout of a codec by its short name, or of ``dense`` fp16 numbers."""
    if width == "dense":
        return SideLayout(format="dense", bits=16, head_dim=head_dim, page_tokens=page_tokens)
    return codec_of(width, head_dim).layout(page_tokens)


def layout_of(key: str, value: str, head_dim: int = 128, page_tokens: int = 64) -> PageLayout:
    return PageLayout(key=side_of(key, head_dim, page_tokens), value=side_of(value, head_dim, page_tokens))


def levels_of(side: SideLayout) -> tuple[float, ...] | None:
    """Levels for a book, as from a normal distribution; None for other formats."""
    if side.format != "book":
        return None
    if side.evenly:
        return tuple(even(side.bits).tolist())
    middles = (torch.arange(2**side.bits, dtype=torch.float64) + 0.5) / 2**side.bits
    return tuple(torch.special.ndtri(middles).half().tolist())


def random_pages(
    layout: PageLayout,
    lengths: list[int],
    heads: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    spread: float = 1.0,
) -> Pages:
    """Pages of a batch with ``lengths`` packed tokens, in shuffled order, one number of the pool unused.

    Codes are random bits everywhere, so that what follows a sequence's end is garbage; scales, minima and norms of
    tokens that do not exist are NaN, and so is all of the unused page. ``spread``: standard deviation of scales, in
    powers of e.
    """
    generator = torch.Generator().manual_seed(seed)
    size = layout.page_tokens
    counts = [-(-length // size) for length in lengths]
    total = sum(counts) + 1
    pool = torch.randint(0, 256, (total, layout.page_bytes(heads)), generator=generator, dtype=torch.uint8)
    order = torch.randperm(total, generator=generator)
    table = torch.full((len(lengths), max([1, *counts])), int(order[-1]), dtype=torch.int32)
    at = 0
    for b, count in enumerate(counts):
        table[b, :count] = order[at : at + count].int()
        at += count
    pages = Pages(
        pool=Pool.borrow(pool, layout, heads),
        numbers=table,
        key_scale=0.02 if layout.key.format == "e4m3" else 1.0,
        value_scale=0.03 if layout.value.format == "e4m3" else 1.0,
        key_levels=levels_of(layout.key),
        value_levels=levels_of(layout.value),
    )
    for side in ("key", "value"):
        _fill(pages, side, lengths, spread, generator)
    pool = Pool.borrow(pages.pool.base.to(device), layout, heads)
    if layout.value.scaled_by_token:
        pool.value_limit.copy_(_largest_scale(pages, lengths))
    return replace(pages, pool=pool, numbers=table.to(device))


def _fill(pages: Pages, side: str, lengths: list[int], spread: float, generator: torch.Generator) -> None:
    """Numbers of one side's sections, NaN first."""
    layout, size = pages.layout.side(side), pages.layout.page_tokens
    if layout.format == "dense":
        words = pages.pool.all(pages.layout.places[side, "words"])
        words.fill_(torch.nan)
        for page, used in _used(pages, lengths):
            words[page, :, :used] = torch.randn(words[page, :, :used].shape, generator=generator).half()
    if layout.format == "e4m3":
        # Some of 256 bytes are NaN: real tokens get numbers.
        codes = torch.randint(0, 127, (pages.pool.pages, pages.heads, size, layout.head_dim), generator=generator)
        sign = torch.randint(0, 2, codes.shape, generator=generator) * 128
        words = pages.pool.all(pages.layout.places[side, "words"])
        words.fill_(NAN_BYTE)
        numbers = (codes + sign).to(torch.uint8)
        for page, used in _used(pages, lengths):
            words[page, :, :used] = numbers[page, :, :used]
    for section in layout.sections:
        if section.dtype == "int16":
            continue
        target = pages.pool.all(pages.layout.places[side, section.name])
        target.fill_(NAN_BYTE if target.dtype == torch.uint8 else torch.nan)
        drawn = _numbers(section, layout, target.shape, spread, generator)
        for page, used in _used(pages, lengths):
            rows = -(-used // section.tokens)
            target[page, :, :rows] = drawn[page, :, :rows]


def _used(pages: Pages, lengths: list[int]):
    """(page number, tokens of it that exist)."""
    size = pages.layout.page_tokens
    for b, length in enumerate(lengths):
        for p in range(-(-length // size)):
            yield int(pages.table[b, p]), min(size, length - p * size)


def _numbers(section: Section, layout: SideLayout, shape, spread: float, generator) -> torch.Tensor:
    layout = next(own.layout for own in layout.slices if own.layout and section.name.startswith(own.prefix))
    if section.name.endswith("meta_range"):
        return torch.rand(shape, generator=generator).half() * torch.tensor([-3.0, 0.01]).half()
    if section.name == "norm":
        return torch.exp(spread * torch.randn(shape, generator=generator)).half()
    if layout.meta_format == "e8m0":
        return torch.randint(124, 130, shape, generator=generator).to(torch.uint8)
    unit = 1.0 if layout.format == "book" else 2.0 / 2**layout.bits
    scale = unit * torch.exp(spread * torch.randn(shape[:-1], generator=generator))
    if layout.meta_format in ("zero8", "range8"):
        return torch.stack([to_ue5m3(scale), torch.randint(0, 256, scale.shape, generator=generator)], -1).byte()
    terms = [scale, -scale * (2**layout.bits - 1) * torch.rand(scale.shape, generator=generator)]
    terms = torch.stack(terms[: layout.meta_terms], dim=-1)
    return to_e4m3(terms) if layout.meta_format == "e4m3" else terms.half()


def _largest_scale(pages: Pages, lengths: list[int]) -> torch.Tensor:
    """[heads]: the largest scale of values that exist."""
    layout, largest = pages.layout.value, torch.zeros(pages.heads)
    for page, used in _used(pages, lengths):
        places = {s.name: pages.layout.places["value", s.name] for s in layout.sections}
        sections = {name: pages.pool.part(page, place)[None, :, :used] for name, place in places.items()}
        largest = torch.maximum(largest, largest_scales(sections, layout))
    return largest
