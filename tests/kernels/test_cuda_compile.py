"""GPU kernels, compiled without a GPU: 128-bit accesses, few registers, no spills."""

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


require(disassembly.find_nvdisasm(), "nvdisasm")

# Each operation, format and architecture is in some kernel that runs; full runs take them all.
pytestmark = pytest.mark.each_value

ARCHITECTURES = (75, 80, 90, 100, 120)
USUAL = 90

REALS = ("f64", "f32", "f16", "bf16")
NARROW = ("f32", "f16", "bf16")
FORMS = (*REALS, "f16~", "bf16~", "bf16+16")
RAW = ("raw1", "raw2", "raw4", "raw8")

Kernel = tuple[str, tuple[str, ...]]
"""An operation and its formats."""


def parse_kernels(*several: str) -> list[Kernel]:
    """Parse kernels from text: an operation and its formats, separated by spaces."""
    return [(operation, tuple(formats)) for operation, *formats in map(str.split, several)]


PLAIN = parse_kernels(
    *(f"lerp {dst} {src}" for dst in NARROW for src in NARROW),
    *(f"{operation} {raw} {raw}" for operation in ("copy", "swap") for raw in RAW),
    *("park raw4 raw2", "unpark raw4 raw2"),
)
"""The kernels of most launches, compiled for every architecture."""

EACH_KIND = parse_kernels(
    *("lerp f64 f64", "lerp bf16~ bf16", "lerp f16~ f32", "lerp bf16+16 bf16"),
    *("copy f32 bf16", "cast_back bf16+16 f32", "swap bf16+16 raw4"),
    *("add f64 f32", "finite f32 bf16", "window f32 f32 f32 f32"),
)
"""One of each other kind of kernel, also compiled for every architecture."""

OTHERS = parse_kernels(
    *(f"lerp {dst} {src}" for dst in FORMS for src in REALS),
    "add f32 bf16",
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

USUAL_KERNELS = parse_kernels(
    *("lerp f32 bf16", "copy f32 bf16", "swap raw4 raw4"),
    *("add f64 f32", "finite f32 bf16"),
)
"""One kernel of each family, for the fast tests."""

READS_AND_WRITES = {
    **dict.fromkeys(("lerp", "add"), ("ds", "d")),
    **dict.fromkeys(("swap", "park", "unpark"), ("ds", "ds")),
    "copy": ("s", "d"),
    "cast_back": ("d", "s"),
    "finite": ("s", ""),
}
"""Sides read and written: d is the destination, with its companion if any, and s the source."""

SIZES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "raw1": 1, "raw2": 2, "raw4": 4, "raw8": 8}


class Variant(NamedTuple):
    """The arguments of `cuda.compile_kernel`."""

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


def variant_params(every: Iterable[Variant], usual: Iterable[Kernel]) -> list[object]:
    """Return each variant once, marked slow unless of a usual kernel and architecture."""
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


def max_registers(
    operation: str, formats: Sequence[str], layout: str, capability: tuple[int, int]
) -> int:
    """Return the most registers that a thread may use.

    32 let a multiprocessor be full, as do 40 or 64 with fewer threads; more avoid spills.
    """
    if operation in ("window", "advance") or capability == (7, 5):
        return 64
    if formats[0].endswith("~"):  # strided kernels also run adjacent elements
        return 56 if layout == "strided" or formats[1] == "bf16" else 48
    if "f64" in formats or capability == (12, 0):
        return 40
    if (operation, formats[0]) == ("swap", "bf16+16"):
        return 40
    return 32


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[Variant], cuda.Binary]]:
    """Compile each kernel once, in another process, because compilers never free memory."""
    context = multiprocessing.get_context("spawn")
    # Garbage collection would take a tenth of the time.
    with context.Pool(1, initializer=gc.disable) as pool:

        @cache
        def compile_once(variant: Variant) -> cuda.Binary:
            return pool.apply_async(cuda.compile_kernel, tuple(variant)).get(timeout=900)

        yield compile_once


@lru_cache(maxsize=1)
def disassemble(cubin: bytes) -> disassembly.Code:
    return disassembly.disassemble_cubin(cubin)


def bits_moved(sides: str, formats: Sequence[str], elements: int = 1) -> Counter[int]:
    """Count the accesses that adjacent elements need, by their width in bits."""
    moved: Counter[int] = Counter()
    for side, form in zip("ds", formats, strict=True):
        if side in sides:
            size = SIZES[form.partition("+")[0].strip("~")]
            moved[8 * elements * size] += 2 if "+" in form else 1
    return moved


def repeats(part: Counter[int], moved: Counter[int]) -> int:
    """Return how many repeats of ``part`` equal ``moved``; 0 if no number does."""
    for bits, count in part.items():
        many = moved[bits] // count
        return many if moved == Counter({b: many * n for b, n in part.items()}) else 0
    return 0


def check_resources(made: cuda.Binary, variant: Variant) -> None:
    operation, formats, layout, capability = variant
    assert made.cubin[:4] == b"\x7fELF"
    assert (made.stack, made.spilled) == (0, 0)
    assert 0 < made.registers <= max_registers(operation, formats, layout, capability)


def wide_loops(made: cuda.Binary) -> list[list[disassembly.Instruction]]:
    """Return the loops with 128-bit accesses; assert that local memory is unused."""
    code = disassemble(made.cubin)
    assert not [one for one in code.instructions if one.name in ("LDL", "STL")]
    found = [
        loop
        for loop in code.loops()
        if any(one.bits == 128 for one in loop if one.name in ("LDG", "STG"))
    ]
    assert found
    return found


def check_code(made: cuda.Binary, variant: Variant) -> None:
    """Assert that loops move all streams together, 128 bits of the widest at a time."""
    operation, formats, *_ = variant
    reads, writes = READS_AND_WRITES[operation]
    elements = 128 // max(bits_moved(reads + writes, formats))
    full = 0
    for loop in wide_loops(made):
        loads, stores = disassembly.accesses(loop, "LDG"), disassembly.accesses(loop, "STG")
        unrolled = repeats(bits_moved(reads, formats, elements), loads)
        if unrolled:
            assert not writes or repeats(bits_moved(writes, formats, elements), stores) == unrolled
            assert bool(writes) == bool(stores)
            full += 1
            if operation == "lerp":
                check_lerp(loop, formats, unrolled * elements)
        else:  # with a weight of 1 it is a copy
            assert operation == "lerp"
            assert repeats(bits_moved("s", formats, elements), loads)
            assert repeats(bits_moved("d", formats, elements), stores)
    assert full


def check_lerp(loop: list[disassembly.Instruction], formats: Sequence[str], elements: int) -> None:
    """Assert one subtraction and one fused multiply-add per element, and no other product.

    Stochastic rounding dithers, with three products more, and divides outside the loop.
    """
    count = Counter(one.name for one in loop)
    kind = "D" if "f64" in formats else "F"
    if formats[0].endswith("~"):
        assert not count["MUFU"]
        assert count[f"{kind}FMA"] == (2 if kind == "D" else 4) * elements
        return
    assert count[f"{kind}FMA"] == elements
    assert not count[f"{kind}MUL"]
    # The newest toolkit subtracts a half from a float32 directly (FHADD, rounded as FADD).
    assert count[f"{kind}ADD"] + count["FHADD"] == elements


FLAT = variants(PLAIN + EACH_KIND, "flat", ARCHITECTURES) + variants(OTHERS, "flat", [USUAL])
SPACED = variants(
    [*PLAIN, *EACH_KIND, *(one for one in OTHERS if one[0] == "lerp")], "strided", [USUAL]
)
CLOCKS = variants([(CLOCK, ())], "", ARCHITECTURES)


@pytest.mark.parametrize("variant", variant_params(FLAT, USUAL_KERNELS))
def test_flat_kernels_move_128_bits_at_a_time(
    variant: Variant, compiled: Callable[[Variant], cuda.Binary]
) -> None:
    made = compiled(variant)
    check_resources(made, variant)
    assert not re.search(r"\b(add|sub|mul|mad)\.f(32|64)\b", made.ptx)  # these could be fused
    if variant.operation != "window":
        check_code(made, variant)
    else:  # many loops, each with its own streams
        kinds = [{one.name for one in loop if one.bits == 128} for loop in wide_loops(made)]
        assert any(kind >= {"LDG", "STG"} for kind in kinds)


@pytest.mark.parametrize("variant", variant_params(SPACED, USUAL_KERNELS[:1]))
def test_strided_kernels_spill_nothing(
    variant: Variant, compiled: Callable[[Variant], cuda.Binary]
) -> None:
    check_resources(compiled(variant), variant)


@pytest.mark.parametrize("variant", variant_params(CLOCKS, [(CLOCK, ())]))
def test_clock_spills_nothing(variant: Variant, compiled: Callable[[Variant], cuda.Binary]) -> None:
    made = compiled(variant)
    check_resources(made, variant)
    names = {one.name for one in disassemble(made.cubin).instructions}
    assert "BAR" in names
    assert not names & {"LDL", "STL"}


def test_the_benchmark_table_counts_what_is_in_the_code(
    compiled: Callable[[Variant], cuda.Binary],
) -> None:
    (variant,) = variants([("lerp", ("f32", "bf16"))], "flat", [USUAL])
    operation, formats, _, capability = variant
    row = kernels_gpu.row((operation, formats), capability, compiled(variant))
    assert (row["bytes"], row["loop_elements"]) == (10, 4)
    assert row["waits"] <= 3  # the clock's flag, the columns of a row, the data
    assert (row["loads"], row["stores"]) == ({64: 1, 128: 1}, {128: 1})
    assert kernels_gpu.accesses(row["loads"]) == "128 + 64"
    assert row["loop"]["FFMA"] == row["loop"]["FADD"] == 4
    assert sum(row["loop"].values()) == row["loop_instructions"] < row["instructions"]


def test_products_and_sums_are_never_fused_whatever_numba_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import numba.cuda
    from numba.cuda.cudadrv import nvvm

    asked = []
    monkeypatch.setattr(nvvm, "compile_ir", lambda ir, **options: asked.append(options))

    def compile_ptx(*args: object, **options: object) -> tuple[str, None]:
        nvvm.compile_ir("ir", opt=3, fma=True)
        return ".visible .entry a_long_name(", None

    monkeypatch.setattr(numba.cuda, "compile_ptx", compile_ptx)
    assert cuda.translate(CLOCK, (), "", (9, 0)).name == "fastema_advance"
    assert asked == [{"opt": 3, "fma": False}]


def test_waits_end_groups_of_independent_loads() -> None:
    listing = """
        /*0010*/ LDG.E.64 R2, desc[UR4][R8.64] ;
        /*0020*/ LDG.E.64 R4, desc[UR4][R8.64+0x8] ;
        /*0030*/ IADD3 R6, R3, R9, RZ ;
        /*0040*/ LDG.E R10, desc[UR4][R4.64] ;
.L_x_1:
        /*0050*/ LDG.E.128 R12, desc[UR4][R10.64] ;
        /*0060*/ FADD R16, R15, R6 ;
        /*0070*/ STG.E desc[UR4][R2.64], R16 ;
        /*0080*/ @P0 BRA `(.L_x_1) ;
    """
    code = disassembly.parse_listing(listing)
    (loop,) = code.loops()
    assert disassembly.count_waits(code, loop) == 3  # for R2 to R5, for R10, for R12 to R15
    assert disassembly.count_waits(code._replace(instructions=loop), loop) == 1
