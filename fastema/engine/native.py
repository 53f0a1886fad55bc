"""CPU kernels as callable functions: shipped, from the disk cache, or compiled now.

Compiling takes a second and imports Numba; loading takes milliseconds, without Numba. LLVM links
the code; ctypes calls it and releases the GIL during the call.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, NamedTuple

from fastema.engine import disk_cache, shipped
from fastema.kernels.variants import ENTRY

__all__ = [
    "LEVELS",
    "compiled",
    "function",
    "has_levels",
    "is_jit_disabled",
    "supported_levels",
]

_DEFAULTS: Final[Mapping[str, object]] = {
    **{"OPT": 3, "LOOP_VECTORIZE": 1, "SLP_VECTORIZE": 0, "DISABLE_INTEL_SVML": 0},
    **{"BOUNDSCHECK": None, "DEBUGINFO_DEFAULT": 0, "ENABLE_PROFILING": 0},
    **{"EXTEND_VARIABLE_LIFETIMES": 0, "LLVM_REFPRUNE_PASS": 1, "LLVM_REFPRUNE_FLAGS": "all"},
}
"""Numba's settings that change the code, besides those of the processor, and their defaults."""

_VARIABLES: Final = tuple(
    f"NUMBA_{name.removesuffix('_DEFAULT')}"
    for name in ("CPU_NAME", "CPU_FEATURES", "ENABLE_AVX", *_DEFAULTS)
)
"""Environment variables that change the code that Numba generates."""

_CONFIG_FILE: Final = ".numba_config.yaml"
"""Numba reads its settings from here too, whenever it compiles: from the current folder."""

_COMPILERS: Final = ("numba", "llvmlite")

_V3: Final = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")

LEVELS: Final = {
    "x86-64-v4": (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": _V3,
}
"""Levels of the x86-64 psABI that a wheel has code for, best first, and the processor features that
each one requires."""

_WORD: Final = ctypes.c_int64

_KERNEL: Final = ctypes.CFUNCTYPE(_WORD, *[_WORD] * 4)
_PROTOTYPES: Final = {
    "ewm_mean": ctypes.CFUNCTYPE(_WORD, *[_WORD] * 5),
    "run_launches": ctypes.CFUNCTYPE(_WORD, _WORD),
    # These hold the GIL: they call Python's C API.
    "check_tensors": ctypes.PYFUNCTYPE(_WORD, _WORD),
    "run_program": ctypes.PYFUNCTYPE(_WORD, *[_WORD] * 3),
}
"""Types of the functions that are not called as kernels over a table."""


@cache
def _binding() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


@cache
def _detect_host() -> tuple[str, str, str]:
    """Return the triple, the name and the features of this processor, as Numba detects them."""
    llvm = _binding()
    return llvm.get_process_triple(), llvm.get_host_cpu_name(), _detect_features().flatten()


@cache
def _detect_features() -> Any:
    try:
        return _binding().get_host_cpu_features()
    except RuntimeError:  # LLVM cannot detect them on this processor
        return _binding().targets.FeatureMap()


def has_levels() -> bool:
    """Return whether wheels have CPU code for this platform."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _numba_target() -> Any:
    """Return the module that asks Numba; None if the environment alone decides.

    That is so while Numba is not imported, if there is no configuration file.
    """
    if "numba" not in sys.modules and not os.path.isfile(_CONFIG_FILE):
        return None
    from fastema.kernels import target

    return target


class _Target(NamedTuple):
    """What the machine code depends on, besides the kernel sources and the compilers' versions."""

    processor: tuple[str, str, str]
    """Triple, CPU name and features."""
    settings: Mapping[str, str]
    """Numba's settings that are not the default."""


def _find_target() -> _Target:
    """Return what Numba compiles for now: this processor, unless its settings say otherwise."""
    settings = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    numba = _numba_target()
    if numba is None:
        return _Target(_detect_host(), settings)
    return _Target(numba.processor(), settings | numba.changed_settings(_DEFAULTS))


def supported_levels() -> tuple[str, ...]:
    """Return the :data:`LEVELS` that run here, best first; none if Numba's settings are changed."""
    if not has_levels() or _find_target() != (_detect_host(), {}):
        return ()
    features = _detect_features()
    return tuple(
        level for level, wanted in LEVELS.items() if all(features.get(one) for one in wanted)
    )


def compiled(operation: str, formats: tuple[str, ...], layout: str) -> bytes:
    """Compile a function for Numba's target processor; return the object code."""
    from fastema.kernels import cpu, jit

    code: bytes = jit.target_machine().emit_object(
        jit.compiled(cpu.function(operation, formats, layout))
    )
    return code


def _load_code(operation: str, formats: tuple[str, ...], layout: str) -> bytes:
    """Return the object code of a function: shipped, from the disk cache, or compiled now."""
    code = shipped.read("cpu", operation, formats, layout, supported_levels())
    if code is not None:
        return code
    depends = *_find_target(), disk_cache.versions(*_COMPILERS)
    path = disk_cache.entry(operation, formats, layout, *depends, suffix=".o")
    code = disk_cache.read(path)
    if code is None:
        code = compiled(operation, formats, layout)
        disk_cache.write(path, code)
    return code


def is_jit_disabled() -> bool:
    """Return whether Python runs the kernels."""
    numba = _numba_target()
    if numba is None:
        return os.environ.get("NUMBA_DISABLE_JIT", "0") != "0"
    disabled: bool = numba.is_jit_disabled()
    return disabled


def function(operation: str, formats: tuple[str, ...], layout: str) -> Callable[..., int]:
    """Return a kernel or function, loaded and callable with 64-bit integers.

    If Numba's compiler is disabled, C code can call it as well, but Python runs it.
    """
    prototype = _PROTOTYPES.get(operation, _KERNEL)
    if is_jit_disabled():
        from fastema.kernels import cpu

        python = cpu.function(operation, formats, layout)
        made: Callable[..., int] = prototype(lambda *args: python(*args) or 0)
        return made
    llvm = _binding()
    triple, name, features = _detect_host()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=name, features=features, codemodel="jitdefault", jit=True
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(_load_code(operation, formats, layout)))
    engine.finalize_object()
    made = prototype(engine.get_function_address(ENTRY))
    engine.detach()  # never freed: threads may be in the code when the process ends
    return made
