"""The measured memory of an average: one shadow, and nothing for updates and evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ..support.states import nested
from .kinds import KINDS, PARTS, which
from .weights import FLOATS

pytestmark = pytest.mark.torch

# Resident memory is the kernel's high-water mark, in a process that has already imported and
# compiled everything. The allocator must return freed memory at once: a heap that has grown
# before would hide the next call's temporaries.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

MEASURED = """
import re, sys
from pathlib import Path
import torch, fastema

def status(field):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\\s+(\\d+) kB$", text, re.M)[1])

def peak(call):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return max(status("VmHWM") - before, 0)

def build(width, layers, dtype):
    made = [torch.nn.Linear(width, width, dtype=dtype) for _ in range(layers)]
    return torch.nn.Sequential(*made)

def swap(ema):
    ema.apply_shadow()
    ema.restore()

def block(ema):
    with ema.swapped():
        pass

dtype = getattr(torch, sys.argv[1])
warm = fastema.EMA(build(700, 2, dtype), shadow_dtype=torch.float32)
for call in (warm.update, lambda: swap(warm), lambda: block(warm)):
    call()  # compiles, starts the threads
model = build(2560, 8 if dtype == torch.float32 else 16, dtype)
size = sum(p.numel() * p.element_size() for p in model.parameters())
shadow = sum(p.numel() * 4 for p in model.parameters())
made = []
construction = peak(lambda: made.append(fastema.EMA(model, shadow_dtype=torch.float32)))
ema = made[0]
for p in model.parameters():
    p.data.add_(1)
costs = [peak(ema.update), peak(lambda: swap(ema)), peak(lambda: block(ema))]
costs.append(peak(lambda: ema.state_dict(copy=False)))
print(size, shadow, construction, peak(ema.state_dict), *costs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_memory_grows_by_one_shadow(dtype: str, python: Callable[..., str]) -> None:
    """For a 200 MB model, construction and a saved state cost one shadow, all else under 1 %."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the high-water mark cannot be reset here: {error}")
    out = python(MEASURED, dtype, **ALLOCATOR)
    size, shadow, construction, state, *costs = map(int, out.split())
    assert size > 200e6
    assert 0.99 * shadow < construction < 1.02 * shadow
    assert 0.99 * shadow < state < 1.02 * shadow
    assert all(cost < 0.01 * size for cost in costs), costs


def storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


# Bytes per element of a float32 model, by part.
BYTES = {
    "EMA": {"shadow": 4},
    "three": {"shadow": 12},
    "SWA": {"shadow": 4},
    "SMA": {"shadow": 4, "residual": 4, "ring": 12},
    "PowerEMA": {"shadow": 8},
    "split": {"shadow": 2, "residual": 2},
    "three split": {"shadow": 6, "residual": 6},
    "random": {"shadow": 2},
}


OF_DTYPES = [(kind, {}, expected) for kind, expected in BYTES.items()]
OF_DTYPES += [("EMA", {"shadow_dtype": d}, {"shadow": d.itemsize}) for d in FLOATS.values()]


@pytest.mark.parametrize(("kind", "options", "expected"), OF_DTYPES)
def test_every_part_of_a_state_is_one_buffer_of_its_size(
    kind: str, options: dict[str, Any], expected: dict[str, int]
) -> None:
    model = nn.Sequential(*(nn.Linear(40, 30) for _ in range(20)))
    state = nested(KINDS[kind](model, **options).state_dict(copy=False))
    elements = sum(p.numel() for p in model.parameters())
    taken = {
        part: storages(t for one in state[part] for t in one.values())
        for part in PARTS
        if part in state
    }
    assert taken.keys() == expected.keys()
    for part, held in taken.items():
        # Tensors begin at cache lines: at most 63 bytes of padding each.
        slots = 3 if part == "ring" else len(state[part])
        room = slots * 63 * 40
        assert len(held) <= len(state[part])
        assert 0 <= sum(held.values()) - expected[part] * elements <= room


# Kinds whose averages trade places with weights of this dtype bit by bit.
IN_PLACE = [("f32", kind) for kind in KINDS if kind != "random"]
IN_PLACE += [("bf16", kind) for kind in KINDS if "split" not in kind]


@pytest.mark.parametrize(("model_dtype", "kind"), IN_PLACE)
def test_update_and_swap_allocate_no_tensor(model_dtype: str, kind: str) -> None:
    params = [torch.randn(300, dtype=FLOATS[model_dtype]) for _ in range(5)]
    wide = kind not in ("random", "split", "three split", "into")
    average = KINDS[kind](params, **({"shadow_dtype": torch.float32} if wide else {}))
    average.update()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        average.update()
        with average.swapped(**which(average)):
            pass
    assert sum(event.cpu_memory_usage for event in profile.key_averages()) == 0
