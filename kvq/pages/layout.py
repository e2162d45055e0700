"""The page record: where every byte of a packed page lies.

A page holds ``page_tokens`` tokens of one KV head as one contiguous record

    [ K words | V words | K meta | V meta ]        these four start at multiples of 128 bytes

Words are 16-bit. Codes are packed in *planes*, never next to their neighbours, so that unpacking one field of every
word yields a whole sub-tile. The unit is an atom of 16 channels. ``FIELDS`` codes share a container (one word; three
words at 3 bits), a row of containers holds ``parts`` tokens, and

    field f, container w  of row r   =   token  (f // chunks) * rows + r ,   channel  (f % chunks) * width + w

with ``chunks * width = head_dim`` and ``rows * parts = page_tokens``. Where a head has enough atoms (head_dim 128 at
2 bits) ``parts`` is 1 and a row is one token.

Fields within a word (little-endian):

    8 bits   bytes 0 and 1
    4 bits   bits 2-5, 6-9, 10-13 and {14, 15, 0, 1}: the plain nibbles rotated left by two, so that every field can
             be turned into an fp16 number with an exponent of at most 256
    3 bits   five fields at bits 0, 3, 6, 9, 12 of each of three words; bit 15 of word i is bit i of the sixteenth
    2 bits   bits 2f, 2f+1
    e4m3     not a plane layout: bytes in channel order, as hardware converts adjacent pairs

What a code c stands for depends on the format:

    affine   c * scale + minimum
    book     level[c] * scale + offset, with a static table of 2^bits levels per side outside the page
    e4m3     the number, times one static scale per side outside the page
    signs    bits of a code are signs of random projections (``kvq/codecs/sketch.py``)
    sections no words: the codec keeps its codes in sections (``kvq/codecs/tiers.py``)
    dense    fp16 numbers in channel order: what kernels read whose codes they do not (``kvq/cache/fused.py``)

A side's other numbers are *sections*: each has one row for every ``tokens`` consecutive tokens. The section ``meta``
holds the ``meta_terms`` numbers of every group, for 2 terms (scale, minimum or offset), for 1 the scale: rows
``[groups, terms]`` of one token for axis token, rows ``[head_dim, terms]`` of a token group for axis channel. They are
fp16 numbers, or bytes as ``META_FORMATS`` says (``kvq/pages/meta.py`` turns them into numbers). A codec without
metadata has no such section. Further sections follow the four of the record, keys before values, at multiples of 16. A
section that all heads share lies in a second record per page, beside the heads' records.

Codecs that are wrapped add sections of these names, on the side that they wrap (``kvq/codecs``):

    norm                            token lengths: the decoded token is multiplied by it
    sign_bits, sign_norm            a one-bit sketch of what the codec left over
    length, outlier_signs, outlier_channels   of sketches (``sketch.py``)
    low_rank_token, low_rank_block  factors A [tokens, rank] and B [head_dim, rank] of a block: A B^T is added
    outlier_index, outlier_value    numbers that are added at their index, after everything else
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

SIDES = ("key", "value")
ATOM = 16
SECTION_ALIGNMENT = 128
# Sections beside the four of the record are small: the largest loads of them are 16 bytes.
EXTRA_ALIGNMENT = 16
MAIN_SECTIONS = ("key_words", "value_words", "key_meta", "value_meta")
DEFAULT_PAGE_TOKENS = 64
FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}
CONTAINER_WORDS = {2: 1, 3: 3, 4: 1, 8: 1}
# The largest E4M3 number.
E4M3_MAX = 448.0
SECTION_BYTES = {"float16": 2, "uint8": 1, "int16": 2}
PLANE_FORMATS = ("affine", "book", "signs")
# dtype of the section ``meta``: numbers, or bytes that stand for them.
META_FORMATS = {"float16": "float16", "e4m3": "uint8", "e8m0": "uint8", "zero8": "uint8", "range8": "uint8"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Numbers beside the codes: ``page_tokens / tokens`` rows of ``shape`` in every page.

    name     unique on its side, for example ``meta``.
    dtype    a key of ``SECTION_BYTES``.
    tokens   consecutive tokens that share a row.
    shared   one copy for all heads instead of one per head.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float16"
    tokens: int = 1
    shared: bool = False

    def page_shape(self, page_tokens: int) -> tuple[int, ...]:
        return (page_tokens // self.tokens, *self.shape)

    def page_bytes(self, page_tokens: int) -> int:
        return math.prod(self.page_shape(page_tokens)) * SECTION_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class SideLayout:
    """Layout of one side (K or V) of a page.

    format        ``affine``, ``book`` and ``signs`` (planes of ``bits``-bit codes), ``e4m3``, ``dense`` (16 bits), or
                  ``sections`` (no words: everything lies in ``extras``).
    axis, group   numbers that share metadata: ``group`` channels of a token, or ``group`` tokens of a channel.
    meta_terms    numbers of metadata per group: 2, 1, or 0 for none.
    meta_format   a key of ``META_FORMATS``.
    meta_shared   the group is all heads' numbers of a token, and ``group`` is head_dim.
    evenly        book, axis token, at most one number of metadata: the levels are evenly spaced about zero, so that a
                  centred code times their distance says as much as a level.
    permuted      stored channels are not the model's: they have changed places among the heads.
    extras        sections beside ``meta``.
    tiers         format ``sections`` of equal slices of channels, in order: the layout of one block of each, or None
                  where nothing is stored. What is stored of them lies in ``extras`` (``slices``).
    """

    format: str
    bits: int
    head_dim: int
    page_tokens: int
    axis: str = "token"
    group: int = 0
    meta_terms: int = 2
    meta_format: str = "float16"
    meta_shared: bool = False
    evenly: bool = False
    permuted: bool = False
    extras: tuple[Section, ...] = ()
    tiers: tuple["SideLayout | None", ...] = ()

    def __post_init__(self):
        assert self.head_dim % ATOM == 0, self
        assert all(self.page_tokens % section.tokens == 0 for section in self.extras), self
        if self.format in PLANE_FORMATS:
            assert self.page_tokens % self.parts == 0, self
        if self.meta is not None:
            assert (self.head_dim if self.axis == "token" else self.page_tokens) % self.group == 0, self

    @property
    def slices(self) -> tuple["ChannelSlice", ...]:
        """The side's channels, in order, in parts that are stored alike; of a side in one piece, the side itself."""
        if not self.tiers:
            return (ChannelSlice(layout=self, first=0, channels=self.head_dim, prefix=""),)
        width = self.head_dim // len(self.tiers)
        return tuple(
            ChannelSlice(layout=tier, first=i * width, channels=width, prefix=f"tier{i}_")
            for i, tier in enumerate(self.tiers)
        )

    @property
    def chunks(self) -> int:
        """Channel slices of one token, each ``width`` wide."""
        return math.gcd(self.head_dim // ATOM, FIELDS[self.bits]) if self.format in PLANE_FORMATS else 1

    @property
    def width(self) -> int:
        """Containers in a row."""
        return self.head_dim // self.chunks

    @property
    def parts(self) -> int:
        """Tokens that share a row of containers."""
        return FIELDS[self.bits] // self.chunks if self.format in PLANE_FORMATS else 1

    @property
    def rows(self) -> int:
        return self.page_tokens // self.parts

    @property
    def words_shape(self) -> tuple[int, ...]:
        """Shape of a page's words as int16 (planes), of its bytes (e4m3) or of its numbers (dense)."""
        if self.format in ("e4m3", "dense"):
            return (self.page_tokens, self.head_dim)
        if self.format == "sections":
            return (self.page_tokens, 0)
        return (self.rows, CONTAINER_WORDS[self.bits], self.width)

    @property
    def words_dtype(self) -> str:
        return {"e4m3": "uint8", "sections": "uint8", "dense": "float16"}.get(self.format, "int16")

    @property
    def words_bytes(self) -> int:
        return math.prod(self.words_shape) * (1 if self.format == "e4m3" else 2)

    @property
    def meta(self) -> Section | None:
        """The section of scales and minima; None where a codec has none."""
        if self.format in ("e4m3", "dense", "sections") or not self.meta_terms:
            return None
        dtype = META_FORMATS[self.meta_format]
        if self.axis == "token":
            shape = (self.head_dim // self.group, self.meta_terms)
            return Section(name="meta", shape=shape, dtype=dtype, shared=self.meta_shared)
        return Section(name="meta", shape=(self.head_dim, self.meta_terms), dtype=dtype, tokens=self.group)

    @property
    def is_plain(self) -> bool:
        """True for the layouts that need no more than codes and fp16 pairs: what the basic kernels serve."""
        if self.extras or self.permuted:
            return False
        plain_meta = (self.meta_terms, self.meta_format, self.meta_shared) == (2, "float16", False)
        return self.format == "e4m3" or (self.format == "affine" and plain_meta)

    @property
    def scaled_by_token(self) -> bool:
        """Whether every token has scales of its own (metadata or a norm) that no other token shares."""
        if self.meta:
            return self.axis == "token"
        return any(section.name == "norm" for section in self.extras)

    @property
    def sections(self) -> tuple[Section, ...]:
        return (self.meta, *self.extras) if self.meta else self.extras

    @property
    def meta_bytes(self) -> int:
        return self.meta.page_bytes(self.page_tokens) if self.meta else 0

    def bits_per_element(self, heads: int = 1, padded: bool = False) -> float:
        """Codes and sections, in bits per stored number, without or with their padding; ``heads`` divide what they
        share."""

        def taken(size: int, step: int) -> int:
            return _aligned(size, step) if padded else size

        total = taken(self.words_bytes, SECTION_ALIGNMENT)
        for section in self.sections:
            step = SECTION_ALIGNMENT if section.name == "meta" and not section.shared else EXTRA_ALIGNMENT
            total += taken(section.page_bytes(self.page_tokens), step) / (heads if section.shared else 1)
        return 8 * total / (self.page_tokens * self.head_dim)


def _aligned(size: int, step: int) -> int:
    return -(-size // step) * step


@dataclass(frozen=True, kw_only=True)
class ChannelSlice:
    """Channels [first, first + channels) of a head, which one grid stores.

    layout   of a page, or of one block where a side has several slices; None: not stored, the channels are zero.
    prefix   of the names of its words and sections in the page.
    """

    layout: SideLayout | None
    first: int
    channels: int
    prefix: str

    def own(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """What belongs to it of a side's words and sections, by its layout's own names."""
        return {name.removeprefix(self.prefix): part for name, part in parts.items() if name.startswith(self.prefix)}


def sliced_layout(blocks: Sequence[SideLayout | None], page_tokens: int) -> SideLayout:
    """Equal slices of channels, each stored as the layout of a block of it says, or not at all: every slice has its
    words in a section, one row a block, and its metadata in others."""
    stored = [block for block in blocks if block is not None]
    layout = SideLayout(
        format="sections",
        bits=0,
        head_dim=stored[0].head_dim * len(blocks),
        page_tokens=page_tokens,
        meta_terms=0,
        tiers=tuple(blocks),
    )
    extras = []
    for part in layout.slices:
        if part.layout is not None:
            block, shape = part.layout.page_tokens, part.layout.words_shape
            extras.append(Section(name=f"{part.prefix}words", shape=shape, dtype="int16", tokens=block))
            extras += [replace(section, name=f"{part.prefix}{section.name}") for section in part.layout.sections]
    return replace(layout, extras=tuple(extras))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one part of a side lies: bytes from the start of a head's record, or of the shared one; what they hold."""

    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """One page record: both sides, with byte offsets of the four sections."""

    key: SideLayout
    value: SideLayout

    def __post_init__(self):
        assert self.key.page_tokens == self.value.page_tokens

    @property
    def page_tokens(self) -> int:
        return self.key.page_tokens

    def side(self, name: str) -> SideLayout:
        return self.key if name == "key" else self.value

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part of a head's record starts, in bytes: ``key_words``, ``value_words``, ``key_meta``, ..."""
        return _starts(
            [("key_words", self.key.words_bytes), ("value_words", self.value.words_bytes)], self._sections(False)
        )

    @cached_property
    def record_bytes(self) -> int:
        return self.offsets["end"]

    @cached_property
    def shared_offsets(self) -> dict[str, int]:
        """The same for the record that the heads of a page share."""
        return _starts([], self._sections(True))

    @cached_property
    def shared_bytes(self) -> int:
        """Bytes of a page's shared record, 0 if there is none."""
        return self.shared_offsets["end"]

    def page_bytes(self, heads: int) -> int:
        """Bytes of a page: the heads' records, then the shared one."""
        return heads * self.record_bytes + self.shared_bytes

    @cached_property
    def places(self) -> dict[tuple[str, str], Place]:
        """By side and name, where words (``words``) and sections lie."""
        found = {}
        for name, side in (("key", self.key), ("value", self.value)):
            found[name, "words"] = Place(
                start=self.offsets[f"{name}_words"],
                nbytes=side.words_bytes,
                dtype=side.words_dtype,
                shape=side.words_shape,
            )
            for section in side.sections:
                offsets = self.shared_offsets if section.shared else self.offsets
                found[name, section.name] = Place(
                    start=offsets[f"{name}_{section.name}"],
                    nbytes=section.page_bytes(self.page_tokens),
                    dtype=section.dtype,
                    shape=section.page_shape(self.page_tokens),
                    shared=section.shared,
                )
        return found

    def bits_per_element(self, heads: int = 1) -> float:
        """Bits of a full page per number in it, padding included; ``heads`` divide the record that they share."""
        head_dim = self.key.head_dim
        return 4 * (self.record_bytes + self.shared_bytes / heads) / (self.page_tokens * head_dim)

    def _sections(self, shared: bool) -> list[tuple[str, int]]:
        """Names and sizes of sections in the order in which they lie: metadata of both sides, then the others."""
        found = [
            (section.name != "meta", f"{name}_{section.name}", section.page_bytes(self.page_tokens))
            for name, side in (("key", self.key), ("value", self.value))
            for section in side.sections
            if section.shared == shared
        ]
        return [(name, size) for _, name, size in sorted(found, key=lambda part: part[0])]


def _starts(*parts: list[tuple[str, int]]) -> dict[str, int]:
    """Aligned start of each part, and of what follows the last one under ``end``."""
    starts, end = {}, 0
    for name, size in itertools.chain(*parts):
        starts[name] = _aligned(end, SECTION_ALIGNMENT if name in MAIN_SECTIONS else EXTRA_ALIGNMENT)
        end = starts[name] + size
    return starts | {"end": _aligned(end, SECTION_ALIGNMENT)}
