"""Measure what a room's tests catch: ``python -m tests.mutants ROOM [--n 30] [--write]``.

Small random faults, chosen by a seed, are planted one at a time in a copy of the checkout, and the
room's tests run against each until one fails. Those that no test notices are printed: a person
says which of them change nothing. ``--write`` stores the score in mutants.json. Needs ``os.fork``.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCORES = Path(__file__).with_suffix(".json")

TESTS = {
    "binding": ["tests/binding", "tests/test_plan.py", "tests/compat/test_averager.py"]
    + [f"tests/average/test_{name}.py" for name in ("jax", "moved", "swap")],
    "bridges": ["tests/bridges"]
    + [f"tests/distributed/test_{name}.py" for name in ("saving", "sharded")]
    + [f"tests/average/test_{name}.py" for name in ("offload", "swap")],
    "checkpoint": [
        *("tests/checkpoint", "tests/distributed/test_consolidate.py"),
        *("tests/average/test_state.py", "tests/test_posthoc.py"),
    ],
    "compat": ["tests/compat", "tests/keras/swap_cases.py"],
    "distributed": ["tests/distributed", "tests/average/test_patterns.py"],
    "engine": ["tests/engine", "tests/kernels/test_update.py"],
    "keras": ["tests/test_trainers.py"]
    + [f"tests/keras/{name}_cases.py" for name in ("weights", "evaluation", "swap")]
    + [f"tests/keras/{name}_cases.py" for name in ("losses", "losses_runs")],
    "kernels": ["tests/kernels"] + [f"tests/engine/test_{name}.py" for name in ("series", "watch")],
    "layout": ["tests/layout", "tests/test_plan.py"],
    "lightning": ["tests/lightning", "tests/test_trainers.py"],
    "top": [
        *(f"tests/test_{name}.py" for name in ("plan", "mixed", "linear", "posthoc", "hints")),
        *(f"tests/test_{name}.py" for name in ("exports", "light_import")),
    ],
    "transformers": ["tests/transformers", "tests/test_trainers.py"],
}
"""Tests of the rooms that have more, or others, than the folder of their name."""

_PAIRS = "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, Add Sub, Mult FloorDiv, LShift RShift"
_PAIRS += ", BitAnd BitOr, And Or"
_OTHER = {
    getattr(ast, a): getattr(ast, b) for a, b in (pair.split() for pair in _PAIRS.split(", "))
}
_OTHER |= {b: a for a, b in _OTHER.items()}
_OTHER |= {ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitXor: ast.BitOr}

_NEVER = ("annotation", "returns", "decorator_list", "bases", "type_params")


class Mutant(NamedTuple):
    """The file, the place in its bytes, the line's number and the new code."""

    file: str
    start: int
    end: int
    line: int
    new: str


def sources_of(room: str, root: Path = ROOT) -> list[Path]:
    """Return the source files of a room."""
    if room == "top":
        return sorted((root / "fastema").glob("*.py"))
    return sorted((root / ("" if room == "kernels" else "fastema") / room).rglob("*.py"))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that may change: no imports, types, texts, nor what an error says."""
    kept = ast.unparse(node).startswith(("__all__", "cast(", "isinstance(")) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    if kept or _is_text(node) or isinstance(node, ast.Import | ast.ImportFrom):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field not in _NEVER and not isinstance(node, ast.Raise):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _walk(child)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield a node and what to put in its place."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        if not isinstance(node.test, ast.UnaryOp):
            yield node.test, ast.UnaryOp(ast.Not(), node.test)
        yield node.test, ast.Constant(False)
        if not isinstance(node, ast.While):
            yield node.test, ast.Constant(True)
    match node:
        case ast.Compare(left, [op], right):
            yield node, ast.Compare(left, [_OTHER[type(op)]()], right)
        case ast.BinOp(left, op, right) if type(op) in _OTHER:
            if not _is_text(left) and not _is_text(right):
                yield node, ast.BinOp(left, _OTHER[type(op)](), right)
        case ast.BoolOp(op, values):
            yield node, ast.BoolOp(_OTHER[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, operand
        case ast.Constant(bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield node, ast.Constant(value + 1)
            yield node, ast.Constant(value - 1)
        case ast.Call(function, args, keywords):
            if len(args) > 1 and not any(_is_text(a) or isinstance(a, ast.Starred) for a in args):
                yield node, ast.Call(function, [args[1], args[0], *args[2:]], keywords)
            for at, keyword in enumerate(keywords):
                if keyword.arg:
                    yield node, ast.Call(function, args, keywords[:at] + keywords[at + 1 :])
        case ast.Return(value) if value and ast.unparse(value) != "None":
            yield node, ast.Return(ast.Constant(None))
        case ast.AugAssign(target, op, value):
            yield node, ast.Pass()
            if type(op) in _OTHER:
                yield node, ast.AugAssign(target, _OTHER[type(op)](), value)
        # Without the assignment of a name nearly anything fails: that would say little.
        case ast.Expr(ast.Call()) | ast.Raise() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield node, ast.Pass()
        case ast.Break():
            yield node, ast.Continue()
        case ast.Continue():
            yield node, ast.Break()


def mutants_of(file: Path, root: Path = ROOT) -> list[Mutant]:
    """Return all mutants of a file."""
    text = file.read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    made = []
    for node in _walk(ast.parse(text)):
        for old, new in _changes(node):
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            code = ast.unparse(new)
            if isinstance(new, ast.expr) and not code.isidentifier() and not code.isdigit():
                code = f"({code})"
            made.append(Mutant(str(file.relative_to(root)), start, end, old.lineno, code))
    return made


def choose(room: str, count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """Return random mutants of a room: with a larger count, the same ones and more."""
    made = [one for file in sources_of(room, root) for one in mutants_of(file, root)]
    random.Random(seed).shuffle(made)
    return made[:count]


def describe(mutant: Mutant, text: bytes) -> str:
    """Return the lines that change, and what they change to, in one line."""
    first = text.rfind(b"\n", 0, mutant.start) + 1
    last = text.find(b"\n", mutant.end)
    new = text[first : mutant.start] + mutant.new.encode() + text[mutant.end : last]
    lines = (" ".join(part.decode().split()) for part in (text[first:last], new))
    return " -> ".join(f"`{line}`" for line in lines)


class Trial:
    """A copy of the checkout, in which the tests of a room run."""

    def __init__(self, folder: Path, room: str, root: Path) -> None:
        self._folder, self._room = folder, room
        self.copy = folder / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "site", "dist")
        shutil.copytree(root, self.copy, symlinks=True, ignore=ignored)
        places = [self.copy / test for test in TESTS.get(room, [f"tests/{room}"])]
        self._tests = [file for one in places for file in (*one.rglob("test_*.py"), one)]
        self._tests = [file for file in self._tests if file.is_file()]
        self._texts = {file: file.read_text(encoding="utf-8") for file in self._tests}
        self._cache = folder / "cache"
        self._cache.mkdir()
        self._tick = time.time()
        backend = "tensorflow" if room == "tensorflow" else "torch"
        os.environ |= {"OMP_NUM_THREADS": "1", "KERAS_BACKEND": backend}
        import_module("pytest")  # once, not for every mutant, as these
        for module in ("numpy", "numba", "torch", "lightning", "transformers.trainer"):
            imports = re.compile(rf"(import|from) {module.partition('.')[0]}\b")
            if any(map(imports.search, self._texts.values())):
                with suppress(ImportError):
                    import_module(module)

    def run(self, mutant: Mutant | None, seconds: float) -> str:
        """Return the first test that fails, "timeout", or "" if none notices the mutant."""
        if mutant is None:
            return self._run_tests(self._tests, seconds)
        file = self.copy / mutant.file
        text, then = file.read_bytes(), file.stat().st_mtime
        file.write_bytes(text[: mutant.start] + mutant.new.encode() + text[mutant.end :])
        self._cache = Path(tempfile.mkdtemp(dir=self._folder))
        if self._room == "engine":
            shutil.copytree(self._folder / "cache", self._cache, dirs_exist_ok=True)
        self._tick += 1  # Python tells compiled files apart by whole seconds
        os.utime(file, (self._tick, self._tick))
        try:
            first, last = self._order(file.stem)
            return self._run_tests(first, seconds) or self._run_tests(last, seconds)
        finally:
            file.write_bytes(text)
            os.utime(file, (then, then))
            shutil.rmtree(self._cache)

    def _order(self, stem: str) -> tuple[list[Path], list[Path]]:
        """Return the files of tests that most likely notice a change of a module, and the rest."""

        def distance(file: Path) -> tuple[bool, bool, int]:
            text = self._texts[file]
            return stem not in file.stem, not re.search(rf"\b{stem}\b", text), len(text)

        tests = sorted(self._tests, key=distance)
        return tests[:2], tests[2:]

    def _run_tests(self, tests: list[Path], seconds: float) -> str:
        if not tests:
            return ""
        said, began = self._folder / "said", time.monotonic()
        said.write_text("")
        if not (child := os.fork()):
            self._run_child(tests, said)
        try:
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() > began + seconds:
                    return "timeout"
                time.sleep(0.05)
        finally:
            with suppress(ProcessLookupError):  # and what the tests started
                os.killpg(child, signal.SIGKILL)
        return (said.read_text() or "no test") if ended[1] else ""

    def _run_child(self, tests: list[Path], said: Path) -> None:
        class Reporter:
            def pytest_sessionstart(self):
                with suppress(ImportError):  # a smaller example of a failure takes time
                    from hypothesis import Phase, settings

                    fixed = {"derandomize": True, "database": None}
                    phases = [Phase.explicit, Phase.generate]
                    settings.register_profile("mutants", settings.default, phases=phases, **fixed)
                    settings.load_profile("mutants")

            def pytest_runtest_logreport(self, report):
                if report.failed:
                    said.write_text(report.nodeid)

            pytest_collectreport = pytest_runtest_logreport

        code = 2
        try:
            os.setsid()
            os.chdir(self.copy)
            log = os.open(self._folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PYTHONPATH"] = str(self.copy)
            # Mutants of these two compile other kernels, or store them wrong: never for the user.
            if self._room in ("kernels", "engine"):
                os.environ |= {"XDG_CACHE_HOME": str(self._cache), "NUMBA_CACHE_DIR": ""}
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]
            sys.path[:] = [str(self.copy), *(p for p in sys.path if p not in ("", str(ROOT)))]
            pytest = import_module("pytest")
            marks = "not slow" if self._room == "tensorflow" else "not slow and not tensorflow"
            options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", marks]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported
            code = pytest.main([*options, *map(str, tests)], plugins=[Reporter()])
        except Exception:
            traceback.print_exc()  # in the log
        finally:
            os._exit(code)


def write(room: str, seed: int, made: int, survivors: list[str]) -> None:
    """Store a score, with what was noted about survivors that remain."""
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    notes = scores.get(room, {}).get("survivors", {})
    kept = {one: notes.get(one, "") for one in sorted(survivors)}
    caught = made - len(survivors)
    scores[room] = {"seed": seed, "caught": caught, "made": made, "survivors": kept}
    text = json.dumps(dict(sorted(scores.items())), indent=2, ensure_ascii=False)
    SCORES.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__)
    parser.add_argument("room", help="a folder of fastema, kernels, or top: fastema/*.py")
    parser.add_argument("--n", type=int, default=30, help="how many mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which mutants (%(default)s)")
    parser.add_argument("--again", action="store_true", help="stored survivors without a note")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for all of them")
    parser.add_argument("--each", type=float, help="seconds for one (30 and thrice all tests)")
    parser.add_argument("--write", action="store_true", help=f"store the score in {SCORES.name}")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    given = parser.parse_args()
    room, seed, made, survivors, notes = given.room, given.seed, 0, [], {}
    if given.again:
        stored = json.loads(SCORES.read_text(encoding="utf-8"))[room]
        seed, made, notes = stored["seed"], stored["made"], stored["survivors"]
        survivors = [*notes]
    chosen = choose(room, made or given.n, seed, given.root)
    if not chosen:
        parser.error(f"no room {room!r} in {given.root}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        trial = Trial(Path(folder), room, given.root)
        if said := trial.run(None, given.limit):
            print((Path(folder) / "log").read_text(), f"without a fault: {said}", file=sys.stderr)
            return 2
        took = time.monotonic() - began
        print(f"all tests of {room}: {took:.0f} s", flush=True)
        for mutant in chosen:
            what = describe(mutant, (trial.copy / mutant.file).read_bytes())
            if given.again and notes.get(f"{mutant.file}: {what}") != "":
                continue
            if time.monotonic() > began + given.limit:
                break
            said = trial.run(mutant, given.each or 3 * took + 30)
            if not given.again:
                made += 1
                survivors += [f"{mutant.file}: {what}"]
            if said:
                survivors.remove(f"{mutant.file}: {what}")
            print(f"{said or 'SURVIVED'}: {mutant.file}:{mutant.line}: {what}", flush=True)
    print(f"{room}, seed {seed}: {made - len(survivors)} of {made} caught")
    if given.write and made:
        write(room, seed, made, survivors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
