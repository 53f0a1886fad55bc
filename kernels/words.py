"""The words that kernel math is written in, each with a Python and a CPU meaning.

Numba widens ``uint32 op uint32`` to 64 bits, which halves the lanes of a vector loop. On the CPU
it lacks bfloat16, half precision, fma, prefetch and an atomic add. A word closes one of these gaps.
It is an ordinary Python function on NumPy scalars, which defines it and runs under
``NUMBA_DISABLE_JIT=1``, together with the one LLVM instruction that replaces it in a kernel.

Bits are ``uint16``/``uint32``; floats are ``float32``/``float64`` and keep their type.
"""

from __future__ import annotations

import ctypes
import math
import operator
from fractions import Fraction

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, ConcreteTemplate, infer_global
from numba.extending import lower_builtin
from numba.np.numpy_support import as_dtype

_u8, _u16, _u32, _i32, _i64 = types.uint8, types.uint16, types.uint32, types.int32, types.int64
_f32, _f64, _bool = types.float32, types.float64, types.boolean
_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()


def _word(*signatures, llvm):
    """Return a decorator that gives a Python function its typing and its instruction in kernels.

    ``llvm(builder, *values)`` emits the instruction and returns its value, or ``None`` for a void.
    """

    def register(python):
        register_typing(python, ConcreteTemplate, cases=list(signatures))
        for one in signatures:
            _lower(python, one.args, llvm)
        return python

    return register


def register_typing(python, template, **members):
    """Register a Python function with Numba's typing, for every target."""
    made = type(python.__name__, (template,), {"key": python, **members})
    infer_global(python, types.Function(made))


def _lower(python, arg_types, llvm):
    @lower_builtin(python, *arg_types)
    def emit(context, builder, sig, args):
        value = llvm(builder, *args)
        return context.get_dummy_value() if value is None else value


def _address(builder, value, pointee):
    return builder.inttoptr(value, pointee.as_pointer())


# -- 32-bit integers that stay 32 bits ------------------------------------------------------------


def _word32(name, python, llvm):
    """Return the word of a binary operation on ``uint32``, modulo 2**32."""

    def word(x, y):
        return np.uint32(python(int(x), int(y)) & 0xFFFFFFFF)

    word.__name__ = word.__qualname__ = name
    return _word(_u32(_u32, _u32), llvm=llvm)(word)


add32 = _word32("add32", operator.add, ir.IRBuilder.add)
sub32 = _word32("sub32", operator.sub, ir.IRBuilder.sub)
mul32 = _word32("mul32", operator.mul, ir.IRBuilder.mul)
and32 = _word32("and32", operator.and_, ir.IRBuilder.and_)
or32 = _word32("or32", operator.or_, ir.IRBuilder.or_)
xor32 = _word32("xor32", operator.xor, ir.IRBuilder.xor)
shl32 = _word32("shl32", operator.lshift, ir.IRBuilder.shl)  # by 0 to 31 bits
shr32 = _word32("shr32", operator.rshift, ir.IRBuilder.lshr)  # by 0 to 31 bits, filled with zeros


@_word(_bool(_u32, _u32), llvm=lambda b, x, y: b.icmp_unsigned(">", x, y))
def above32(x, y):
    """Return ``x > y``, unsigned."""
    return int(x) > int(y)


@_word(_u32(_bool, _u32, _u32), llvm=lambda b, c, x, y: b.select(c, x, y))
def select32(condition, x, y):
    """Return ``x`` if the condition holds, otherwise ``y``; both are evaluated."""
    return x if condition else y


@_word(_u32(_u16), llvm=lambda b, x: b.zext(x, _I32))
def widen16(x):
    """Return a 16-bit word as a 32-bit word."""
    return np.uint32(x)


@_word(_u32(_i64), llvm=lambda b, x: b.trunc(x, _I32))
def low32(x):
    """Return the low half of a 64-bit integer."""
    return np.uint32(int(x) & 0xFFFFFFFF)


@_word(_u32(_i64), llvm=lambda b, x: b.trunc(b.lshr(x, _I64(32)), _I32))
def high32(x):
    """Return the high half of a 64-bit integer."""
    return np.uint32((int(x) >> 32) & 0xFFFFFFFF)


@_word(_u16(_u32), llvm=lambda b, x: b.trunc(x, _I16))
def narrow16(x):
    """Return the low 16 bits."""
    return np.uint16(int(x) & 0xFFFF)


# -- floats and their bits ------------------------------------------------------------------------


@_word(_u32(_f32), llvm=lambda b, x: b.bitcast(x, _I32))
def bits32(x):
    """Return the bits of a float32."""
    return np.float32(x).view(np.uint32)


@_word(_f32(_u32), llvm=lambda b, x: b.bitcast(x, _FLOAT))
def float_of_bits32(x):
    """Return the float32 with these bits."""
    return np.uint32(x).view(np.float32)


@_word(_f32(_u32), llvm=lambda b, x: b.sitofp(x, _FLOAT))
def float_of_signed(x):
    """Return the float32 nearest to a 32-bit word that is read as a signed integer."""
    return np.float32(np.uint32(x).view(np.int32))


@_word(_u32(_f32), llvm=lambda b, x: b.fptosi(x, _I32))
def int_of_float(x):
    """Return the integer part of a float32 in [0, 2**31)."""
    return np.uint32(int(x))


@_word(_f32(_u16), llvm=lambda b, x: b.fpext(b.bitcast(x, _HALF), _FLOAT))
def half_to_float(x):
    """Return the float32 equal to the half-precision number with these bits, by hardware."""
    return np.float32(np.uint16(x).view(np.float16))


@_word(_u16(_f32), llvm=lambda b, x: b.bitcast(b.fptrunc(x, _HALF), _I16))
def float_to_half(x):
    """Return the bits of the nearest half-precision number, ties to even, by hardware."""
    with np.errstate(over="ignore"):
        return np.float16(np.float32(x)).view(np.uint16)


def _round_to_odd_sum(x: float, y: float) -> float:
    """Return ``x + y`` in float64, with an odd last bit if inexact.

    Rounding the result again, to float32, equals rounding the exact sum (53 >= 2 * 24 + 2 bits).
    """
    total = x + y
    if not math.isfinite(total):
        return total
    part = total - x
    error = (x - (total - part)) + (y - part)
    if error and not np.float64(total).view(np.uint64) & np.uint64(1):
        return math.nextafter(total, math.copysign(math.inf, error))
    return total


def _fma64(x: float, y: float, z: float) -> float:
    if not (math.isfinite(x) and math.isfinite(y)):
        with np.errstate(invalid="ignore"):
            return float(np.float64(x) * np.float64(y) + np.float64(z))
    if not math.isfinite(z):
        return z  # the product is finite, though it may be too large for a float64
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    try:
        return float(exact) if exact else x * y + z
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


@_word(_f32(_f32, _f32, _f32), _f64(_f64, _f64, _f64), llvm=lambda b, x, y, z: b.fma(x, y, z))
def fma(x, y, z):
    """Return ``x * y + z``, rounded once, in the type of the arguments."""
    if isinstance(x, np.float32):
        with np.errstate(over="ignore", invalid="ignore"):
            return np.float32(_round_to_odd_sum(float(x) * float(y), float(z)))
    return np.float64(_fma64(float(x), float(y), float(z)))


@_word(
    _f32(_f32),
    _f64(_f64),
    llvm=lambda b, x: b.select(b.fcmp_ordered("==", x, x), x, ir.Constant(x.type, 0.0)),
)
def nan_to_zero(x):
    """Return ``x``, or a zero of its type if ``x`` is NaN."""
    return x if x == x else type(x)(0)


@_word(
    _f32(_f32, _f32),
    _f64(_f64, _f64),
    llvm=lambda b, x, y: b.fadd(x, y, flags=("reassoc", "nsz")),
)
def sum_any_order(x, y):
    """Return ``x + y``; unlike all other sums, the compiler may reorder it to use vectors."""
    return x + y


# -- memory ---------------------------------------------------------------------------------------
# The streams of a kernel never overlap (the layout refuses it): the written side, the other side,
# the written side's residual, and the ring. Saying so on every load and store saves a run-time test
# per block in vector loops.


class _Pointer:
    """An address with an element type, for kernels that run as Python."""

    def __init__(self, address, c_type, scalar):
        self.cells = ctypes.cast(int(address), ctypes.POINTER(c_type))
        self.scalar = scalar

    def load(self, i):
        return self.scalar(self.cells[int(i)])

    def store(self, i, value):
        self.cells[int(i)] = getattr(value, "item", lambda: value)()


def _pointer_word(name, numba_type, pointee, c_type):
    scalar = as_dtype(numba_type).type

    def pointer(address):
        return _Pointer(address, c_type, scalar)

    pointer.__name__ = pointer.__qualname__ = name
    kind = types.CPointer(numba_type)
    return _word(kind(_i64), llvm=lambda b, address: _address(b, address, pointee))(pointer)


pointer_u8 = _pointer_word("pointer_u8", _u8, _I8, ctypes.c_uint8)
pointer_u16 = _pointer_word("pointer_u16", _u16, _I16, ctypes.c_uint16)
pointer_u32 = _pointer_word("pointer_u32", _u32, _I32, ctypes.c_uint32)
pointer_i64 = _pointer_word("pointer_i64", _i64, _I64, ctypes.c_int64)
pointer_f32 = _pointer_word("pointer_f32", _f32, _FLOAT, ctypes.c_float)
pointer_f64 = _pointer_word("pointer_f64", _f64, ir.DoubleType(), ctypes.c_double)


STREAMS = ("dst", "src", "residual", "ring")


def tag_stream(builder, instruction, stream):
    """Tell LLVM that a load or a store accesses one stream and no other."""
    module = builder.module
    domain = module.add_metadata(["fastema"])
    scopes = {name: module.add_metadata([name, domain]) for name in STREAMS}
    others = [scope for name, scope in scopes.items() if name != stream]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
    instruction.set_metadata("noalias", module.add_metadata(others))


def is_cuda(context):
    """Return whether code is generated for a GPU."""
    return type(context).__name__ == "CUDATargetContext"


def float_to_bf16(x):
    """Return the bits of the nearest bfloat16, ties to even, and 0x7FFF for a NaN.

    This is one instruction on a GPU. The CPU needs about eight, and keeps a NaN's payload
    (``scalar.encode_bf16``).
    """
    bits = int(np.float32(x).view(np.uint32))
    nan = bits & 0x7FFFFFFF > 0x7F800000
    return np.uint16(0x7FFF if nan else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


register_typing(float_to_bf16, ConcreteTemplate, cases=[_u16(_f32)])


@lower_builtin(float_to_bf16, _f32)
def _(context, builder, sig, args):
    (x,) = args
    if is_cuda(context):
        kind = ir.FunctionType(_I16, [_FLOAT])
        return builder.call(ir.InlineAsm(kind, "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [x])
    bits = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))
    whole = builder.select(builder.fcmp_unordered("uno", x, x), _I32(0x7FFF), rounded)
    return builder.trunc(whole, _I16)


def _element_of(context, builder, pointer, i):
    """Return the address of an element; on a GPU, as an address in global memory."""
    if is_cuda(context):
        pointer = builder.addrspacecast(pointer, pointer.type.pointee.as_pointer(1))
    return builder.gep(pointer, [i])


def _load_word(name, stream=None):
    def load(pointer, i):
        return pointer.load(i)

    def generic(self, args, kws):
        return signature(args[0].dtype, args[0], _i64)

    load.__name__ = load.__qualname__ = name
    register_typing(load, AbstractTemplate, generic=generic)

    @lower_builtin(load, types.CPointer, _i64)
    def emit(context, builder, sig, args):
        value = builder.load(_element_of(context, builder, *args))
        if stream is not None:
            tag_stream(builder, value, stream)
        return value

    return load


def _store_word(name, stream=None):
    def store(pointer, i, value):
        pointer.store(i, value)

    def generic(self, args, kws):
        return signature(types.void, args[0], _i64, args[0].dtype)

    store.__name__ = store.__qualname__ = name
    register_typing(store, AbstractTemplate, generic=generic)

    @lower_builtin(store, types.CPointer, _i64, types.Any)
    def emit(context, builder, sig, args):
        pointer, i, value = args
        written = builder.store(value, _element_of(context, builder, pointer, i))
        if stream is not None:
            tag_stream(builder, written, stream)
        return context.get_dummy_value()

    return store


# Element i of tables, control blocks and scratch areas; then of each stream.
load, store = _load_word("load"), _store_word("store")
load_dst, load_src, load_residual, load_ring = (_load_word(f"load_{one}", one) for one in STREAMS)
store_dst, store_src, store_residual, store_ring = (
    _store_word(f"store_{one}", one) for one in STREAMS
)


def _prefetch(builder, address):
    byte_pointer = _I8.as_pointer()
    function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32]),
        "llvm.prefetch.p0",
    )
    read, keep, data = _I32(0), _I32(3), _I32(1)
    builder.call(function, [builder.inttoptr(address, byte_pointer), read, keep, data])


@_word(types.void(_i64), llvm=_prefetch)
def prefetch(address):
    """Prefetch the cache line at an address; any address is harmless."""


@_word(
    _i64(_i64, _i64),
    llvm=lambda b, address, n: b.atomic_rmw("add", _address(b, address, _I64), n, "monotonic"),
)
def fetch_add(address, n):
    """Add ``n`` atomically to the int64 at an address; return its value before."""
    cell = ctypes.c_int64.from_address(int(address))
    before = cell.value
    cell.value = before + int(n)
    return before


# -- calls into C ---------------------------------------------------------------------------------


def _call(builder, function, *args):
    kind = ir.FunctionType(_I32, [_I64] * len(args))
    return builder.call(_address(builder, function, kind), args)


def _call_long(builder, function, *args):
    kind = ir.FunctionType(_I64, [_I64] * len(args))
    return builder.call(_address(builder, function, kind), args)


@_word(*[_i64(*[_i64] * (1 + count)) for count in range(5)], llvm=_call_long)
def call_long(function, *args):
    """Call a C function of up to four pointers or integers that returns a 64-bit integer."""
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(args))
    return prototype(int(function))(*map(int, args))


@_word(_i32(_i64, _i64, _i64, _i64, _i64), llvm=_call)
def call(function, a, b, c, d):
    """Call a C function of up to four pointers that returns an int; the GIL must be held."""
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    return prototype(int(function))(int(a), int(b), int(c), int(d))
