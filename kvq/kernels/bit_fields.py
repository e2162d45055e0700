"""How a kernel turns one field of two 16-bit words into two fp16 numbers: one AND and one OR.

A field that lies at bit b of its word, masked in place and OR-ed with the bits of a power of two P, is the fp16 number
``P + code`` if one unit of P's mantissa at bit b is 1, that is P = 2^(10 - b). So no code is shifted or converted; the
bias P is constant per field and leaves the loop through the algebra of decode. Fields in the upper byte are read from
the word with its bytes swapped, which keeps P small (P times the sum of the weights sits in the accumulators).

``FIELD_TABLES`` is the single source: the portable unpacker, the PTX text, and the tests read it.

Codes that name levels of a book are looked up byte by byte with ``prmt``, which picks four bytes out of eight by the
nibbles of a selector: once for the low bytes of the fp16 levels, once for the high ones.
"""

import struct
from dataclasses import dataclass
from functools import cache

DIRECT, SWAPPED, SHIFTED, SPREAD = "direct", "swapped", "shifted", "spread"


@dataclass(frozen=True, kw_only=True)
class Field:
    """Where a field is read: container word, how that word is viewed, the mask there, and the bias added to the code.

    view   ``direct``; ``swapped``: bytes exchanged; ``shifted`` right by ``shift``; ``spread``: bit 15 of words 0, 1, 2
           as bits 0, 1, 2.
    half   the bias as an fp16 bit pattern.
    """

    word: int
    view: str
    mask: int
    bias: int
    half: int
    shift: int = 0


def _at(word: int, view: str, bit: int, bits: int, shift: int = 0) -> Field:
    bias = 1 << 10 - bit
    return Field(word=word, view=view, mask=((1 << bits) - 1) << bit, bias=bias, half=_half_bits(bias), shift=shift)


def _half_bits(power: int) -> int:
    """The fp16 bit pattern of a power of two between 1 and 1024."""
    return power.bit_length() - 1 + 15 << 10


def _three_bits() -> tuple[Field, ...]:
    fields = []
    for word in range(3):
        fields += [_at(word, DIRECT, bit, 3) for bit in (0, 3, 6)]
        # Higher fields would leave no bits for an exponent, or need a bias of 8 and less, which a shift of 6 avoids.
        fields += [_at(word, SHIFTED, bit - 6, 3, shift=6) for bit in (9, 12)]
    return (*fields, _at(0, SPREAD, 0, 3))


FIELD_TABLES: dict[int, tuple[Field, ...]] = {
    2: (
        _at(0, SWAPPED, 8, 2),
        *(_at(0, DIRECT, 2 * f, 2) for f in range(1, 5)),
        *(_at(0, SWAPPED, 2 * f - 8, 2) for f in range(5, 8)),
    ),
    3: _three_bits(),
    4: (_at(0, DIRECT, 2, 4), _at(0, DIRECT, 6, 4), _at(0, SWAPPED, 2, 4), _at(0, SWAPPED, 6, 4)),
    8: (_at(0, DIRECT, 0, 8), _at(0, SHIFTED, 0, 8, shift=8)),
}


def unpack_ptx(bits: int) -> tuple[str, str]:
    """PTX that unpacks the fields of two containers at once, and its constraints.

    Operands: one 32-bit output a field (two fp16), then one 32-bit input a container word (two int16 words).
    """
    table = FIELD_TABLES[bits]
    count, words = len(table), 1 + max(field.word for field in table)
    lines, declared = [], []

    def register(name: str) -> str:
        declared.append(name)
        return name

    views = {}
    for f, field in enumerate(table):
        source, bias = f"${count + field.word}", f"{field.half * 0x10001:#010x}"
        if bits == 8:
            # A byte needs no mask: nibbles of the selector, low byte first, take it, 0x64, its neighbour's, 0x64.
            selector = 0x4240 if field.shift == 0 else 0x4341
            lines.append(f"prmt.b32 ${f}, {source}, {bias[:2] + bias[2:4] * 4}, {selector:#06x};")
            continue
        if field.view == SPREAD:
            kept = bias
            for i in range(words):
                moved, target = register(f"t{i}"), f"${f}" if i == words - 1 else register(f"s{i}")
                lines.append(f"shr.u32 {moved}, ${count + i}, {15 - i};")
                lines.append(f"lop3.b32 {target}, {moved}, {(1 << i) * 0x10001:#010x}, {kept}, 0xea;")
                kept = target
            continue
        if field.view != DIRECT and (field.word, field.view) not in views:
            view = views[field.word, field.view] = register(f"v{len(views)}")
            swap, shift = f"prmt.b32 {view}, {source}, 0, 0x2301;", f"shr.u32 {view}, {source}, {field.shift};"
            lines.append(swap if field.view == SWAPPED else shift)
        source = views.get((field.word, field.view), source)
        # Function 0xea of lop3 is (a & b) | c.
        lines.append(f"lop3.b32 ${f}, {source}, {field.mask * 0x10001:#010x}, {bias}, 0xea;")
    head = f".reg .b32 {', '.join(declared)};\n" if declared else ""
    # Early clobber: an output is written while inputs are still read.
    constraints = ",".join(["=&r"] * count + ["r"] * words)
    return "{\n" + head + "\n".join(lines) + "\n}", constraints


@cache
def book_registers(levels: tuple[float, ...]) -> tuple[int, ...]:
    """The table of ``book_ptx`` as int32 numbers: low bytes of the fp16 levels, then high bytes, four a number."""
    halves = [int.from_bytes(struct.pack("<e", level), "little") for level in levels]
    words = []
    for shift in (0, 8):
        for i in range(0, len(halves), 4):
            packed = sum((half >> shift & 0xFF) << 8 * j for j, half in enumerate(halves[i : i + 4]))
            words.append(packed - (1 << 32) if packed >> 31 else packed)
    return tuple(words)


def book_ptx(bits: int) -> tuple[str, str]:
    """PTX that looks up the fields of two containers at once, and its constraints.

    Operands: one 32-bit output a field (two fp16), one input a container word, then every register of the table twice
    (once for each container of the pair).
    """
    count, words = len(FIELD_TABLES[bits]), 1 + max(field.word for field in FIELD_TABLES[bits])
    tables = {2: 2, 3: 4, 4: 8}[bits]
    table = [f"${count + words + 2 * i}" for i in range(tables)]
    body = _nibble_lookups(count, table) if bits == 4 else _field_lookups(bits, count, words, table)
    constraints = ",".join(["=&r"] * count + ["r"] * (words + 2 * tables))
    return "{\n" + "\n".join(body) + "\n}", constraints


def _nibble_lookups(count: int, table: list[str]) -> list[str]:
    """Four bits: the plain nibbles of a word are a selector; its upper bits choose between two halves of the table."""
    word = f"${count}"
    lines = [
        ".reg .b32 a, n, s, x, ma, mb, l0, l1, h0, h1, la, ha, lb, hb, p, q;",
        f"shr.u32 a, {word}, 2;",
        "and.b32 a, a, 0x3fff3fff;",
        f"shl.b32 n, {word}, 14;",
        "lop3.b32 n, n, 0xc000c000, a, 0xea;",
        "and.b32 s, n, 0x77777777;",
        "shl.b32 x, n, 4;",
        # Selector nibbles of 8 and more repeat the sign of a byte: masks of the codes above seven.
        "prmt.b32 ma, n, x, 0x9d8c;",
        "prmt.b32 mb, n, x, 0xbfae;",
    ]
    for side in "ab":
        if side == "b":
            lines.append("shr.u32 s, s, 16;")
        for kind, first in (("l", 0), ("h", 4)):
            lines.append(f"prmt.b32 {kind}0, {table[first]}, {table[first + 1]}, s;")
            lines.append(f"prmt.b32 {kind}1, {table[first + 2]}, {table[first + 3]}, s;")
            lines.append(f"lop3.b32 {kind}{side}, m{side}, {kind}1, {kind}0, 0xca;")
    for f, selector in ((0, "0x5140"), (2, "0x7362")):
        lines += [
            f"prmt.b32 p, la, ha, {selector};",
            f"prmt.b32 q, lb, hb, {selector};",
            f"prmt.b32 ${f}, p, q, 0x5410;",
            f"prmt.b32 ${f + 1}, p, q, 0x7632;",
        ]
    return lines


def _field_lookups(bits: int, count: int, words: int, table: list[str]) -> list[str]:
    """Two and three bits: a selector is made of each field of the two words."""
    mask = ((1 << bits) - 1) * 0x10001
    lines = [".reg .b32 x, y, l, h;"]
    for f in range(count):
        if bits == 3 and f == count - 1:
            lines += [f"shr.u32 x, ${count}, 15;", "and.b32 x, x, 0x00010001;"]
            for i in range(1, words):
                lines += [f"shr.u32 y, ${count + i}, {15 - i};", f"lop3.b32 x, y, {(1 << i) * 0x10001:#010x}, x, 0xea;"]
        else:
            word, shift = (f // 5, 3 * (f % 5)) if bits == 3 else (0, 2 * f)
            lines += [f"shr.u32 x, ${count + word}, {shift};", f"and.b32 x, x, {mask:#010x};"]
        if bits == 2:
            # Nibbles a, a + 4, b, b + 4: low and high byte of both levels at once.
            lines += ["shr.u32 y, x, 8;", "or.b32 x, x, y;", "mad.lo.u32 x, x, 0x11, 0x4040;"]
            lines += [f"prmt.b32 ${f}, {table[0]}, {table[1]}, x;"]
        else:
            lines += ["shr.u32 y, x, 12;", "or.b32 x, x, y;"]
            lines += [f"prmt.b32 l, {table[0]}, {table[1]}, x;", f"prmt.b32 h, {table[2]}, {table[3]}, x;"]
            lines += [f"prmt.b32 ${f}, l, h, 0x5140;"]
    return lines
