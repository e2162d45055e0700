"""How a kernel turns one field of two 16-bit words into two fp16 numbers: one AND and one OR.

A field that lies at bit b of its word, masked in place and OR-ed with the bits of a power of two P, is the fp16 number
``P + code`` if one unit of P's mantissa at bit b is 1, that is P = 2^(10 - b). So no code is shifted or converted; the
bias P is constant per field and leaves the loop through the algebra of decode. Fields in the upper byte are read from
the word with its bytes swapped, which keeps P small (P times the sum of the weights sits in the accumulators).

``FIELD_TABLES`` is the single source: the portable unpacker, the PTX text, and the tests read it.
"""

from dataclasses import dataclass

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
