"""Check that the tests catch faults: ``python tests/planted.py [--full] [ROOM or NAME ...]``.

Each fault is planted in a copy of the checkout. The tests of its room must then fail, run as by
``make test``, or as by ``make test-full`` with ``--full``. The exit status is 1 if a fault is
missed. All faults take a quarter of an hour on two cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

ROOMS = {
    "kernels": ["tests/kernels"],
    "rules": ["tests/rules"],
    "layout": ["tests/layout"],
    "engine": ["tests/engine"],
    "gpu": [
        *(f"tests/engine/test_{name}.py" for name in ("shipped", "driver_calls", "cuda_host")),
        *(f"tests/engine/test_cuda_{name}.py" for name in ("attacks", "graphs", "torch")),
        *(f"tests/kernels/test_cuda_{name}.py" for name in ("clock", "compile")),
    ],
    "native": [f"tests/engine/test_{name}.py" for name in ("native", "cubins", "series", "watch")],
    "shadow": ["tests/shadow"],
    "binding": [
        *("tests/binding", "tests/test_plan.py", "tests/compat/test_averager.py"),
        *(f"tests/shadow/test_{name}.py" for name in ("jax", "moved")),
    ],
    "plan": ["tests/test_plan.py", "tests/test_mixed.py"],
    "state": ["tests/checkpoint", "tests/shadow/test_state.py", "tests/test_posthoc.py"],
    "bridges": ["tests/bridges", "tests/shadow/test_swap.py"],
    "compat": ["tests/compat"],
    "tracking": ["tests/tracking"],
    "distributed": ["tests/distributed", "tests/shadow/test_patterns.py"],
}


class Fault(NamedTuple):
    """A replacement of ``old``, which occurs once in the file, by ``new``."""

    room: str
    name: str
    file: str
    old: str
    new: str


# By room, file and name of the fault: the old code and the new.
PLANTED = {
    "binding": {
        "fastema/binding/swap.py": {
            "failed way undone": (
                "way.apply()\n                    self._applied_ways.append(way)",
                "self._applied_ways.append(way)\n                    way.apply()",
            ),
            "one undo clears all": ("self._applied_ways.remove(way)", "self._applied_ways.clear()"),
        },
        "fastema/binding/binding.py": {
            "overlap ignored": ("if self.guard.may_overlap(dst, src):", "if self.guard is None:"),
            "immutable arrays kept": (
                "pair._replace(src=pair.src.with_owner(None)) if pair.name in fixed else pair",
                "pair",
            ),
            "used again": ("if kind is None and self._once", "if kind is None and not self._once"),
            "old match kept": ("fits = bound.match in (match, self._match)", "fits = True"),
        },
        "fastema/binding/sides.py": {
            "unfreezing missed": (" or (bool(trained) and _changed(trained))", ""),
            "first updates check a share": ("        self._full = 2 ", "        self._full = 0 "),
        },
        "fastema/compat/averager.py": {"block move missed": ("if self._moved():", "if False:")},
    },
    "native": {
        "fastema/engine/disk_cache.py": {
            "bad entry loaded": ("if stored[:_HEAD] == _make_header(body) else", "if True else"),
            "group-writable folder trusted": ("stat.S_IWGRP | stat.S_IWOTH", "stat.S_IWOTH"),
            "another user's link followed": ("if status.st_uid not in trusted:", "if False:"),
            "two kernels share an entry": ("(name, SOURCE_STAMP, depends)", "(name, SOURCE_STAMP)"),
        },
        "kernels/target.py": {"settings ignored": ("if value != defaults[name]}", "if False}")},
        "fastema/engine/native.py": {
            "one feature for a level": ("if all(features.get(one)", "if any(features.get(one)"),
        },
        "kernels/cpu_watch.py": {"strides": ("store(dim, at + 1, load(strides, d))", "pass")},
        "kernels/cpu_series.py": {
            "scratch shared": ("scratch += place * load(settings, ROOM)", "pass")
        },
    },
    "gpu": {
        "fastema/engine/shipped.py": {
            "older major code": ("if major == capability[0] and", "if major <= capability[0] and"),
            "code of other sources": (" == _current_stamp()\n", ' != "  "\n'),
            "next kernel misplaced": ("            at += size\n", "            at += size + 1\n"),
        },
        "fastema/engine/build_kernels.py": {
            "spilled registers accepted": ("if made.spilled or made.stack:", "if made.stack:"),
        },
        "fastema/engine/cubins.py": {
            "products may be fused": ("(add|sub|mul|mad)", "(add|sub|mad)"),
        },
        "fastema/engine/driver.py": {"minor before major": ("= 75, 76\n", "= 76, 75\n")},
        "fastema/engine/cuda.py": {
            "foreign context kept": (
                "if foreign:\n                    driver.pop()",
                "if not foreign:\n                    driver.pop()",
            )
        },
        "fastema/engine/cuda_group.py": {"empty clock": ("= 8 * CLOCK_CELLS", "= 0 * CLOCK_CELLS")},
        "kernels/cuda.py": {
            "no guard when idle": ('return _all_rows if operation == "finite" else', "return"),
            "fma everywhere": ('**{**options, "fma": False}', "**options"),
        },
        "kernels/cuda_clock.py": {
            "idle steps skipped": ("skips = flagged and not idle", "skips = flagged"),
            "flag of the last try": ("load(cells, abi.TRIES) + 1)", "load(cells, abi.TRIES))"),
        },
        "kernels/variants.py": {"no bitwise copies": ('        yield "copy", raw, raw\n', "")},
    },
    "kernels": {
        "kernels/scalar.py": {
            "ties not to even": ("add32(bits, add32(odd, 0x7FFF)), 16", "add32(bits, 0x8000), 16"),
            "weight one not exact": ("return x if w == 1 else fma(w", "return fma(w"),
            "late overflow": ("(magnitude, 0x477FE000), beyond", "(magnitude, 0x477FEFFF), beyond"),
            "step not in the seed": ("    key = xor32(mix32(key), high32(step))\n", ""),
        },
        "kernels/steps.py": {"stall miscounted": ("(1) if after == before", "(1) if after == x")},
    },
    "rules": {
        "fastema/rules/rule.py": {"interval lost": ("every * math.log(decay)", "math.log(decay)")},
        "fastema/rules/schedule.py": {
            "start delayed by a step": ("if m < 0 or not step:", "if m <= 0 or not step:"),
            "due": ("// every - (counted - steps) // every", "// every - (counted - 1) // every"),
        },
        "fastema/rules/debias.py": {
            "half the bias": ("(-weight), LOG_NEGLIGIBLE", "(-0.5 * weight), LOG_NEGLIGIBLE")
        },
    },
    "layout": {
        "fastema/layout/group.py": {
            "overlap": ("begin[1:] >= np.maximum.accumulate(end)", "begin[1:] >= end")
        },
        "fastema/layout/table.py": {
            "axes merged by one stride": (" and self.src == n * inner.src", ""),
            "one half assumed": ("one_half = first // _HALF == reach // _HALF", "one_half = True"),
        },
        "fastema/layout/flat.py": {"not aligned": ("+= -(-size // unit) * unit", "+= size")},
    },
    "engine": {
        "fastema/engine/cpu.py": {
            "waits": ("if not future.cancel():\n                future.result()", "future.cancel()")
        },
        "fastema/engine/program.py": {
            "any group is enough": ("return not any(np.any(group", "return not all(np.any(group"),
            "program of any average": (": len(results)] == index", ": len(results)] >= 0"),
        },
    },
    "shadow": {
        "fastema/shadow/updating.py": {
            "skipped step not counted": (
                "self._done = step\n            return True\n",
                "return True\n",
            ),
            "left-out steps lost at a NaN": ("return 0 if averaged else steps - 1", "return 0"),
            "seed a step off": ("(weights, self._seed, step)", "(weights, self._seed, self._done)"),
            "update allowed in a block": ('        self._refuse_applied("update")\n', ""),
        },
        "fastema/bridges/torch_link.py": {
            "buffers copied late": ("(pairs if one.requires_grad else now)", "pairs")
        },
        "fastema/shadow/following.py": {
            "hooks run twice": ("if depth <= 0 and", "if"),
            "out of phase": (
                "        self._done.clear()\n        if complete:\n",
                "        if complete:\n            self._done.clear()\n",
            ),
        },
        "fastema/binding/swap.py": {
            "saved while applied": ('pair.src if way_of(pair) == "bits" else pair.dst', "pair.dst")
        },
        "fastema/shadow/entries.py": {
            "last tied name kept": (
                ".setdefault(_memory(leaf.spec), leaf.name)",
                "[_memory(leaf.spec)] = leaf.name",
            )
        },
    },
    "plan": {
        "fastema/binding/binding.py": {"no rollback": ("binding._bound = self._before", "pass")},
        "fastema/plan.py": {
            "calls not counted": ("            self._calls += 1\n", ""),
            "swap hidden from autograd": ("(0, 1) if swaps else (0,)", "(0,)"),
        },
    },
    "state": {
        "fastema/checkpoint/state.py": {
            "no checksum": ("sums.get(key) != zlib.crc32(bytes_of(array))", "key in sums and False")
        },
        "fastema/shadow/saving.py": {
            "rounding lost": ('"stochastic" if self._format.random else "nearest"', '"nearest"')
        },
    },
    "bridges": {
        "fastema/bridges/torch.py": {
            "inference": ("tensors if not t.is_inference()])", "tensors if t.is_inference()])"),
            "conjugate bit ignored": ("not plain or tensor.is_conj() or", "not plain or"),
        },
        "fastema/bridges/numpy.py": {
            "strides": ("aligned or any(step % itemsize for step in strides):", "aligned:")
        },
        "fastema/bridges/moving.py": {
            "used accepted": ("if self._used and all(map(_refers, self._used, arrays))", "if False")
        },
    },
    "compat": {
        "fastema/compat/torch_ema.py": {"decay too soon": ("(1 + step) / (10", "(2 + step) / (11")},
        "fastema/compat/diffusers.py": {
            "start a step late": ("self.update_after_step - 1)", "self.update_after_step)"),
            "no minimum": ("max(min(grown, self.decay), self.min_decay)", "min(grown, self.decay)"),
        },
    },
    "tracking": {
        "fastema/tracking/window.py": {"low part lost": (" + low + back_low[at]", " + low")},
        "fastema/tracking/scalar.py": {
            "no weight": ("            if not weight:\n                return self._reading\n", "")
        },
    },
    "distributed": {
        "fastema/binding/binding.py": {
            "stale weights in a block": ("        if write:\n            reshard(container)\n", "")
        },
        "fastema/bridges/torch_parts.py": {
            "offset of a part ignored": (
                "(tuple(offset) if spec.size else (0,) * len(whole)) if is_part",
                "(0,) * len(whole) if is_part",
            ),
            "even shards": ("Size(self.shape), self.strides", "Size(array.shape), array.stride()"),
            "storage shared": ("DTensor(from_dlpack(array.detach()),", "DTensor(array.detach(),"),
            "slots sharded": ("tuple(map(_with_axis_before, self.placements))", "self.placements"),
        },
        "fastema/bridges/torch_ranks.py": {
            "ranks not asked": ("dist.all_reduce(value, dist.ReduceOp.MAX, group)", "pass"),
            "one digest compared": (
                "if not all(torch.equal(one, found[0]) for one in found):",
                "if not torch.equal(digest, found[0]):",
            ),
        },
        "fastema/shadow/matching.py": {"division unchecked": ("!= was", "!= was and name is None")},
        "fastema/binding/policies.py": {
            "last pattern decides": (
                "return next(matching, None)",
                "return next(reversed([*matching]), None)",
            )
        },
        "fastema/checkpoint/folder.py": {
            "partial extents merged": ("extents[axis - 1] ==", "extents[axis - 1] <=")
        },
        "fastema/checkpoint/dcp.py": {
            "path out of a folder": ('if Path(name).name != name or "\\0" in name:', "if not name:")
        },
    },
}

FAULTS = [
    Fault(room, name, file, old, new)
    for room, files in PLANTED.items()
    for file, changes in files.items()
    for name, (old, new) in changes.items()
]


def try_fault(fault: Fault, full: bool) -> tuple[bool, str]:
    """Return whether the room's tests fail, and their first failure or last line."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        target = copy / fault.file
        text = target.read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, f"{fault.name}: {text.count(fault.old)} places"
        target.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "auto", "--dist", "worksteal"]
        command += ["--full"] if full else []
        command += ["-m", "not tensorflow" if full else "not slow and not tensorflow"]
        run = subprocess.run(
            [*command, "-p", "no:cacheprovider", *ROOMS[fault.room]],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
        said = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if run.returncode not in (0, 1, 2):
            raise RuntimeError(run.stdout + run.stderr)
        return run.returncode != 0, said[0] if said else run.stdout.strip().splitlines()[-1]


def main() -> int:
    wanted = {argument for argument in sys.argv[1:] if argument != "--full"}
    unknown = wanted.difference(*((fault.room, fault.name) for fault in FAULTS))
    if unknown:
        print(f"{__doc__}\nno such room or fault: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    missed = 0
    for fault in FAULTS:
        if wanted and not {fault.room, fault.name} & wanted:
            continue
        began = time.monotonic()
        found, said = try_fault(fault, "--full" in sys.argv)
        missed += not found
        took = time.monotonic() - began
        verdict = "caught" if found else "MISSED"
        print(f"{verdict} {fault.room}, {fault.name} ({took:.0f} s): {said[:150]}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
