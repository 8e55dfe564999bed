"""Vectors in Numba: what it lacks, and what its loops would leave to LLVM's judgement.

Intrinsics on a *tile*: rows of `TILE_BYTES` bytes, one after the other. Addresses are pointer and
offset in elements; nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from enclave_runtime.compiled.layout import TILE_BYTES

VECTOR = 8  # elements of a vector register, or of two for float64

# Pyright sees the undecorated function, whose first argument Numba supplies.
_intrinsic: Any = intrinsic


class _Vector(types.Type):
    """`VECTOR` elements of a float type, in registers."""

    def __init__(self, dtype: types.Type):
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        element = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, VECTOR))


@_intrinsic
def address_of(_, array):
    """The address of an array's first element."""

    def emit(context, builder, signature, arguments):
        return context.make_array(array)(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), emit


@_intrinsic
def shifted(_, pointer, by):
    """The address of the element `by` places on."""

    def emit(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.intp), emit


@_intrinsic
def pointer_like(_, pointer, address):
    """The pointer to an address, for elements of another pointer's type."""

    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(pointer))

    return pointer(pointer, types.intp), emit


@_intrinsic
def int32_pointer(_, address):
    """The pointer to an address, for int32."""
    kind = types.CPointer(types.int32)

    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.intp), emit


@_intrinsic
def prefetch(_, pointer, at):
    """Has the element's cache line brought in, if there is one."""

    def emit(context, builder, signature, arguments):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        address = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), byte)
        # To read, into the second level (locality 2), data.
        builder.call(function, [address, *(ir.Constant(flag, v) for v in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(pointer, types.intp), emit


@_intrinsic
def lane_count(_, pointer):
    """How many elements make a row of a tile; a constant."""

    def emit(context, builder, signature, arguments):
        return context.get_constant(types.intp, TILE_BYTES * 8 // pointer.dtype.bitwidth)

    return types.intp(pointer), emit


def _vector_at(context: Any, builder: Any, pointer: Any, kind: Any) -> Any:
    """The vector at an address, aligned as its elements are."""
    vector = builder.load(builder.bitcast(pointer, context.get_value_type(kind).as_pointer()))
    vector.align = kind.dtype.bitwidth // 8
    return vector


@_intrinsic(prefer_literal=True)
def load(_, pointer, at, stride, count):
    """A tuple of `count` vectors, `stride` elements apart."""
    kind, many = _Vector(pointer.dtype), count.literal_value

    def emit(context, builder, signature, arguments):
        address = builder.gep(arguments[0], [arguments[1]])
        vectors = []
        for _ in range(many):
            vectors.append(_vector_at(context, builder, address, kind))
            address = builder.gep(address, [arguments[2]])
        return context.make_tuple(builder, signature.return_type, vectors)

    return types.UniTuple(kind, many)(pointer, types.intp, types.intp, count), emit


@_intrinsic
def store(_, pointer, at, stride, vectors):
    """Writes a tuple of vectors, `stride` elements apart."""

    def emit(context, builder, signature, arguments):
        address = builder.gep(arguments[0], [arguments[1]])
        target = context.get_value_type(vectors.dtype).as_pointer()
        for vector in cgutils.unpack_tuple(builder, arguments[3]):
            store = builder.store(vector, builder.bitcast(address, target))
            store.align = pointer.dtype.bitwidth // 8
            address = builder.gep(address, [arguments[2]])
        return context.get_dummy_value()

    return types.void(pointer, types.intp, types.intp, vectors), emit


@_intrinsic(prefer_literal=True)
def gather(_, tile, lane, order, scale, first, count):
    """The vectors ``scale[i] * tile[order[i], lane:]``, for `count` values of i from `first`."""
    kind, many = _Vector(tile.dtype), count.literal_value

    def emit(context, builder, signature, arguments):
        start, *tables = (
            builder.gep(arguments[table], [arguments[offset]])
            for table, offset in ((0, 1), (2, 4), (3, 4))
        )
        lanes = context.get_constant(types.intp, TILE_BYTES * 8 // tile.dtype.bitwidth)
        zero, zeros = (
            ir.Constant(ir.IntType(32), 0),
            ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR),
        )
        vectors = []
        for i in range(many):
            step = [context.get_constant(types.intp, i)]
            row, factor = (builder.load(builder.gep(table, step)) for table in tables)
            row = builder.mul(builder.zext(row, lanes.type), lanes)
            vector = _vector_at(context, builder, builder.gep(start, [row]), kind)
            factor = builder.insert_element(ir.Constant(vector.type, ir.Undefined), factor, zero)
            factor = builder.shuffle_vector(factor, factor, zeros)
            vectors.append(builder.fmul(vector, factor))
        return context.make_tuple(builder, signature.return_type, vectors)

    result = types.UniTuple(kind, many)
    return result(tile, types.intp, order, scale, types.intp, count), emit


def _elementwise(vectors: Any, others: Any, combine: str) -> Any:
    """An intrinsic that combines two tuples of vectors by one instruction of the builder."""

    def emit(context, builder, signature, arguments):
        pairs = zip(*(cgutils.unpack_tuple(builder, many) for many in arguments), strict=True)
        results = [getattr(builder, combine)(x, y) for x, y in pairs]
        return context.make_tuple(builder, signature.return_type, results)

    return vectors(vectors, others), emit


@_intrinsic
def plus(_, vectors, others):
    """The sums of two tuples of vectors."""
    return _elementwise(vectors, others, "fadd")


@_intrinsic
def minus(_, vectors, others):
    """The differences of two tuples of vectors."""
    return _elementwise(vectors, others, "fsub")


@_intrinsic
def times(_, vectors, others):
    """The products of two tuples of vectors, element by element."""
    return _elementwise(vectors, others, "fmul")


@_intrinsic
def plus_multiples(_, vectors, factors, at, stride, vector):
    """To each of a tuple of vectors ``factors[at + i * stride] * vector[0]`` is added."""

    def emit(context, builder, signature, arguments):
        sums = cgutils.unpack_tuple(builder, arguments[0])
        (one,) = cgutils.unpack_tuple(builder, arguments[4])
        zero = ir.Constant(ir.IntType(32), 0)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR)
        address = builder.gep(arguments[1], [arguments[2]])
        for i, before in enumerate(sums):
            factor = builder.load(address)
            factor = builder.insert_element(ir.Constant(one.type, ir.Undefined), factor, zero)
            factor = builder.shuffle_vector(factor, factor, zeros)
            # One rounding instead of two, where the processor can.
            product = builder.fmul(factor, one, flags=("contract",))
            sums[i] = builder.fadd(before, product, flags=("contract",))
            address = builder.gep(address, [arguments[3]])
        return context.make_tuple(builder, signature.return_type, sums)

    return vectors(vectors, factors, types.intp, types.intp, vector), emit


def _pairwise(vectors: Any, combine: Callable[..., Any]) -> Any:
    """An intrinsic that combines vectors 1, then 2, 4, ... apart, in place."""

    def emit(context, builder, signature, arguments):
        values = cgutils.unpack_tuple(builder, arguments[0])
        distance = 1
        while distance < len(values):
            for i in range(len(values)):
                if not i & distance:
                    pair = values[i], values[i + distance]
                    values[i], values[i + distance] = combine(builder, *pair, distance)
            distance *= 2
        return context.make_tuple(builder, signature.return_type, values)

    return vectors(vectors), emit


@_intrinsic
def butterflies(_, vectors):
    """Hadamard transform, not normalised, across a tuple of 2**k vectors."""

    def combine(builder, x, y, distance):
        return builder.fadd(x, y), builder.fsub(x, y)

    return _pairwise(vectors, combine)


@_intrinsic
def transposed(_, vectors):
    """Transposes the square that `VECTOR` vectors form."""

    def combine(builder, x, y, distance):
        # Exchanges x's odd runs of `distance` elements with y's even ones.
        lanes = range(VECTOR)
        even = [i + VECTOR - distance if i & distance else i for i in lanes]
        odd = [i + VECTOR if i & distance else i + distance for i in lanes]
        kind = ir.VectorType(ir.IntType(32), VECTOR)
        return (
            builder.shuffle_vector(x, y, ir.Constant(kind, even)),
            builder.shuffle_vector(x, y, ir.Constant(kind, odd)),
        )

    return _pairwise(vectors, combine)
