"""Words that move several adjacent elements at once, up to 128 bits: one instruction on a GPU.

They run on host addresses too, so that they can be tested without a GPU. An address must be a
multiple of the bytes moved.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate
from numba.extending import lower_builtin

from fastema.kernels import words

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _vector_pointer(context, builder, pointer, lanes):
    """Return the address as a pointer to a vector of 32-bit words, or of one smaller word."""
    size = context.get_abi_sizeof(pointer.type.pointee)
    word = min(4, size * lanes)
    whole = ir.VectorType(ir.IntType(8 * word), size * lanes // word)
    cast = builder.bitcast(pointer, whole.as_pointer())
    if words.is_cuda(context):
        cast = builder.addrspacecast(cast, whole.as_pointer(1))
    return cast, size, word


def _opaque(builder, vector):
    """Return a copy of a vector that hides the load behind it from the compiler.

    Otherwise the compiler would load narrower parts, or some parts twice. The assembler drops the
    moves.
    """
    kind = vector.type.element
    if kind.width != 32:
        return vector
    move = ir.InlineAsm(ir.FunctionType(kind, [kind]), "mov.b32 $0, $1;", "=r,r")
    for i in range(vector.type.count):
        word = builder.call(move, [builder.extract_element(vector, _I32(i))])
        vector = builder.insert_element(vector, word, _I32(i))
    return vector


def _unpack_vector(builder, vector, element, size, word, lanes):
    """Yield the elements of a vector of words."""
    for i in range(lanes):
        at = i * size
        part = builder.extract_element(vector, _I32(at // word))
        if size > word:  # an element has two words
            low, high = (
                builder.zext(builder.extract_element(vector, _I32(at // word + k)), _I64)
                for k in (0, 1)
            )
            part = builder.or_(low, builder.shl(high, _I64(32)))
        elif size < word:  # shift: extracting narrow elements would split the load
            shift = part.type(8 * (at % word))
            part = builder.trunc(builder.lshr(part, shift), ir.IntType(8 * size))
        yield builder.bitcast(part, element)


def _pack_vector(builder, parts, whole, size, word):
    """Return elements packed into a vector of words."""
    vector = ir.Constant(whole, ir.Undefined)
    bits = [builder.bitcast(part, ir.IntType(8 * size)) for part in parts]
    if size > word:
        bits = [
            builder.trunc(builder.lshr(part, _I64(shift)), _I32)
            for part in bits
            for shift in (0, 32)
        ]
    each = max(word // size, 1)
    for i in range(0, len(bits), each):
        value = builder.zext(bits[i], whole.element) if each > 1 else bits[i]
        for k in range(1, each):
            wide = builder.zext(bits[i + k], whole.element)
            value = builder.or_(value, builder.shl(wide, whole.element(8 * size * k)))
        vector = builder.insert_element(vector, value, _I32(i // each))
    return vector


def _load_word(lanes, stream):
    def load(pointer):
        return tuple(pointer.load(i) for i in range(lanes))

    load.__name__ = f"load_{lanes}_{stream}"

    def generic(self, args, kws):
        return signature(types.UniTuple(args[0].dtype, lanes), args[0])

    words.register_typing(load, AbstractTemplate, generic=generic)

    @lower_builtin(load, types.CPointer)
    def emit(context, builder, sig, args):
        address, size, word = _vector_pointer(context, builder, args[0], lanes)
        whole = builder.load(address, align=size * lanes)
        words.tag_stream(builder, whole, stream)
        if words.is_cuda(context):
            whole = _opaque(builder, whole)
        element = args[0].type.pointee
        parts = list(_unpack_vector(builder, whole, element, size, word, lanes))
        return context.make_tuple(builder, sig.return_type, parts)

    return load


def _store_word(lanes, stream):
    def store(pointer, values):
        for i, value in enumerate(values):
            pointer.store(i, value)

    store.__name__ = f"store_{lanes}_{stream}"

    def generic(self, args, kws):
        return signature(types.void, args[0], types.UniTuple(args[0].dtype, lanes))

    words.register_typing(store, AbstractTemplate, generic=generic)

    @lower_builtin(store, types.CPointer, types.UniTuple)
    def emit(context, builder, sig, args):
        pointer, values = args
        address, size, word = _vector_pointer(context, builder, pointer, lanes)
        parts = [builder.extract_value(values, i) for i in range(lanes)]
        vector = _pack_vector(builder, parts, address.type.pointee, size, word)
        written = builder.store(vector, address, align=size * lanes)
        words.tag_stream(builder, written, stream)
        return context.get_dummy_value()

    return store


LANES = (2, 4, 8, 16)

LOADS = {(n, s): _load_word(n, s) for n in LANES for s in words.STREAMS}
STORES = {(n, s): _store_word(n, s) for n in LANES for s in words.STREAMS}
"""Words by (elements, stream): ``load(pointer)`` and ``store(pointer, values)``."""
