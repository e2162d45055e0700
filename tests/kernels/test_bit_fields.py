"""The inline PTX of unpacking, executed by a small interpreter of its own, against the packing specification."""

import re

import pytest
import torch

from kvq.kernels.bit_fields import FIELD_TABLES, book_ptx, book_registers, unpack_ptx
from kvq.pages.bits import pack_rows
from kvq.pages.layout import CONTAINER_WORDS, FIELDS, SideLayout

MASK = 0xFFFFFFFF


def permute(a: int, b: int, selector: int) -> int:
    """prmt.b32: four bytes picked out of eight; bit 3 of a selector nibble repeats the byte's sign."""
    source, out = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        out |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def logic(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


OPERATIONS = {
    "prmt.b32": permute,
    "lop3.b32": logic,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "mad.lo.u32": lambda a, b, c: a * b + c,
}


def execute(text: str, inputs: list[int], outputs: int) -> list[int]:
    """Run straight-line PTX; operand $n is an output up to ``outputs``, then an input."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for line in re.findall(r"^(?!\.reg)(\S+) (.*);$", text, re.MULTILINE):
        target, *operands = re.split(r",\s*", line[1])
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        registers[target] = OPERATIONS[line[0]](*values) & MASK
    return [registers[f"${i}"] for i in range(outputs)]


def containers(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [2, fields] of two containers that between them hold every code in every field, and their words [2, w]."""
    count = FIELDS[bits]
    layout = SideLayout(format="affine", bits=bits, head_dim=16, page_tokens=16, axis="token", group=16)
    codes = torch.randint(0, 2**bits, (layout.parts, layout.rows, 16), generator=torch.Generator().manual_seed(0))
    words = pack_rows(codes.to(torch.uint8), layout)
    # With 16 channels a field is a token part, and a container a channel.
    assert layout.parts == count
    return codes[:, 0, :].T, words[0].T.int() & 0xFFFF


def halves(word: int) -> tuple[float, float]:
    low, high = torch.tensor([word & 0xFFFF, word >> 16]).to(torch.int16).view(torch.float16).tolist()
    return low, high


@pytest.mark.parametrize("bits", FIELD_TABLES)
def test_unpacking_gives_code_plus_bias(bits):
    codes, words = containers(bits)
    text, constraints = unpack_ptx(bits)
    assert constraints.count("=&r") == FIELDS[bits]
    for pair in range(0, 16, 2):
        packed = [int(words[pair, w]) | int(words[pair + 1, w]) << 16 for w in range(CONTAINER_WORDS[bits])]
        for f, word in enumerate(execute(text, packed, FIELDS[bits])):
            bias = FIELD_TABLES[bits][f].bias
            assert halves(word) == tuple(float(codes[pair + i, f]) + bias for i in range(2)), (pair, f)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_looking_up_gives_the_levels(bits):
    codes, words = containers(bits)
    levels = torch.randn(2**bits, generator=torch.Generator().manual_seed(1)).half()
    table = [value & MASK for value in book_registers(tuple(levels.tolist())) for _ in range(2)]
    text, _ = book_ptx(bits)
    for pair in range(0, 16, 2):
        packed = [int(words[pair, w]) | int(words[pair + 1, w]) << 16 for w in range(CONTAINER_WORDS[bits])]
        for f, word in enumerate(execute(text, [*packed, *table], FIELDS[bits])):
            assert halves(word) == tuple(float(levels[codes[pair + i, f]]) for i in range(2)), (pair, f)


def test_the_interpreter_notices_another_mask():
    codes, words = containers(4)
    text, _ = unpack_ptx(4)
    packed = [int(words[0, 0]) | int(words[1, 0]) << 16]
    broken = execute(text.replace("0x003c003c", "0x001c001c", 1), packed, 4)
    assert broken != execute(text, packed, 4) or int(codes[:2, 0].max()) < 8
