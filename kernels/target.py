"""What Numba compiles for: its processor, and settings from the environment, a file or Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numba.core import config
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target


def processor() -> tuple[str, str, str]:
    """Return the triple, the CPU name and the features that CPU code is compiled for."""
    config.reload_config()  # as the compiler does first
    with global_compiler_lock:
        described: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()
    return described


def changed_settings(defaults: Mapping[str, object]) -> dict[str, str]:
    """Return the settings that differ from their defaults."""
    config.reload_config()
    values: dict[str, Any] = {name: getattr(config, name, defaults[name]) for name in defaults}
    # The level "max" equals 3.
    values = {name: getattr(value, "_raw_value", value) for name, value in values.items()}
    return {name: str(value) for name, value in values.items() if value != defaults[name]}


def is_jit_disabled() -> bool:
    """Return whether functions stay plain Python."""
    config.reload_config()
    return bool(config.DISABLE_JIT)
