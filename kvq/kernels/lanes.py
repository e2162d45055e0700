"""Sixteen numbers at once in numba code: a vector value type, and the few operations that the CPU kernels need.

Compilers vectorise long loops over arrays well, but the loops over a page are short and their lengths are only known
when they run. Here a vector is a value like any other; LLVM maps it to whatever registers the machine has. Addresses
are integers (``array.ctypes.data``), strides and bounds are the caller's business.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_REALS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


class LaneType(types.Type):
    """Sixteen numbers of one scalar type: int32, float32 or float64."""

    def __init__(self, element: types.Type):
        self.element = element
        super().__init__(name=f"lanes({element})")


@register_model(LaneType)
class _LaneModel(models.PrimitiveModel):
    def __init__(self, manager, kind: LaneType):
        super().__init__(manager, kind, _vector(kind.element))


def _vector(element: types.Type) -> ir.VectorType:
    return ir.VectorType(_REALS.get(element) or ir.IntType(32), LANES)


INTS = LaneType(types.int32)
REALS = {element: LaneType(element) for element in _REALS}


def _function(builder, name: str, result: ir.Type, *arguments: ir.Value):
    """Call an LLVM intrinsic, fused or reordered where LLVM likes."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [x.type for x in arguments]), name
    )
    return builder.call(function, arguments, fastmath=("reassoc", "contract"))


def _suffix(element: types.Type) -> str:
    return f"v{LANES}{'f32' if element == types.float32 else 'f64'}"


def _load(builder, address, kind: ir.Type, count: int = LANES):
    vector = ir.VectorType(kind, count)
    pointer = builder.inttoptr(address, vector.as_pointer())
    return builder.load(pointer, align=1)


@intrinsic
def load_words(typingctx, address):
    """Sixteen uint16 from memory, as int32."""

    def generate(context, builder, signature, arguments):
        return builder.zext(_load(builder, arguments[0], ir.IntType(16)), _vector(types.int32))

    return INTS(types.int64), generate


@intrinsic
def load_bytes(typingctx, address):
    """Sixteen uint8 from memory, as int32."""

    def generate(context, builder, signature, arguments):
        return builder.zext(_load(builder, arguments[0], ir.IntType(8)), _vector(types.int32))

    return INTS(types.int64), generate


def _every_other(builder, address, first: int):
    pairs = _load(builder, address, ir.IntType(16), 2 * LANES)
    places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [first + 2 * lane for lane in range(LANES)])
    return builder.zext(builder.shuffle_vector(pairs, pairs, places), _vector(types.int32))


@intrinsic
def load_even_words(typingctx, address):
    """Words 0, 2, ... 30 of 32 uint16 in memory, as int32."""

    def generate(context, builder, signature, arguments):
        return _every_other(builder, arguments[0], 0)

    return INTS(types.int64), generate


@intrinsic
def load_odd_words(typingctx, address):
    """Words 1, 3, ... 31 of 32 uint16 in memory, as int32."""

    def generate(context, builder, signature, arguments):
        return _every_other(builder, arguments[0], 1)

    return INTS(types.int64), generate


@intrinsic
def load_reals(typingctx, address, like):
    """Sixteen floats of the type of ``like`` from memory."""

    def generate(context, builder, signature, arguments):
        return _load(builder, arguments[0], _REALS[like])

    return REALS[like](types.int64, like), generate


@intrinsic
def store_reals(typingctx, address, lanes):
    """Sixteen floats to memory."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], arguments[1].type.as_pointer())
        builder.store(arguments[1], pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, lanes), generate


def _splat(builder, scalar):
    vector = ir.VectorType(scalar.type, LANES)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, single, first)


@intrinsic
def splat(typingctx, scalar):
    """Sixteen times one float."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return REALS[scalar](scalar), generate


def _ints(operation: str, text: str):
    """An operation of sixteen integers with one scalar."""

    @intrinsic
    def combine(typingctx, lanes, scalar):
        def generate(context, builder, signature, arguments):
            return getattr(builder, operation)(arguments[0], _splat(builder, arguments[1]))

        return INTS(INTS, types.int32), generate

    combine.__doc__ = text
    return combine


shift_right = _ints("lshr", "Every lane shifted right.")
shift_left = _ints("shl", "Every lane shifted left.")
mask = _ints("and_", "The bits of every lane that are set in a scalar.")
plus = _ints("add", "Every lane plus a scalar.")


@intrinsic
def either(typingctx, left, right):
    """Bits of both."""

    def generate(context, builder, signature, arguments):
        return builder.or_(*arguments)

    return INTS(INTS, INTS), generate


@intrinsic
def as_reals(typingctx, lanes, like):
    """Integers as floats of the type of ``like``."""

    def generate(context, builder, signature, arguments):
        return builder.sitofp(arguments[0], _vector(like))

    return REALS[like](INTS, like), generate


@intrinsic
def bits_as_floats(typingctx, lanes):
    """The same bits read as float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _vector(types.float32))

    return REALS[types.float32](INTS), generate


@intrinsic
def as_ints(typingctx, lanes):
    """Floats without their fractions, as integers."""

    def generate(context, builder, signature, arguments):
        return builder.fptosi(arguments[0], _vector(types.int32))

    return INTS(lanes), generate


@intrinsic
def widened(typingctx, lanes, like):
    """float32 lanes as floats of the type of ``like``."""

    def generate(context, builder, signature, arguments):
        return arguments[0] if like == types.float32 else builder.fpext(arguments[0], _vector(like))

    return REALS[like](REALS[types.float32], like), generate


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c."""

    def generate(context, builder, signature, arguments):
        return _function(builder, f"llvm.fmuladd.{_suffix(a.element)}", arguments[0].type, *arguments)

    return a(a, a, a), generate


@intrinsic
def times(typingctx, a, b):
    """a * b."""

    def generate(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return a(a, a), generate


@intrinsic
def largest(typingctx, a, b):
    """The larger of each pair; neither is NaN."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return a(a, a), generate


@intrinsic
def rounded(typingctx, a):
    """Each lane's nearest whole number."""

    def generate(context, builder, signature, arguments):
        return _function(builder, f"llvm.rint.{_suffix(a.element)}", arguments[0].type, arguments[0])

    return a(a), generate


@intrinsic
def total(typingctx, lanes):
    """The sum of the lanes, in any order."""

    def generate(context, builder, signature, arguments):
        scalar = _REALS[lanes.element]
        name = f"llvm.vector.reduce.fadd.{_suffix(lanes.element)}"
        return _function(builder, name, scalar, ir.Constant(scalar, -0.0), arguments[0])

    return lanes.element(lanes), generate


@intrinsic
def pointer_to(typingctx, address, like):
    """An integer as a pointer to numbers of the type of ``like``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(like)))

    return types.CPointer(like)(types.int64, like), generate


@intrinsic
def next_unit(typingctx, address):
    """Count one up in memory and return what was there, whichever thread comes first."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate
