"""mutants.py on a small room, and the stored scores."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .mutants import ROOT, SCORES, TESTS, choose, mutants_of, sources_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SOURCE = """
def count(n):
    steps = 0
    while n > 0:
        steps += 2
        n -= 1
    return steps
"""
TEST = """
from fastema.counting.down import count

def test_two_for_each():
    assert count(3) == 6
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in {
        "fastema/counting/down.py": SOURCE,
        "fastema/__init__.py": "",
        "tests/counting/test_down.py": TEST,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_mutant_is_caught_by_a_test_or_takes_too_long(
    checkout: Path, python: Callable[..., str]
) -> None:
    script = """
        import sys
        from pathlib import Path
        from tests.mutants import Trial, choose

        root = Path(sys.argv[1])
        mutants = {(one.line, one.new): one for one in choose("counting", 99, 1, root)}
        trial = Trial(root.parent / (root.name + "-trial"), "counting", root)
        print(repr(trial.run(None, 99)))
        for line, new, seconds in (5, "steps -= 2", 99), (6, "pass", 4):
            print(repr(trial.run(mutants[line, new], seconds)))
    """
    (checkout.parent / (checkout.name + "-trial")).mkdir()
    caught = "tests/counting/test_down.py::test_two_for_each"
    said = python(script, str(checkout)).splitlines()
    assert said == ["''", repr(caught), "'timeout'"]
    assert (checkout / "fastema/counting/down.py").read_text() == SOURCE


def test_survivors_and_the_score_are_printed(checkout: Path) -> None:
    (checkout / "fastema/counting/down.py").write_text("count = lambda n: 6\nunused = True\n")
    command = [sys.executable, "-m", "tests.mutants", "counting", "--root", str(checkout)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "SURVIVED: fastema/counting/down.py:2: `unused = True` -> `unused = False`" in lines
    assert lines[-1] == "counting, seed 1: 2 of 3 caught"


def test_again_runs_stored_survivors_without_a_note(
    checkout: Path, tmp_path: Path, python: Callable[..., str]
) -> None:
    (checkout / "fastema/counting/down.py").write_text("count = lambda n: 6\nunused = True\n")
    begin = "fastema/counting/down.py: `"
    unused = f"{begin}unused = True` -> `unused = False`"
    now_caught = f"{begin}count = lambda n: 6` -> `count = lambda n: 7`"
    score = {"seed": 1, "caught": 1, "made": 3, "survivors": {unused: "note", now_caught: ""}}
    stored = tmp_path / "scores.json"
    stored.write_text(json.dumps({"counting": score}))
    script = """
        import sys
        from pathlib import Path
        from tests import mutants

        mutants.SCORES = Path(sys.argv.pop())
        mutants.main()
    """
    said = python(script, "counting", "--again", "--write", "--root", str(checkout), str(stored))
    assert len(said.splitlines()) == 3  # time, one mutant, score
    score = {"seed": 1, "caught": 2, "made": 3, "survivors": {unused: "note"}}
    assert json.loads(stored.read_text()) == {"counting": score}


def test_mutants_of_the_engine_find_the_cache_as_the_unchanged_room_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "fastema/engine/disk.py": "first, second = True, True\n",
        "tests/engine/test_disk.py": """
import os, pathlib

def test_cache():
    cache = pathlib.Path(os.environ["XDG_CACHE_HOME"])
    entries = len([*cache.iterdir()])
    (cache / str(entries)).touch()
    assert entries < 2
""",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    command = [sys.executable, "-m", "tests.mutants", "engine", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "engine, seed 1: 0 of 2 caught", done.stderr
    assert not (tmp_path / "user").exists()


def test_tests_that_fail_without_a_fault_give_no_score(checkout: Path) -> None:
    (checkout / "tests/counting/test_down.py").write_text("def test_it():\n    assert 0\n")
    command = [sys.executable, "-m", "tests.mutants", "counting", "--root", str(checkout)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "without a fault: tests/counting/test_down.py::test_it" in done.stderr


def test_a_seed_chooses_the_same_mutants_of_which_a_smaller_count_takes_the_first(
    checkout: Path,
) -> None:
    ten = choose("counting", 10, 3, checkout)
    assert choose("counting", 10, 3, checkout) == ten
    assert choose("counting", 4, 3, checkout) == ten[:4]
    assert choose("counting", 10, 4, checkout) != ten


def test_texts_types_and_imports_never_change(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '''"""Text: 1 < 2."""
from typing import TYPE_CHECKING, Literal, cast
if TYPE_CHECKING:
    import os.path
__all__ = ["a", *("b" + "c" for _ in range(1))]
x: Literal[1] = cast(Literal[2], object)
def f(n: "int | None" = None) -> Literal[1]:
    """1 < 2."""
    raise ValueError(f"{1 + 2} " + "more than %d" % 1)
'''
    )
    found = [(one.line, one.new) for one in mutants_of(tmp_path / "m.py", tmp_path)]
    assert found == [(9, "pass")]


def test_every_mutant_of_a_room_is_a_program() -> None:
    for one in choose("rules", 40, 1):
        text = (ROOT / one.file).read_bytes()
        compile(text[: one.start] + one.new.encode() + text[one.end :], one.file, "exec")


def test_rooms_of_scores_and_of_tests_exist() -> None:
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    assert all(map(sources_of, {*scores, *TESTS}))
    for room in {*scores, *TESTS}:
        for place in TESTS.get(room, [f"tests/{room}"]):
            assert (ROOT / place).exists(), place
