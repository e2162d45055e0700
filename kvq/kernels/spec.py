"""The page record: where every byte of a packed page lies.

A page holds ``page_tokens`` tokens of one KV head as one contiguous record

    [ K words | V words | K meta | V meta ]        every section starts at a multiple of 128 bytes

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

Metadata is one (scale, minimum) pair of fp16 numbers per group: ``[tokens, groups, 2]`` for axis token and
``[token groups, head_dim, 2]`` for axis channel. A code c stands for ``c * scale + minimum``. The scale of e4m3 is one
static number per tensor and lives outside the page.
"""

import math
from dataclasses import dataclass

ATOM = 16
SECTION_ALIGNMENT = 128
DEFAULT_PAGE_TOKENS = 64
META_BYTES = 4
FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}
CONTAINER_WORDS = {2: 1, 3: 3, 4: 1, 8: 1}


@dataclass(frozen=True, kw_only=True)
class SideLayout:
    """Layout of one side (K or V) of a page.

    format   ``affine`` (planes of ``bits``-bit codes) or ``e4m3``.
    axis     ``token`` or ``channel`` (affine), group: numbers that share a scale.
    """

    format: str
    bits: int
    head_dim: int
    page_tokens: int
    axis: str = "token"
    group: int = 0

    def __post_init__(self):
        assert self.head_dim % ATOM == 0, self
        if self.format == "affine":
            assert self.page_tokens % self.parts == 0, self
            assert (self.head_dim if self.axis == "token" else self.page_tokens) % self.group == 0, self

    @property
    def chunks(self) -> int:
        """Channel slices of one token, each ``width`` wide."""
        return 1 if self.format == "e4m3" else math.gcd(self.head_dim // ATOM, FIELDS[self.bits])

    @property
    def width(self) -> int:
        """Containers in a row."""
        return self.head_dim // self.chunks

    @property
    def parts(self) -> int:
        """Tokens that share a row of containers."""
        return 1 if self.format == "e4m3" else FIELDS[self.bits] // self.chunks

    @property
    def rows(self) -> int:
        return self.page_tokens // self.parts

    @property
    def words_shape(self) -> tuple[int, ...]:
        """Shape of a page's words as int16 (affine) or of its bytes (e4m3)."""
        if self.format == "e4m3":
            return (self.page_tokens, self.head_dim)
        return (self.rows, CONTAINER_WORDS[self.bits], self.width)

    @property
    def words_bytes(self) -> int:
        return math.prod(self.words_shape) * (1 if self.format == "e4m3" else 2)

    @property
    def meta_shape(self) -> tuple[int, ...]:
        """Shape of a page's metadata as fp16; the last dimension is (scale, minimum)."""
        if self.format == "e4m3":
            return (0,)
        if self.axis == "token":
            return (self.page_tokens, self.head_dim // self.group, 2)
        return (self.page_tokens // self.group, self.head_dim, 2)

    @property
    def meta_bytes(self) -> int:
        return math.prod(self.meta_shape) * 2

    @property
    def bits_per_element(self) -> float:
        """Codes and metadata, in bits per stored number, without alignment."""
        return 8 * (self.words_bytes + self.meta_bytes) / (self.page_tokens * self.head_dim)


def _aligned(size: int) -> int:
    return -(-size // SECTION_ALIGNMENT) * SECTION_ALIGNMENT


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

    @property
    def offsets(self) -> dict[str, int]:
        value_words = _aligned(self.key.words_bytes)
        key_meta = value_words + _aligned(self.value.words_bytes)
        value_meta = key_meta + _aligned(self.key.meta_bytes)
        return {"key_words": 0, "value_words": value_words, "key_meta": key_meta, "value_meta": value_meta}

    @property
    def record_bytes(self) -> int:
        return self.offsets["value_meta"] + _aligned(self.value.meta_bytes)
