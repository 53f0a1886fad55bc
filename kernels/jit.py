"""Compilation of kernels to machine code that runs without Numba."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
from numba import types
from numba.core.registry import cpu_target
from numba.extending import register_jitable

from fastema.kernels import scalar
from fastema.kernels.variants import ENTRY


def device_fn(function: Any) -> Any:
    """Mark a function for use inside kernels; it stays plain Python outside."""
    return register_jitable(function)


for _function in vars(scalar).values():
    if getattr(_function, "__module__", None) == scalar.__name__:
        device_fn(_function)

_WRAPPERS = re.compile(r"^define [^\n]*@\"?(_ZN7cpython|cfunc\.).*?^}$", re.MULTILINE | re.DOTALL)
"""Numba's wrappers for calls from Python, which need Numba and Python's C API."""

_CALL = """
define i64 @{entry}({parameters}) {{
  %slot = alloca i64
  %error = alloca i64
  store i64 0, {pointer} %slot
  %to = bitcast {pointer} %slot to {result}
  %raised = bitcast {pointer} %error to {exception}
  %status = call i32 @{name}({result} %to, {exception} %raised, {parameters})
  %value = load i64, {pointer} %slot
  ret i64 %value
}}
"""
"""A call by Numba's convention: the caller passes where to store the result and the exception."""


def compiled(function: Callable[..., int | None]) -> llvmlite.binding.ModuleRef:
    """Compile a function of 64-bit integers for :func:`target_machine`.

    The module exports one function, :data:`ENTRY`, with C's calling convention; it returns 0 if the
    Python function returns None. No fast-math: every rounding is explicit, so that results do not
    depend on the vector width.
    """
    signature = (types.int64,) * function.__code__.co_argcount
    made = numba.njit(signature, nogil=True, error_model="numpy")(function).overloads[signature]
    name, text = made.fndesc.llvm_func_name, made.library.get_llvm_str()
    types_of = rf"^define .*@{re.escape(name)}\((.+?) noalias.*?%retptr, (.+?) noalias.*?%excinfo"
    ((result, exception),) = re.findall(types_of, text, re.MULTILINE)
    call = _CALL.format(
        entry=ENTRY,
        name=name,
        result=result,
        exception=exception,
        pointer="ptr" if result == "ptr" else "i64*",  # LLVM before 17
        parameters=", ".join(f"i64 %a{place}" for place in range(len(signature))),
    )
    module = llvmlite.binding.parse_assembly(_WRAPPERS.sub("", text) + call)
    for one in (*module.functions, *module.global_variables):
        if not one.is_declaration and one.name != ENTRY:
            one.linkage = "internal"
    return module


def target_machine() -> llvmlite.binding.TargetMachine:
    """Return the machine to compile for: Numba's target, which NUMBA_CPU_NAME can set."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    target = llvmlite.binding.Target.from_triple(triple)
    reloc = "static" if triple.startswith("x86") else "default"
    return target.create_target_machine(
        cpu=name, features=features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True
    )
