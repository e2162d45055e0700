"""What a device kernel must know of a page: plain numbers taken from ``PageLayout``, hashable, used as compile-time
constants.

A kernel works in *tiles*: the tokens that one warp handles at a time. A tile is ``blocks`` score blocks of ``rows``
tokens each. Where several tokens share a row of words (``SideLayout.parts`` > 1), one row of words feeds several
blocks, so that unpacking a field always gives one whole operand of a matrix product and nothing is ever shuffled.

A side is one or several *slices* of channels (tiers), each with words, bits and metadata of its own; a kernel goes
through them in turn, and all else (softmax, weights, output) knows of no slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from kvq.kernels.bit_fields import FIELD_TABLES, Field, book_ptx, unpack_ptx
from kvq.pages.layout import ATOM, CONTAINER_WORDS, FIELDS, PageLayout, Place, SideLayout

# What a program of a decode launch costs besides its rounds (query, merge of warps, partial result), in rounds.
OVERHEAD = 2
# Most runs that a sequence is cut into.
MAX_SPLITS = 128


# Compared by identity, as there is one of each (``sides_of``): a launch hashes its constants.
@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One side (K or V) of a page, or one slice of its channels, as a kernel sees it. Sizes in elements unless named
    bytes; channels are counted within the slice.

    kind          ``affine``, ``book``, ``e4m3``, ``dense``; ``none``: a slice that is not stored; ``tiers``: a side of
                  several slices, which has none of the numbers about words.
    slices        what the side consists of; of a side in one piece, the side itself.
    first         first channel of the slice within the head.
    by_channel    metadata per channel and token group (else per token and channel group).
    terms         numbers of metadata a group: 2 (scale, minimum), 1 (scale) or 0; meta: their format.
    meta_shared, norm_shared   whether metadata, norms lie in the record that the heads of a page share.
    scaled        whether tokens have a scale of their own (metadata or norm).
    evenly        codes are centred on zero, and their distance is a static factor (levels of a book without a table).
    limited       whether they are bounded by ``Pool.value_limit`` (values).
    group         numbers that share a scale; groups: channel groups of a token (1 if by_channel).
    fields        codes in a container of ``words`` 16-bit words; field f, container w is token part ``f // chunks`` and
                  channel ``(f % chunks) * chunk_stride + w * width_stride``.
    block         containers read as one operand, a power of two of at least 16; blocks of them cover ``width``.
    unit          tokens whose rows of containers lie together: a page, or a block of tiers.
    unit_rows     rows of containers of a unit (tokens / parts), each of ``row_words`` words; rows: of a page.
    words_offset, meta_offset, norm_offset, range_offset   bytes from the start of the record (heads' or shared); -1: no
                  norms, no range of minima.
    table         how each field is read, and ``ptx``, ``constraints`` the same as inline assembly (planes only).
    """

    kind: str
    bits: int
    first: int = 0
    by_channel: bool
    terms: int
    meta: str
    meta_shared: bool
    norm_shared: bool
    scaled: bool
    evenly: bool
    limited: bool
    group: int
    groups: int
    head_dim: int
    page_tokens: int
    fields: int
    words: int
    chunks: int
    parts: int
    unit: int
    unit_rows: int
    rows: int
    width: int
    chunk_stride: int
    width_stride: int
    block: int
    blocks: int
    row_words: int
    words_offset: int
    meta_offset: int
    norm_offset: int
    range_offset: int
    table: tuple[Field, ...] = ()
    ptx: str = ""
    constraints: str = ""
    tiers: tuple["Side", ...] = ()

    @property
    def slices(self) -> tuple["Side", ...]:
        return self.tiers or (self,)


def side_of(layout: SideLayout, name: str, places: Mapping[tuple[str, str], Place]) -> Side:
    """Read a side's numbers off its layout; ``places`` are those of the record, ``name`` is key or value."""
    own = {part: place for (side, part), place in places.items() if side == name}
    slices = [
        _not_stored(layout, part.first, part.channels)
        if part.layout is None
        else _in_one_piece(part.layout, part.own(own), layout, part.first)
        for part in layout.slices
    ]
    if not layout.tiers:
        return slices[0]
    stored = [own for own in slices if own.kind != "none"]
    assert all(own.by_channel for own in stored), "tiers are coded along the channel axis"
    # What a tile must respect is that of the slice with the fewest rows.
    finest = min(stored, key=lambda own: own.unit_rows)
    return replace(finest, kind="tiers", head_dim=layout.head_dim, first=0, tiers=tuple(slices))


def _in_one_piece(layout: SideLayout, places: Mapping[str, Place], whole: SideLayout, first: int = 0) -> Side:
    """A side, or a stored slice of ``whole`` whose ``layout`` is that of one block."""
    e4m3, dense = layout.format == "e4m3", layout.format == "dense"
    planes = not (e4m3 or dense)
    terms = layout.meta_terms if layout.meta else 0
    by_channel = terms > 0 and layout.axis == "channel"
    width = layout.head_dim // 2 if e4m3 else layout.width
    groups = layout.head_dim // layout.group if terms and not by_channel else 1
    block = max(ATOM, _power_of_two_divisor(width, layout.group if groups > 1 else width))
    makers = {"e4m3": _no_ptx, "dense": _no_ptx, "book": unpack_ptx if layout.evenly else book_ptx}
    ptx, constraints = makers.get(layout.format, unpack_ptx)(layout.bits)
    offsets = {part: place.start for part, place in places.items()}
    norm_offset = offsets.get("norm", -1)
    return Side(
        kind="affine" if layout.evenly else layout.format,
        bits=layout.bits,
        first=first,
        by_channel=by_channel,
        terms=terms,
        meta=layout.meta_format,
        meta_shared=layout.meta_shared,
        norm_shared=norm_offset >= 0 and places["norm"].shared,
        scaled=terms > 0 or norm_offset >= 0,
        evenly=layout.evenly,
        limited=whole.scaled_by_token,
        group=layout.group,
        groups=groups,
        head_dim=layout.head_dim,
        page_tokens=whole.page_tokens,
        fields=FIELDS[layout.bits] if planes else 1 + e4m3,
        words=CONTAINER_WORDS[layout.bits] if planes else 1,
        chunks=layout.chunks if planes else 1 + e4m3,
        parts=layout.parts,
        unit=layout.page_tokens,
        unit_rows=layout.rows,
        rows=whole.page_tokens // layout.parts,
        width=width,
        # A word of e4m3 holds two neighbours; a word of planes holds channels that lie ``width`` apart.
        chunk_stride=1 if e4m3 else width,
        width_stride=2 if e4m3 else 1,
        block=block,
        blocks=-(-width // block),
        row_words=CONTAINER_WORDS[layout.bits] * width if planes else width,
        words_offset=offsets["words"],
        meta_offset=offsets.get("meta", 0),
        norm_offset=norm_offset,
        range_offset=offsets.get("meta_range", -1),
        table=FIELD_TABLES[layout.bits] if planes else (),
        ptx=ptx,
        constraints=constraints,
    )


def _not_stored(whole: SideLayout, first: int, width: int) -> Side:
    """A slice of 0 bits: its channels are zero in pages, and have operands for the exact tokens' sake."""
    layout = SideLayout(format="dense", bits=16, head_dim=width, page_tokens=whole.page_tokens)
    place = Place(start=0, nbytes=0, dtype="float16", shape=())
    return replace(_in_one_piece(layout, {"words": place}, whole, first), kind="none")


def _no_ptx(bits: int) -> tuple[str, str]:
    return "", ""


@cache
def sides_of(layout: PageLayout) -> tuple[Side, Side]:
    """(K, V) of a page record."""
    return side_of(layout.key, "key", layout.places), side_of(layout.value, "value", layout.places)


def _power_of_two_divisor(*numbers: int) -> int:
    """The largest power of two that divides all numbers."""
    return min(n & -n for n in numbers)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How the tokens of a page are handed to warps.

    warps    warps of a program; each has its own tile and its own softmax state.
    rows     tokens of one block of a tile. Block b, row r of the tile that starts at row s of its pages is token
             ``b * stride + s + r`` of the page (a tile of several pages: row r is row ``r % stride`` of page
             ``r // stride``).
    blocks   blocks of a tile; stride: tokens of a page between blocks.
    pages    pages of a tile, or 1; per_page: tiles of a page, or 1.
    tokens   tokens of a warp's tile; round: tokens that a program's warps handle at a time.
    fold     rows that a sum over tokens is kept at inside the loop, one a thread of a quarter warp.
    frame    tokens that keys share an origin for, a power of two; 0: they stand where queries do.
    """

    warps: int
    rows: int
    blocks: int
    stride: int
    pages: int
    per_page: int
    tokens: int
    round: int
    fold: int
    frame: int = 0


def tile_of(key: Side, value: Side, *, warps: int, rows: int, split: int = 0, frame: int = 0) -> Tile:
    """The tile of a page.

    rows    tokens of a block that are asked for; fewer are taken where scales change within that many.
    split   if not 0, a page is cut into blocks of so many tokens even where one block could hold more.
    frame   see ``Tile``.
    """
    stride = min([key.unit_rows, value.unit_rows] + [split] * bool(split))
    groups = [side.group for side in (key, value) if side.by_channel] + [frame] * bool(frame)
    if groups:
        # Per-channel scales belong to a page and a token group, turned queries to a block of the frame: a block stays
        # within one, a tile is one page.
        stride = rows = min([stride, rows, *groups])
    pages = max(1, rows // stride)
    rows = min(rows, stride * pages)
    blocks = key.page_tokens // stride
    per_page = max(1, stride // rows)
    # A round then covers neighbouring tokens: whole pages, or one run of a page.
    assert blocks == 1 or warps % per_page == 0
    return Tile(
        warps=warps,
        rows=rows,
        blocks=blocks,
        stride=stride,
        pages=pages,
        per_page=per_page,
        tokens=blocks * rows,
        round=warps * blocks * rows,
        fold=min(rows, 8),
        frame=frame,
    )
