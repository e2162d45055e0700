"""Words to fp16 planes on the device: inline PTX, and a portable twin for the interpreter and other targets."""

import triton
import triton.language as tl

# Words of two neighbouring bytes to (first, second) of each. The conversion exists from sm_89 on; before it, seven bits
# at fp16 bits 7 to 13 are the magnitude times 2^-8, subnormals included.
_E4M3_PTX = tl.constexpr("""{
.reg .b32 t;
.reg .b16 low, high;
prmt.b32 t, $2, 0, 0x3120;
mov.b32 {low, high}, t;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")
_E4M3_PTX_SM80 = tl.constexpr("""{
.reg .b32 a, b, c, d;
shl.b32 a, $2, 7;
and.b32 a, a, 0x3f803f80;
shl.b32 b, $2, 8;
lop3.b32 a, b, 0x80008000, a, 0xea;
shr.u32 c, $2, 1;
and.b32 c, c, 0x3f803f80;
lop3.b32 c, $2, 0x80008000, c, 0xea;
mov.b32 d, 0x5c005c00;
mul.rn.f16x2 $0, a, d;
mul.rn.f16x2 $1, c, d;
}""")


@triton.constexpr_function
def known(value):
    """A number read off a compile-time object, in the form that ``tl.static_range`` asks for."""
    return value


@triton.constexpr_function
def bias_of(S, f):
    """What the unpacked field is larger by than the number that its scale multiplies (codes are symmetric if there is
    no minimum)."""
    if S.kind != "affine":
        return 0.0
    return float(S.table[f].bias + middle_of(S))


@triton.constexpr_function
def middle_of(S):
    """The code that stands for zero before a minimum is added: of symmetric codes 2^(bits - 1), of evenly spaced levels
    the middle, else 0."""
    if S.evenly:
        return (2**S.bits - 1) / 2
    return float(2 ** (S.bits - 1)) if S.terms == 1 else 0.0


@triton.constexpr_function
def _half_types(S):
    return (tl.float16,) * S.fields


@triton.jit
def unpack(words, book, S: tl.constexpr, ASM: tl.constexpr):
    """Container words (a tuple of int16 tensors of one shape) to a tuple of ``S.fields`` fp16 tensors of that shape.

    affine: code + bias of the field. book: the level that the code names, ``book`` being the registers of
    ``fields.book_registers``. e4m3, dense: the numbers themselves. ``ASM``: compute capability (89 for 8.9) that inline
    PTX is written for, or 0 for plain operations, which any target and the interpreter run.
    """
    if S.kind == "e4m3":
        return _unpack_e4m3(words[0], ASM)
    elif S.kind == "dense":
        return (words[0].to(tl.float16, bitcast=True),)
    elif ASM:
        return tl.inline_asm_elementwise(S.ptx, S.constraints, words + book, _half_types(S), is_pure=True, pack=2)
    elif S.kind == "book":
        return _look_up_portable(words, book, S)
    else:
        return _unpack_portable(words, S)


@triton.jit
def _unpack_portable(words, S: tl.constexpr):
    planes = ()
    for f in tl.static_range(known(S.fields)):
        word = words[S.table[f].word].to(tl.int32) & 0xFFFF
        if S.table[f].view == "swapped":
            word = (word & 0xFF) << 8 | word >> 8
        elif S.table[f].view == "shifted":
            word = word >> S.table[f].shift
        elif S.table[f].view == "spread":
            word = word >> 15
            for i in tl.static_range(1, known(S.words)):
                word = word | ((words[i].to(tl.int32) & 0xFFFF) >> 15) << i
        half = word & S.table[f].mask | S.table[f].half
        planes = planes + (half.to(tl.int16).to(tl.float16, bitcast=True),)
    return planes


@triton.jit
def _look_up_portable(words, book, S: tl.constexpr):
    wide = ()
    for w in tl.static_range(known(S.words)):
        wide = wide + (words[w].to(tl.int32) & 0xFFFF,)
    planes = ()
    for f in tl.static_range(known(S.fields)):
        code = field_code(wide, f, S)
        half = tl.zeros_like(code)
        for level in tl.static_range(known(2**S.bits)):
            low = book[level // 4] >> 8 * (level % 4) & 0xFF
            high = book[2**S.bits // 4 + level // 4] >> 8 * (level % 4) & 0xFF
            half = tl.where(code == level, low | high << 8, half)
        planes = planes + (half.to(tl.int16).to(tl.float16, bitcast=True),)
    return planes


@triton.constexpr_function
def field_place(S, f):
    """(container word, shift, mask) of a field, before words of 4 bits are rotated."""
    if S.kind == "e4m3":
        return 0, 8 * f, 255
    if S.bits == 3:
        return f // 5, 3 * (f % 5), 7
    return 0, S.bits * f, 2**S.bits - 1


@triton.constexpr_function
def is_spread(S, f):
    """Whether a field takes bit 15 of three words."""
    return S.kind != "e4m3" and S.bits == 3 and f == 15


@triton.jit
def field_code(words, f: tl.constexpr, S: tl.constexpr):
    """Code of field f of container words (int32, 16 bits each)."""
    if is_spread(S, f):
        return words[0] >> 15 | words[1] >> 15 << 1 | words[2] >> 15 << 2
    else:
        word = words[field_place(S, f)[0]]
        if S.kind != "e4m3" and S.bits == 4:
            word = (word >> 2 | word << 14) & 0xFFFF
        return word >> field_place(S, f)[1] & field_place(S, f)[2]


@triton.jit
def _unpack_e4m3(word, ASM: tl.constexpr):
    """Words of two bytes to (even channels, odd channels)."""
    if ASM:
        text: tl.constexpr = _E4M3_PTX if ASM >= 89 else _E4M3_PTX_SM80
        return tl.inline_asm_elementwise(text, "=&r,=&r,r", [word], (tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        wide = word.to(tl.int32) & 0xFFFF
        return (e4m3_to_half(wide & 0xFF), e4m3_to_half(wide >> 8))


@triton.jit
def e4m3_to_half(byte):
    """Bytes (int32) to the fp16 numbers they stand for; the NaN byte reads as 480."""
    # Seven bits at fp16 bits 7..13 are the magnitude times 2^-8, subnormals included.
    half = ((byte & 0x80) << 8 | (byte & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True)
    return half * 256.0


@triton.jit
def halves(pair, ASM: tl.constexpr):
    """The two fp16 numbers of an int32: (low, high)."""
    if ASM:
        # Plain bit operations would cost a byte permutation a number.
        return tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pair], (tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        return low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """2^x; results below the smallest normal number are 0."""
    if ASM:
        # tl.exp2 adds a compare, a select and two multiplies for denormals.
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)
