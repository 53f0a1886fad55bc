"""CPU kernels: loops over the rows of a table and over the elements of a row.

A kernel is ``_over_rows(body)``, compiled. Its body is mostly a walk: it loads what a step reads,
applies the step, stores what it writes, and returns the sum of what it finds. Anything that a step
does not use, including random bits and the sum, costs nothing.
"""

from __future__ import annotations

from fastema.kernels import scalar, steps
from fastema.kernels import table as abi
from fastema.kernels.cpu_run import run_launches, run_program
from fastema.kernels.cpu_series import ewm_mean, rolling_mean
from fastema.kernels.cpu_watch import check_tensors
from fastema.kernels.jit import device_fn
from fastema.kernels.operations import OPERATIONS
from fastema.kernels.rows import (
    index_map,
    load_addresses,
    make_element_step,
    row_key,
    streams,
    window_body,
)
from fastema.kernels.steps import Step
from fastema.kernels.words import (
    add32,
    fetch_add,
    load,
    low32,
    pointer_f64,
    pointer_i64,
    prefetch,
    store,
    sum_any_order,
)


def function(operation: str, formats: tuple[str, ...], layout: str):
    """Return the Python function that :func:`fastema.kernels.jit.compiled` compiles to a kernel.

    ``formats`` are those of the written side, the other side, and so on. A function that does not
    work on pairs of tensors has no formats and no layout.
    """
    if operation in _OTHERS:
        return _OTHERS[operation]
    step = getattr(steps, operation)(*formats, device="cpu")
    if OPERATIONS[operation].needs_ring:
        return _over_rows(_windowed(step, layout))
    if OPERATIONS[operation].counts:
        return _over_rows(_counting(step, layout))
    return _over_rows(_plain(step, layout))


def _over_rows(body):
    """Return a kernel that runs ``body(cells, at, numbers, settings)`` for each row that it claims.

    ``cells`` is the table, ``at`` the index of the row's first cell, ``settings`` the control
    block.
    """

    def rows_loop(table, rows, numbers, control):
        cells, settings = pointer_i64(table), pointer_i64(control)
        values = pointer_f64(numbers)
        claim = load(settings, abi.CLAIM)
        first = fetch_add(control + 8 * abi.NEXT, claim)
        while first < rows:
            for row in range(claim):
                body(cells, (first + row) * abi.COLUMNS, values, settings)
            first = fetch_add(control + 8 * abi.NEXT, claim)

    return rows_loop


@device_fn
def _number(cells, at, numbers):
    """Return the number of a row's average: its weight, or the values in a windowed mean."""
    return load(numbers, load(cells, at + abi.AVERAGE))


def _plain(step: Step, layout: str):
    walk, convert = _WALKS[layout](step), step.number

    @device_fn
    def body(cells, at, numbers, settings):
        walk(cells, at, convert(_number(cells, at, numbers)), 0, settings)

    return body


def _counting(step: Step, layout: str):
    """Return a body that also writes the sum of its row to the address in the control block."""
    walk, convert = _WALKS[layout](step, 4 * abi.BLOCK), step.number

    @device_fn
    def body(cells, at, numbers, settings):
        found = walk(cells, at, convert(_number(cells, at, numbers)), 0, settings)
        store(pointer_f64(load(settings, abi.RESULTS)), at // abi.COLUMNS, found)

    return body


def _windowed(parts: steps.WindowSteps, layout: str):
    update = window_body([_WALKS[layout](step) for step in parts], parts.slide.real)

    @device_fn
    def body(cells, at, numbers, settings):
        window, slot = load(settings, abi.WINDOW), load(settings, abi.SLOT)
        number, turn = _number(cells, at, numbers), load(settings, abi.TURN)
        update(cells, at, number, window, slot, turn, settings)

    return body


def _flat(step: Step, size: int = abi.BLOCK):
    """Return a walk over elements that are adjacent on both sides.

    Blocks of constant length and a prefetch in each stream overlap the arithmetic of 16-bit
    averages with memory traffic: measured gains are 25-45 % on Intel, none on AMD. Wider averages
    have little arithmetic, and there a prefetch far ahead costs 15 % on AMD. But without any LLVM
    would load 1 KB of one stream before the next one, which is 10 % slower than line by line. The
    sum leaves the vector registers at the end of each block, so counting kernels use larger blocks.
    """
    pointers, sizes = streams([step])
    to_pointer, residual_pointer, ring_pointer, of_pointer = pointers
    lines, ahead = size // abi.BLOCK, abi.PREFETCH if sizes[0] == 2 else abi.LINE
    to_size, residual_size, ring_size, of_size = sizes
    element, total = make_element_step(step), step.real

    @device_fn
    def walk(cells, at, w, slot, settings):
        dst_address, residual_address, ring_address, src_address = load_addresses(cells, at, slot)
        to, residual = to_pointer(dst_address), residual_pointer(residual_address)
        ring, of = ring_pointer(ring_address), of_pointer(src_address)
        key = row_key(cells, at, load(settings, abi.SEED), load(settings, abi.STEP))
        second = scalar.mix32(key)
        index = low32(load(cells, at + abi.INDEX))
        count = load(cells, at + abi.COUNT)
        found = 0.0
        blocks = count // size
        for block in range(blocks):
            first = block * size
            in_block = total(0)
            for line in range(lines * to_size):
                prefetch(dst_address + first * to_size + ahead + line * abi.LINE)
            for line in range(lines * residual_size):
                prefetch(residual_address + first * residual_size + ahead + line * abi.LINE)
            for line in range(lines * ring_size):
                prefetch(ring_address + first * ring_size + ahead + line * abi.LINE)
            for line in range(lines * of_size):
                prefetch(src_address + first * of_size + ahead + line * abi.LINE)
            counter = scalar.word_counter(add32(index, low32(first)), key)
            for k in range(size):
                word = scalar.random_word(counter, second)
                counter = add32(counter, scalar.WORD_STRIDE)
                one = element(to, residual, ring, of, first + k, first + k, w, word)
                in_block = sum_any_order(in_block, one)
            found += in_block
        for i in range(blocks * size, count):
            counter = scalar.word_counter(add32(index, low32(i)), key)
            word = scalar.random_word(counter, second)
            found += element(to, residual, ring, of, i, i, w, word)
        return found

    return walk


def _strided(step: Step, size: int = abi.BLOCK):
    """Return a walk over elements with any step between them, given per row and side.

    LLVM vectorizes it for steps of 1, where only the indices jump: measured at 0.32 ns per element
    in cache with bf16 averages of bf16, against 0.22 ns for a flat walk.
    """
    to_pointer, residual_pointer, ring_pointer, of_pointer = streams([step])[0]
    element = make_element_step(step)

    @device_fn
    def walk(cells, at, w, slot, settings):
        dst_address, residual_address, ring_address, src_address = load_addresses(cells, at, slot)
        to, residual = to_pointer(dst_address), residual_pointer(residual_address)
        ring, of = ring_pointer(ring_address), of_pointer(src_address)
        to_step, of_step = load(cells, at + abi.DST_STEP), load(cells, at + abi.SRC_STEP)
        key = row_key(cells, at, load(settings, abi.SEED), load(settings, abi.STEP))
        second = scalar.mix32(key)
        first, step, rise, inverse = index_map(cells, at)
        found = 0.0
        for i in range(load(cells, at + abi.COUNT)):
            index = scalar.index_of(low32(i), first, step, rise, inverse)
            word = scalar.random_word(scalar.word_counter(index, key), second)
            found += element(to, residual, ring, of, i * to_step, i * of_step, w, word)
        return found

    return walk


_OTHERS = {
    one.__name__: one for one in (check_tensors, run_launches, run_program, rolling_mean, ewm_mean)
}
"""Functions that do not work on pairs of tensors."""

_WALKS = {"flat": _flat, "strided": _strided}
