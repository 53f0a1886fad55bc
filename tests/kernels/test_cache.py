"""Where machine code is kept: found again, never stale, never trusted blindly, never required."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

import fastema
from fastema.kernels import jit
from fastema.kernels import stamp as stamps

KERNELS = Path(fastema.__file__).parent / "kernels"

# Kernels of one function, told apart by what it closes over: which of them come from the cache.
SEVERAL = """
    import sys
    import numpy as np
    import fastema
    from fastema.engine.registry import kernel
    FORMS = {"f2": "f16", "f4": "f32", "f8": "f64"}
    for dtype in sys.argv[1:]:
        avg, x = np.arange(1, 101, dtype=np.float32), np.arange(2, 202, 2).astype(dtype)
        fastema.lerp_([avg], [x], 0.5)
        np.testing.assert_array_equal(avg, 1.5 * np.arange(1, 101))
        made = kernel("lerp", ("f32", FORMS[dtype]), "flat")
        print(f"{dtype}:{sum(made.stats.cache_hits.values())}")
"""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_only_what_is_used_is_compiled_and_only_once(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    cache = tmp_path / "cache"
    assert python(SEVERAL, "f2", NUMBA_CACHE_DIR=str(cache)).split() == ["f2:0"]
    made = _files(cache)
    assert sorted(path.suffix for path in made) == [".nbc", ".nbi"]
    assert all(path.is_relative_to(cache / "fastema" / jit.SOURCE_STAMP) for path in made)
    times = [path.stat().st_mtime_ns for path in made]
    assert python(SEVERAL, "f2", NUMBA_CACHE_DIR=str(cache)).split() == ["f2:1"]
    assert _files(cache) == made
    assert [path.stat().st_mtime_ns for path in made] == times


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".nbc", b"\x80\x04junk" * 99),
        pytest.param(".nbc", b"", marks=pytest.mark.slow),
        pytest.param(".nbi", b"\x80\x04junk" * 99, marks=pytest.mark.slow),
        pytest.param(".nbi", None, marks=pytest.mark.slow),
    ],
    ids=["garbage", "empty", "an index of garbage", "half an index"],
)
def test_a_damaged_entry_is_compiled_again_and_made_good_and_others_are_kept(
    suffix: str, content: bytes | None, warm_cache: Path, python: Callable[..., str]
) -> None:
    (entry,) = (path for path in _files(warm_cache) if path.suffix == suffix)
    python(SEVERAL, "f8", NUMBA_CACHE_DIR=str(warm_cache))
    stored = entry.read_bytes()
    entry.write_bytes(stored[: len(stored) // 2] if content is None else content)
    seen = [python(SEVERAL, "f2", "f8", NUMBA_CACHE_DIR=str(warm_cache)).split() for _ in range(3)]
    # Numba writes the machine code first: it takes a second time to be found where that was bad.
    assert seen[0] == ["f2:0", "f8:1"]
    assert seen[2] == ["f2:1", "f8:1"]


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory: pytest.TempPathFactory, python: Callable[..., str]) -> Path:
    cache = tmp_path_factory.mktemp("warm")
    python(SEVERAL, "f2", NUMBA_CACHE_DIR=str(cache))
    return cache


@pytest.fixture
def warm_cache(filled_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled_cache, tmp_path / "copy"))


# Numba reads the index, writes it with a new number, and then the machine code under that number.
# Both processes read it while it is empty; the second writes all, then the first its code.
RACE = """
    import sys
    import time
    from pathlib import Path
    from numba.core.caching import IndexDataCacheFile as File

    folder, me, other = Path(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1)
    save_index, save_data = File._save_index, File._save_data

    def say(what):
        (folder / f"{me} {what}").touch()

    def wait_for(what):
        for _ in range(4000):
            if (folder / f"{other} {what}").exists():
                return
            time.sleep(0.01)
        raise SystemExit(f"{other} has not {what}")

    def slow_index(file, overloads):
        say("read the index")
        wait_for("read the index" if me == "first" else "written the index")
        save_index(file, overloads)
        say("written the index")

    def slow_data(file, name, data):
        if me == "first":
            wait_for("written its code")
        save_data(file, name, data)
        say("written its code")

    File._save_index, File._save_data = slow_index, slow_data
"""


@pytest.mark.slow
def test_no_kernel_is_given_the_code_of_another_one(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    cache, signs = tmp_path / "cache", tmp_path / "signs"
    signs.mkdir()
    both = """
        import subprocess, sys
        script, signs = sys.argv[1:]
        runs = [
            subprocess.Popen([sys.executable, "-c", script, signs, me, other, dtype])
            for me, other, dtype in (("first", "second", "f2"), ("second", "first", "f4"))
        ]
        assert [run.wait() for run in runs] == [0, 0]
    """
    script = dedent(RACE) + dedent(SEVERAL)
    python(both, script, str(signs), NUMBA_CACHE_DIR=str(cache))
    assert len(_files(signs)) == 6
    for dtype in ("f2", "f4"):
        found = python(SEVERAL, dtype, NUMBA_CACHE_DIR=str(cache))
        assert found.strip() == f"{dtype}:1"


FOLDERS = """
    import json
    import sys
    from pathlib import Path
    from fastema.engine import registry
    from fastema.kernels import jit

    of, made = jit._entry_folder, []
    jit._entry_folder = lambda folder, function: made.append(of(folder, function)) or made[-1]
    jit.cache_folder = lambda: Path("nowhere")
    jit.numba.njit = lambda *arguments, **options: lambda function: function
    found = {}
    for key in json.loads(sys.argv[1]):
        operation, formats, layout = key
        registry.kernel(operation, tuple(formats), layout)
        found[str(key)] = made[-1].name
    print(json.dumps(found))
"""
FORMATS = {
    "lerp": "f32 f32, f32 bf16, bf16 bf16, bf16~ bf16, f16~ f64, f16 f64, bf16+16 f32",
    "lerp_measured": "f32 f32, bf16~ bf16",
    "add": "f32 f32, f64 f32",
    "copy": "f32 f16, raw1 raw1, raw2 raw2",
    "cast_back": "f32 bf16, bf16+16 bf16",
    "finite": "f32 f32, f32 bf16",
    "window": "f32 f32 f32 f32, f64 f32 f32 f64",
    "swap": "f32 f32, raw4 raw4, raw8 raw8",
    "park": "raw4 raw2",
    "unpark": "raw4 raw2",
    "read_read_write": "raw8 raw8",
}
KEYS = [
    [operation, formats.split(), layout]
    for operation, several in FORMATS.items()
    for formats in several.split(", ")
    for layout in ("flat", "strided")
]


def test_every_kernel_has_a_folder_of_its_own_the_same_in_every_process(
    python: Callable[..., str],
) -> None:
    one = json.loads(python(FOLDERS, json.dumps(KEYS), PYTHONHASHSEED="1"))
    assert len(one) == len(set(one.values())) == len(KEYS)
    # Neither the seed of hashes nor what was made before has a say.
    assert json.loads(python(FOLDERS, json.dumps(KEYS[::-1]), PYTHONHASHSEED="2")) == one


def test_code_for_another_cpu_or_of_another_numba_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Callable[..., str]
) -> None:
    """Machines of several kinds share a home; two at once would be given one number there too."""
    keys = json.dumps(KEYS[:1])
    own = json.loads(python(FOLDERS, keys, NUMBA_CPU_NAME=None, NUMBA_CPU_FEATURES=None))
    other = json.loads(python(FOLDERS, keys, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))
    assert own.keys() == other.keys()
    assert own != other
    here = jit._entry_folder(tmp_path, test_an_edit_is_never_answered_with_old_code)
    monkeypatch.setattr(jit.numba, "__version__", "9.9")
    assert jit._entry_folder(tmp_path, test_an_edit_is_never_answered_with_old_code) != here


def test_the_stamp_covers_every_kernel_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stamps, "__file__", str(copy / "stamp.py"))
    stamp = stamps.source_stamp
    assert stamp() == jit.SOURCE_STAMP
    seen = {stamp()}
    for source in sorted(copy.glob("*.py")):
        with source.open("a") as file:
            file.write("# \n")
        assert stamp() not in seen, source.name
        seen.add(stamp())
    (copy / "new.py").write_text("")
    assert stamp() not in seen


def test_an_edit_is_never_answered_with_old_code(tmp_path: Path) -> None:
    package = tmp_path / "fastema"
    shutil.copytree(
        Path(fastema.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    script = (
        "import numpy as np, fastema; a = np.ones(3, np.float32); "
        "fastema.lerp_(a, a * 3, 0.25); print(*a)"
    )

    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }

    def run() -> str:
        command = [sys.executable, "-c", script]
        return subprocess.check_output(command, env=environment, text=True, cwd=tmp_path).strip()

    assert run() == "1.5 1.5 1.5"
    source = package / "kernels" / "scalar.py"
    text = source.read_text()
    assert "fma(w, x - avg, avg)" in text
    source.write_text(text.replace("fma(w, x - avg, avg)", "fma(w, x - avg, avg) + avg"))
    assert run() == "2.5 2.5 2.5"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="modes of files are those of POSIX")
@pytest.mark.parametrize("open_to", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize("level", ["root", "folder"])
def test_a_folder_that_others_can_write_is_not_used(
    level: str, open_to: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, private = tmp_path / "shared", tmp_path / "private"
    monkeypatch.setattr(jit, "_roots", lambda: iter([shared, private]))
    folder = shared / jit.SOURCE_STAMP
    folder.mkdir(mode=0o700, parents=True)
    exposed = shared if level == "root" else folder
    exposed.chmod(0o700 | open_to)
    assert jit.cache_folder.__wrapped__() == private / jit.SOURCE_STAMP
    exposed.chmod(0o700)
    assert jit.cache_folder.__wrapped__() == folder


def test_the_setting_of_numba_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", "elsewhere")
    with jit._cache_directory(tmp_path):
        assert str(tmp_path) == config.CACHE_DIR
    assert config.CACHE_DIR == "elsewhere"
