"""One tile of decode attention: what scores from packed keys and the weighted sum of packed values have in common.

Every tensor leads with the warps of the program: Triton gives each warp one entry of a batched product, so a warp has
its own tokens and its own softmax state, and the loop needs no exchange between warps. Tokens are the M side of the
products, heads (query columns) the N side. Shapes: W warps, R tokens of a block, C containers, H query columns.

The algebra (c code, P its field's bias, s scale, z minimum, p weights):

    axis token     score_t = s_t (sum_c q_c (c + P) - sum_c q_c P) + z_t sum_c q_c
                   out_c   = sum_t (p_t s_t)(c + P) - P sum_t (p_t s_t) + sum_t p_t z_t
    axis channel   score_t = sum_c (q_c s_c)(c + P) - sum_c (q_c s_c) P + sum_c (q_c z_c)
                   out_c   = s_c (sum_t p_t (c + P) - P sum_t p_t) + z_c sum_t p_t

    (symmetric codes have no z and half their range added to P; levels of a book have no P)

    (keys in a frame: every block of the frame has a query of its own, and a bias that is added to the score)

so no number of a page is scaled or shifted by itself. A correction uses the same rounded fp16 factors as the product
that it corrects, so the bias cancels exactly. Weights are kept times a power of two, chosen so that a weight times the
largest scale nearly fills fp16: small weights and small scales keep their precision.
"""

import triton
import triton.language as tl

from kvq.kernels.device.sections import load_meta, load_norm
from kvq.kernels.device.words import known, unpack


@triton.jit
def add(values, i: tl.constexpr, value):
    """The tuple with ``value`` added to entry i."""
    return values[:i] + (values[i] + value,) + values[i + 1 :]


@triton.jit
def scaled(values, factor):
    """The tuple with every entry multiplied."""
    scaled = ()
    for i in tl.static_range(known(len(values))):
        scaled = scaled + (values[i] * factor,)
    return scaled


@triton.jit
def dot_into(values, i: tl.constexpr, a, b):
    """The tuple with the product a @ b added to entry i."""
    return values[:i] + (tl.dot(a, b, values[i]),) + values[i + 1 :]


@triton.constexpr_function
def row_blocks(S, T):
    """Blocks of tokens in a row of containers' share of the tile."""
    return S.rows // T.stride


@triton.constexpr_function
def block_of(S, T, f, s):
    """Block of the tile that field f of row block s belongs to."""
    unit, row = divmod(s * T.stride, S.unit_rows)
    return (unit * S.unit + f // S.chunks * S.unit_rows + row) // T.stride


@triton.constexpr_function
def part_of(S, T, b):
    """Part of a row of containers that block b lies in."""
    return b * T.stride % S.unit // S.unit_rows


@triton.constexpr_function
def token_group(S, T, b):
    """Token group of block b within its page (axis channel)."""
    return b * T.stride // S.group


@triton.constexpr_function
def reads_masked(S, masked):
    """Whether words of tokens that do not exist must not be read: numbers may be NaN, codes cannot."""
    return masked and S.kind in ("e4m3", "dense")


@triton.jit
def load_planes(
    record,
    row,
    first: tl.constexpr,
    keep,
    book,
    S: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Unpack the containers [first, first + S.block) of rows: planes [W, R, C], or [W, C, R] if TRANSPOSED.

    record: pointers [W, 1 or R] to the records. row [1 or W, R]. keep [W, R]: rows to read, if MASKED.
    """
    if TRANSPOSED:
        # Transposed by address, not by a permutation of loaded words: the operand then comes from shared memory by
        # transposing matrix loads.
        column = (first + tl.arange(0, S.block))[None, :, None]
        record, row, keep = record[:, None, :], row[:, None, :], keep[:, None, :]
    else:
        column = (first + tl.arange(0, S.block))[None, None, :]
        record, row, keep = record[:, :, None], row[:, :, None], keep[:, :, None]
    words = ()
    for w in tl.static_range(known(S.words)):
        at = record.to(tl.pointer_type(tl.int16)) + (S.words_offset // 2 + row * S.row_words + w * S.width + column)
        # Not true of the first dimension: it makes the lanes of a warp run over it before rows, so that a thread meets
        # one page only. The width of a load follows from the dimension of the words alone.
        at = tl.max_contiguous(at, [2, 8, 1] if TRANSPOSED else [2, 1, 8])
        if MASKED:
            word = tl.load(at, mask=keep & (column < S.width), other=0)
        elif S.width % S.block != 0:
            word = tl.load(at, mask=column < S.width, other=0)
        else:
            word = tl.load(at)
        words = words + (word,)
    return unpack(words, book, S, ASM)


@triton.jit
def token_meta(records, token, g: tl.constexpr, keep, S: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """Scale and minimum of tokens in channel group g, fp32 [W, R, 1]; axis token, ``S.scaled``."""
    if S.terms == 0:
        scale = load_norm(records, token, keep, S, MASKED)
        minimum = scale
    else:
        scale, minimum = load_meta(records, token * S.groups + g, 0, keep, S, MASKED, ASM)
        scale, minimum = scale.to(tl.float32), minimum.to(tl.float32)
        if S.norm_offset >= 0:
            norm = load_norm(records, token, keep, S, MASKED)
            scale, minimum = scale * norm, minimum * norm
    return scale[:, :, None], minimum[:, :, None]
