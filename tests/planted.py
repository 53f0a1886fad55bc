"""Whether the tests catch faults: ``python tests/planted.py [--full] [ROOM or NAME ...]``.

Each fault is put into a copy of the checkout, and the tests of its room, as ``make test`` runs
them, have to fail; with ``--full`` as ``make test-full`` does. The exit status is 1 if one is not
caught. All of them take a quarter of an hour on two cores.
"""

from __future__ import annotations

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
    "shadow": ["tests/shadow"],
    "binding": [
        "tests/binding",
        "tests/test_plan.py",
        "tests/compat/test_averager.py",
        *(f"tests/shadow/test_{name}.py" for name in ("jax", "sampled", "moved")),
    ],
    "plan": ["tests/test_plan.py", "tests/test_mixed.py"],
    "state": ["tests/checkpoint", "tests/shadow/test_state.py", "tests/test_posthoc.py"],
    "bridges": ["tests/bridges", "tests/shadow/test_written.py"],
    "compat": ["tests/compat"],
    "tracking": ["tests/tracking"],
    "distributed": ["tests/distributed", "tests/shadow/test_patterns.py"],
}


class Fault(NamedTuple):
    """``old``, which occurs once in the file, becomes ``new``."""

    room: str
    name: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault(
        "binding",
        "undone before done",
        "fastema/binding/swap.py",
        "                    way.apply()\n                    self._due.append(way)\n",
        "                    self._due.append(way)\n                    way.apply()\n",
    ),
    Fault(
        "binding",
        "undone once",
        "fastema/binding/swap.py",
        "                self._due[-1].restore()\n                self._due.pop()\n",
        "                self._due[-1].restore()\n                self._due.clear()\n",
    ),
    Fault(
        "binding",
        "overlap later",
        "fastema/binding/binding.py",
        "            if self.guard.may_overlap(dst, src):\n",
        "            if self.guard is None:\n",
    ),
    Fault(
        "binding",
        "fixed kept",
        "fastema/binding/binding.py",
        "pair._replace(src=pair.src.with_owner(None)) if pair.name in fixed else pair",
        "pair",
    ),
    Fault(
        "binding",
        "used again",
        "fastema/binding/binding.py",
        "            if kind is None and self._once:\n",
        "            if kind is None and not self._once:\n",
    ),
    Fault(
        "binding",
        "unfrozen",
        "fastema/binding/sides.py",
        "self._watch.changed() or (bool(trained) and _changed(trained))",
        "self._watch.changed()",
    ),
    Fault(
        "binding",
        "first looks",
        "fastema/binding/sides.py",
        "        self._full = 2 ",
        "        self._full = 0 ",
    ),
    Fault(
        "binding",
        "loose for good",
        "fastema/binding/binding.py",
        "            fits = bound.match in (match, self._match)\n",
        "            fits = True\n",
    ),
    Fault(
        "binding",
        "moved in a block",
        "fastema/compat/averager.py",
        "        if self._moved():\n",
        "        if False:\n",
    ),
    Fault(
        "kernels",
        "ties",
        "kernels/scalar.py",
        "nearest = shr32(add32(bits, add32(odd, 0x7FFF)), 16)",
        "nearest = shr32(add32(bits, 0x8000), 16)",
    ),
    Fault(
        "kernels", "weight one", "kernels/scalar.py", "return x if w == 1 else fma", "return fma"
    ),
    Fault(
        "kernels",
        "largest half",
        "kernels/scalar.py",
        "above32(magnitude, 0x477FE000), beyond",
        "above32(magnitude, 0x477FEFFF), beyond",
    ),
    Fault(
        "kernels", "seed", "kernels/scalar.py", "    key = xor32(mix32(key), high32(step))\n", ""
    ),
    Fault(
        "kernels",
        "stood still",
        "kernels/steps.py",
        "real(1) if after == before",
        "real(1) if after == x",
    ),
    Fault(
        "rules",
        "steps between",
        "fastema/rules/rule.py",
        "-math.expm1(every * math.log(decay))",
        "-math.expm1(math.log(decay))",
    ),
    Fault(
        "rules",
        "begins late",
        "fastema/rules/schedule.py",
        "if m < 0 or not step:",
        "if m <= 0 or not step:",
    ),
    Fault(
        "rules",
        "due",
        "fastema/rules/schedule.py",
        "counted // every - (counted - steps) // every",
        "counted // every - (counted - 1) // every",
    ),
    Fault(
        "rules",
        "nothing left",
        "fastema/rules/debias.py",
        "max(log_decay + math.log1p(-weight), GONE)",
        "max(log_decay + math.log1p(-0.5 * weight), GONE)",
    ),
    Fault(
        "layout",
        "overlap",
        "fastema/layout/group.py",
        "begin[1:] >= np.maximum.accumulate(end)[:-1]",
        "begin[1:] >= end[:-1]",
    ),
    Fault(
        "layout",
        "merged axes",
        "fastema/layout/table.py",
        "return self.dst == n * inner.dst and self.src == n * inner.src",
        "return self.dst == n * inner.dst",
    ),
    Fault(
        "layout",
        "half of an index",
        "fastema/layout/table.py",
        "one_half = first // _HALF == reach // _HALF",
        "one_half = True",
    ),
    Fault(
        "layout",
        "aligned",
        "fastema/layout/flat.py",
        "length += -(-size // unit) * unit",
        "length += size",
    ),
    Fault(
        "engine",
        "first share",
        "fastema/engine/watch.py",
        "(share == 0 and self._replaced())",
        "(share != 0 and self._replaced())",
    ),
    Fault(
        "engine",
        "waits",
        "fastema/engine/cpu.py",
        "if not future.cancel():\n                future.result()",
        "future.cancel()",
    ),
    Fault(
        "engine",
        "all finite",
        "fastema/engine/program.py",
        "return not any(np.any(group",
        "return not all(np.any(group",
    ),
    Fault(
        "engine",
        "of one average",
        "fastema/engine/program.py",
        "group.indices[: len(results)] == index",
        "group.indices[: len(results)] >= 0",
    ),
    Fault(
        "shadow",
        "counts the skipped",
        "fastema/shadow/updating.py",
        "        if not weights:\n            self._done = step\n            return\n",
        "        if not weights:\n            return\n",
    ),
    Fault(
        "shadow",
        "seed of a step",
        "fastema/shadow/updating.py",
        "return LaunchArgs(weights, self._seed, step)",
        "return LaunchArgs(weights, self._seed, self._done)",
    ),
    Fault(
        "shadow",
        "saved while applied",
        "fastema/binding/swap.py",
        'pair.src if way_of(pair) == "bits" else pair.dst',
        "pair.dst",
    ),
    Fault(
        "shadow",
        "tied",
        "fastema/shadow/entries.py",
        "first.setdefault(_memory(leaf.spec), leaf.name)",
        "first[_memory(leaf.spec)] = leaf.name",
    ),
    Fault(
        "shadow",
        "refused in a block",
        "fastema/shadow/updating.py",
        '            self._refuse_applied("update")\n',
        "",
    ),
    Fault(
        "plan",
        "as it was",
        "fastema/binding/binding.py",
        "            binding._bound = self._before\n",
        "            pass\n",
    ),
    Fault("plan", "calls", "fastema/plan.py", "            self.calls += 1\n", ""),
    Fault(
        "plan",
        "tells autograd",
        "fastema/plan.py",
        "(0, 1) if swaps else (0,)",
        "(0,)",
    ),
    Fault(
        "state",
        "damage",
        "fastema/checkpoint/state.py",
        "if sums.get(key) != zlib.crc32(bytes_of(array)):",
        "if key in sums and False:",
    ),
    Fault(
        "state",
        "rounding",
        "fastema/shadow/saving.py",
        '"stochastic" if self._format.random else "nearest"',
        '"nearest"',
    ),
    Fault(
        "bridges",
        "inference",
        "fastema/bridges/torch.py",
        "increment_version([t for t in tensors if not t.is_inference()])",
        "increment_version([t for t in tensors if t.is_inference()])",
    ),
    Fault(
        "bridges",
        "conjugate",
        "fastema/bridges/torch.py",
        "if not plain or tensor.is_conj() or tensor.is_neg()",
        "if not plain or tensor.is_neg()",
    ),
    Fault(
        "bridges",
        "strides",
        "fastema/bridges/numpy.py",
        "if not flags.aligned or any(step % itemsize for step in strides):",
        "if not flags.aligned:",
    ),
    Fault(
        "bridges",
        "used arrays",
        "fastema/bridges/moving.py",
        "if self._used and all(map(_refers, self._used, arrays)):",
        "if False:",
    ),
    Fault(
        "compat",
        "decay grows",
        "fastema/compat/torch_ema.py",
        "min(decay, (1 + step) / (10 + step))",
        "min(decay, (2 + step) / (11 + step))",
    ),
    Fault(
        "compat",
        "after a step",
        "fastema/compat/diffusers.py",
        "optimization_step - self.update_after_step - 1)",
        "optimization_step - self.update_after_step)",
    ),
    Fault(
        "compat",
        "floor",
        "fastema/compat/diffusers.py",
        "return max(min(grown, self.decay), self.min_decay)",
        "return min(grown, self.decay)",
    ),
    Fault(
        "tracking",
        "rest of a sum",
        "fastema/tracking/window.py",
        "(front - (total - took)) + (behind - took)) + low + back_low[at]",
        "(front - (total - took)) + (behind - took)) + low",
    ),
    Fault(
        "tracking",
        "no weight",
        "fastema/tracking/scalar.py",
        "            if not weight:\n                return self._reading\n",
        "",
    ),
    Fault(
        "distributed",
        "stale weights in a block",
        "fastema/binding/binding.py",
        "        if write:\n            reshard(container)\n",
        "",
    ),
    Fault(
        "distributed",
        "part at the beginning",
        "fastema/bridges/torch_parts.py",
        "offset=(tuple(offset) if spec.size else (0,) * len(whole)) if is_part else None",
        "offset=(0,) * len(whole) if is_part else None",
    ),
    Fault(
        "distributed",
        "even shards",
        "fastema/bridges/torch_parts.py",
        "TensorMeta(torch.Size(self.shape), self.strides, array.dtype)",
        "TensorMeta(torch.Size(array.shape), array.stride(), array.dtype)",
    ),
    Fault(
        "distributed",
        "one storage",
        "fastema/bridges/torch_parts.py",
        "DTensor(from_dlpack(array.detach()),",
        "DTensor(array.detach(),",
    ),
    Fault(
        "distributed",
        "ranks not asked",
        "fastema/bridges/torch_ranks.py",
        "            dist.all_reduce(value, dist.ReduceOp.MAX, group)\n",
        "            pass\n",
    ),
    Fault(
        "distributed",
        "one digest",
        "fastema/bridges/torch_ranks.py",
        "            if not all(torch.equal(one, found[0]) for one in found):",
        "            if not torch.equal(digest, found[0]):",
    ),
    Fault(
        "distributed",
        "any division",
        "fastema/shadow/matching.py",
        "        if now != was\n",
        "        if now != was and name is None\n",
    ),
    Fault(
        "distributed",
        "slots divided",
        "fastema/bridges/torch_parts.py",
        "            tuple(map(_with_axis_before, self.placements)),",
        "            self.placements,",
    ),
    Fault(
        "distributed",
        "last pattern",
        "fastema/shadow/entries.py",
        "patterns[matching[0]]",
        "patterns[matching[-1]]",
    ),
    Fault(
        "distributed",
        "stretches",
        "fastema/distributed/folder.py",
        "    while axis and extents[axis - 1] == tensor.shape[axis - 1]:",
        "    while axis and extents[axis - 1] <= tensor.shape[axis - 1]:",
    ),
    Fault(
        "distributed",
        "a path in a folder",
        "fastema/distributed/dcp.py",
        "            if Path(name).name != name:",
        "            if not name:",
    ),
]


def caught(fault: Fault, full: bool) -> tuple[bool, str]:
    """Whether the room's tests fail, and what they say last."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT,
            copy,
            symlinks=True,
            ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__"),
        )
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
    wanted = [argument for argument in sys.argv[1:] if argument != "--full"]
    missed = 0
    for fault in FAULTS:
        if wanted and not {fault.room, fault.name} & set(wanted):
            continue
        began = time.monotonic()
        found, said = caught(fault, "--full" in sys.argv)
        missed += not found
        took = time.monotonic() - began
        verdict = "caught" if found else "MISSED"
        print(f"{verdict} {fault.room}, {fault.name} ({took:.0f} s): {said[:150]}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
