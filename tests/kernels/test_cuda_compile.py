"""The GPU kernels compile without a GPU: 128 bits at a time, few registers, nothing spilled."""

import gc
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import pytest

from bench.gpu import disassembly
from bench.questions import kernels_gpu
from fastema.kernels import cuda
from fastema.kernels.variants import CLOCK

from ..support.requirements import require

NEEDS = ("numba_cuda", "cuda.core")


require(disassembly.disassembler(), "nvdisasm")

# Every operation, format and architecture, in some kernel; every kernel where all are asked for.
pytestmark = pytest.mark.each_value

ARCHITECTURES = (75, 80, 90, 100, 120)
USUAL = 90

REALS = ("f64", "f32", "f16", "bf16")
NARROW = ("f32", "f16", "bf16")
FORMS = (*REALS, "f16~", "bf16~", "bf16+16")
RAW = ("raw1", "raw2", "raw4", "raw8")

Kernel = tuple[str, tuple[str, ...]]
"""An operation and its formats."""


def kernels(*several: str) -> list[Kernel]:
    """Kernels as text: an operation and its formats, with spaces between them."""
    return [(operation, tuple(formats)) for operation, *formats in map(str.split, several)]


PLAIN = kernels(
    *(f"lerp {dst} {src}" for dst in NARROW for src in NARROW),
    *(f"{operation} {raw} {raw}" for operation in ("copy", "swap") for raw in RAW),
    *("park raw4 raw2", "unpark raw4 raw2"),
)
"""What most launches are: for every architecture."""

EACH_KIND = kernels(
    *("lerp f64 f64", "lerp bf16~ bf16", "lerp f16~ f32", "lerp bf16+16 bf16"),
    *("lerp_measured f32 bf16", "copy f32 bf16", "cast_back bf16+16 f32", "swap bf16+16 raw4"),
    *("add f64 f32", "finite f32 bf16", "window f32 f32 f32 f32"),
)
"""So are these, one of each kind of the others."""

OTHERS = kernels(
    *(f"lerp {dst} {src}" for dst in FORMS for src in REALS),
    *(f"lerp_measured {dst} bf16" for dst in FORMS),
    *("lerp_measured f32 f32", "add f32 bf16"),
    *(f"copy {dst} {src}" for dst in (*REALS, "bf16+16") for src in REALS if dst != src),
    *(f"cast_back bf16+16 {src}" for src in REALS),
    *("cast_back f64 f32", "cast_back f32 f16", "cast_back f16 bf16", "cast_back bf16 f32"),
    *(f"swap {dst} {src}" for dst in REALS for src in REALS if dst != src),
    *(f"add f64 {src}" for src in REALS),
    *("finite f64 f64", "finite f64 bf16", *(f"finite f32 {src}" for src in NARROW)),
    *(f"window {real}~ {real} {real} f32" for real in ("f16", "bf16")),
    *("window f64 f64 f64 f64", "window f32 bf16 bf16 f32", "window f32 f32 bf16 f32"),
    "window f32 f64 f64 f64",
)

USUAL_KERNELS = kernels(
    *("lerp f32 bf16", "lerp_measured f32 bf16", "copy f32 bf16", "swap raw4 raw4"),
    *("add f64 f32", "finite f32 bf16"),
)
"""One of each family, in the fast tests."""

READS_AND_WRITES = {
    **dict.fromkeys(("lerp", "lerp_measured", "add"), ("ds", "d")),
    **dict.fromkeys(("swap", "park", "unpark"), ("ds", "ds")),
    "copy": ("s", "d"),
    "cast_back": ("d", "s"),
    "finite": ("s", ""),
}
"""Of d, the written side (with its companion, where it has one), and s, the other side."""

SIZES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "raw1": 1, "raw2": 2, "raw4": 4, "raw8": 8}


class Variant(NamedTuple):
    """What is compiled, as `cuda.compile_kernel` takes it."""

    operation: str
    formats: tuple[str, ...]
    layout: str
    capability: tuple[int, int]


def variants(several: Iterable[Kernel], layout: str, architectures: Sequence[int]) -> list[Variant]:
    return [
        Variant(*kernel, layout, divmod(architecture, 10))
        for kernel in several
        for architecture in architectures
    ]


def listed(every: Iterable[Variant], usual: Iterable[Kernel]) -> list[object]:
    """Each variant once, all slow but those of some kernels for the usual architecture."""
    fast = {one for layout in ("", "flat", "strided") for one in variants(usual, layout, [USUAL])}
    return [
        pytest.param(
            one,
            id="-".join((one.operation, *one.formats, one.layout, f"sm_{major}{minor}")),
            marks=[] if one in fast else pytest.mark.slow,
        )
        for one in dict.fromkeys(every)
        for major, minor in [one.capability]
    ]


def most_registers(
    operation: str, formats: Sequence[str], layout: str, capability: tuple[int, int]
) -> int:
    """With 32, or 40 or 64 where there are fewer threads, a multiprocessor can be full.

    What more buys is that nothing is spilled.
    """
    if operation in ("window", "advance", "lerp_measured") or capability == (7, 5):
        return 64
    if layout == "strided" and formats[0].endswith("~"):  # for adjacent elements too
        return 48
    if "f64" in formats or formats[0].endswith("~") or capability == (12, 0):
        return 40
    if (operation, formats[0]) == ("swap", "bf16+16"):
        return 40
    return 32


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[Variant], cuda.Binary]]:
    """Kernels, each compiled once, by another process: compilers do not give memory back."""
    context = multiprocessing.get_context("spawn")
    # A tenth of the time would be spent on looking for garbage.
    with context.Pool(1, initializer=gc.disable) as pool:

        @cache
        def made(variant: Variant) -> cuda.Binary:
            return pool.apply_async(cuda.compile_kernel, tuple(variant)).get(timeout=900)

        yield made


@lru_cache(maxsize=1)
def disassembled(cubin: bytes) -> disassembly.Code:
    return disassembly.disassembled(cubin)


def bits_moved(sides: str, formats: Sequence[str], elements: int = 1) -> Counter[int]:
    """The accesses that some adjacent elements need, by their bits."""
    moved: Counter[int] = Counter()
    for side, form in zip("ds", formats, strict=True):
        if side in sides:
            size = SIZES[form.partition("+")[0].strip("~")]
            moved[8 * elements * size] += 2 if "+" in form else 1
    return moved


def times(part: Counter[int], moved: Counter[int]) -> int:
    """How many times a part makes up all that is moved; 0 if it does not."""
    for bits, count in part.items():
        many = moved[bits] // count
        return many if moved == Counter({b: many * n for b, n in part.items()}) else 0
    return 0


def check_report(made: cuda.Binary, variant: Variant) -> None:
    operation, formats, layout, capability = variant
    assert made.cubin[:4] == b"\x7fELF"
    assert (made.stack, made.spilled) == (0, 0)
    assert 0 < made.registers <= most_registers(operation, formats, layout, capability)


def wide_loops(made: cuda.Binary) -> list[list[disassembly.Instruction]]:
    """The loops that move 128 bits at a time; nothing may be in local memory."""
    code = disassembled(made.cubin)
    assert not [one for one in code.instructions if one.name in ("LDL", "STL")]
    found = [
        loop
        for loop in code.loops()
        if any(one.bits == 128 for one in loop if one.name in ("LDG", "STG"))
    ]
    assert found
    return found


def check_code(made: cuda.Binary, variant: Variant) -> None:
    """A loop moves every stream at once, of as many elements as fill 128 bits of the widest."""
    operation, formats, *_ = variant
    reads, writes = READS_AND_WRITES[operation]
    elements = 128 // max(bits_moved(reads + writes, formats))
    full = 0
    for loop in wide_loops(made):
        loads, stores = disassembly.accesses(loop, "LDG"), disassembly.accesses(loop, "STG")
        unrolled = times(bits_moved(reads, formats, elements), loads)
        if unrolled:
            assert not writes or times(bits_moved(writes, formats, elements), stores) == unrolled
            assert bool(writes) == bool(stores)
            full += 1
            if operation == "lerp":
                check_lerp(loop, formats, unrolled * elements)
        else:  # with a weight of 1 it is a copy
            assert operation == "lerp"
            assert times(bits_moved("s", formats, elements), loads)
            assert times(bits_moved("d", formats, elements), stores)
    assert full


def check_lerp(loop: list[disassembly.Instruction], formats: Sequence[str], elements: int) -> None:
    """One subtraction and one fused multiply-add per element, and no other product."""
    count = Counter(one.name for one in loop)
    kind = "D" if "f64" in formats else "F"
    assert count[f"{kind}FMA"] == elements
    assert not count[f"{kind}MUL"]
    if formats[0] != "f16~":  # whose rounding adds too
        # The newest toolkit subtracts a half from a float32 at once (FHADD), rounding as FADD does.
        assert count[f"{kind}ADD"] + count["FHADD"] == elements


FLAT = variants(PLAIN + EACH_KIND, "flat", ARCHITECTURES) + variants(OTHERS, "flat", [USUAL])
SPACED = variants(
    [*PLAIN, *EACH_KIND, *(one for one in OTHERS if one[0] == "lerp")], "strided", [USUAL]
)
CLOCKS = variants([(CLOCK, ())], "", ARCHITECTURES)


@pytest.mark.parametrize("variant", listed(FLAT, USUAL_KERNELS))
def test_kernels_of_adjacent_elements_move_128_bits_at_a_time(
    variant: Variant, compiled: Callable[[Variant], cuda.Binary]
) -> None:
    made = compiled(variant)
    check_report(made, variant)
    assert not re.search(r"\b(add|sub|mul|mad)\.f(32|64)\b", made.ptx)  # or they could be fused
    if variant.operation != "window":
        check_code(made, variant)
    else:  # many loops, each with streams of its own
        kinds = [{one.name for one in loop if one.bits == 128} for loop in wide_loops(made)]
        assert any(kind >= {"LDG", "STG"} for kind in kinds)


@pytest.mark.parametrize("variant", listed(SPACED, USUAL_KERNELS[:1]))
def test_kernels_of_spaced_elements_spill_nothing(
    variant: Variant, compiled: Callable[[Variant], cuda.Binary]
) -> None:
    check_report(compiled(variant), variant)


@pytest.mark.parametrize("variant", listed(CLOCKS, [(CLOCK, ())]))
def test_the_clock_spills_nothing(
    variant: Variant, compiled: Callable[[Variant], cuda.Binary]
) -> None:
    made = compiled(variant)
    check_report(made, variant)
    names = {one.name for one in disassembled(made.cubin).instructions}
    assert "BAR" in names
    assert not names & {"LDL", "STL"}


def test_the_table_of_the_benchmarks_counts_what_is_in_the_code(
    compiled: Callable[[Variant], cuda.Binary],
) -> None:
    (variant,) = variants([("lerp", ("f32", "bf16"))], "flat", [USUAL])
    operation, formats, _, capability = variant
    row = kernels_gpu.row((operation, formats), capability, compiled(variant))
    assert (row["bytes"], row["loop_elements"]) == (10, 4)
    assert (row["loads"], row["stores"]) == ({64: 1, 128: 1}, {128: 1})
    assert kernels_gpu.accesses(row["loads"]) == "128 + 64"
    assert row["loop"]["FFMA"] == row["loop"]["FADD"] == 4
    assert sum(row["loop"].values()) == row["loop_instructions"] < row["instructions"]
