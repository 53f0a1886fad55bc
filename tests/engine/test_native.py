"""CPU kernels as machine code: cached, never stale, and loaded only from safe folders."""

import compileall
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, SimpleNamespace

import pytest

import fastema
from fastema.engine import build_kernels, disk_cache, native
from fastema.kernels import stamp as stamps

KERNELS = Path(fastema.__file__).parent / "kernels"

COMPILE = {"NUMBA_OPT": "3"}
"""Any Numba setting makes Numba compile: kernels that came with a wheel are not loaded."""

UPDATES = """
    import sys
    import numpy as np
    import fastema
    for dtype in sys.argv[1:]:
        avg, x = np.arange(1, 101, dtype=np.float32), np.arange(2, 202, 2).astype(dtype)
        before = "numba" in sys.modules
        fastema.lerp_([avg], [x], 0.5)
        np.testing.assert_array_equal(avg, 1.5 * np.arange(1, 101))
        print("found" if before == ("numba" in sys.modules) else "compiled")
"""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_only_used_kernels_are_compiled_and_only_once(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    cache = tmp_path / "cache"
    assert python(UPDATES, "f2", NUMBA_CACHE_DIR=str(cache), **COMPILE).split() == ["compiled"]
    made = _files(cache)
    operations = [path.name.partition("-")[0] for path in made]
    assert operations == ["lerp", "run_launches", "run_program"]
    assert {path.suffix for path in made} == {".o"}
    assert {path.parent for path in made} == {cache / "fastema" / disk_cache.SOURCE_STAMP}
    before = [path.stat() for path in made]
    assert python(UPDATES, "f2", NUMBA_CACHE_DIR=str(cache), **COMPILE).split() == ["found"]
    assert _files(cache) == made
    after = [path.stat() for path in made]
    assert [(one.st_mtime_ns, one.st_ino) for one in after] == [
        (one.st_mtime_ns, one.st_ino) for one in before
    ]


def test_each_cpu_and_each_compiler_has_its_own_cache_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines of different kinds may share a home directory."""
    monkeypatch.setattr(native, "supported_levels", lambda: ())
    monkeypatch.setattr(native, "_numba_target", lambda: None)
    monkeypatch.setattr(native, "compiled", lambda *key: b"code")
    monkeypatch.setattr(disk_cache, "folder", lambda: tmp_path)
    for change in (
        lambda: None,
        lambda: monkeypatch.setattr(
            native, "_detect_host", lambda: ("x86_64-linux", "other", "+avx2")
        ),
        lambda: monkeypatch.setenv("NUMBA_CPU_NAME", "generic"),
        lambda: monkeypatch.setenv("NUMBA_OPT", "1"),
        lambda: monkeypatch.setattr(disk_cache, "versions", lambda *names: ("numba 9.9",)),
    ):
        before = _files(tmp_path)
        change()
        for _ in range(2):
            assert native._load_code("lerp", ("f32", "f32"), "flat") == b"code"
        assert len(_files(tmp_path)) == len(before) + 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("CPU_NAME", "generic"), ("OPT", 1), ("LOOP_VECTORIZE", 0), ("SLP_VECTORIZE", 1)),
        *(("DISABLE_INTEL_SVML", 1), ("BOUNDSCHECK", 1), ("DEBUGINFO_DEFAULT", 1)),
    ],
)
def test_numba_settings_made_in_python_change_the_entry_and_forbid_shipped_code(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba.core import config

    default = native._find_target()
    monkeypatch.setattr(config, name, value)
    changed = native._find_target()
    assert changed != default
    assert native.supported_levels() == ()
    monkeypatch.undo()
    assert native._find_target() == default


def test_numba_optimizing_to_the_maximum_is_not_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import numba  # noqa: F401

    default = native._find_target()
    monkeypatch.setenv("NUMBA_OPT", "max")  # equals 3
    from_environment = native._find_target()
    monkeypatch.delenv("NUMBA_OPT")
    assert from_environment.settings["OPT"] == "max"
    assert native._find_target() == default


def test_numba_that_is_imported_has_the_same_entries(python: Callable[..., str]) -> None:
    script = """
    import sys
    from fastema.engine import native
    before = native._find_target()
    assert "numba" not in sys.modules
    import numba
    assert native._find_target() == before, native._find_target()
    print(before.settings)
    """
    settings = dict.fromkeys(native._VARIABLES)
    assert python(script, **settings).strip() == "{}"


def test_settings_in_a_configuration_file_have_entries_of_their_own(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    pytest.importorskip("yaml")
    (tmp_path / ".numba_config.yaml").write_text("cpu_name: generic\ncpu_features: ''\nopt: '1'\n")
    script = """
    import os, sys
    from fastema.engine import native
    plain = native._find_target()
    os.chdir(sys.argv[1])
    target = native._find_target()
    assert target.processor == (plain.processor[0], "generic", ""), target
    assert target.settings == {"OPT": "1"}, target
    print(*native.supported_levels())
    """
    settings = dict.fromkeys(native._VARIABLES)
    assert python(script, str(tmp_path), **settings).strip() == ""


needs_levels = pytest.mark.skipif(
    not native.supported_levels(), reason="a wheel has no code for this machine"
)

SHIPPED = """
    import sys
    from pathlib import Path
    from fastema.engine import shipped
    shipped.FOLDER = Path(sys.argv.pop(1))
"""


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ("avx2 bmi bmi2 f16c fma lzcnt movbe", ["x86-64-v3"]),
        ("avx2 bmi bmi2 fma lzcnt movbe", []),
        ("avx512f avx512bw avx512cd avx512dq avx512vl", []),
        (
            "avx2 bmi bmi2 f16c fma lzcnt movbe avx512f avx512bw avx512cd avx512dq avx512vl",
            ["x86-64-v4", "x86-64-v3"],
        ),
    ],
)
def test_a_processor_gets_the_best_code_it_can_run(
    features: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_detect_features", lambda: dict.fromkeys(features.split(), True))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native, "_detect_host", lambda: ("x86_64-linux", "some", features))
    monkeypatch.setattr(native, "_numba_target", lambda: None)
    for name in native._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert list(native.supported_levels()) == found
    with monkeypatch.context() as patch:
        patch.setenv("NUMBA_CPU_NAME", "generic")
        assert native.supported_levels() == ()
    with monkeypatch.context() as patch:
        patch.setattr(native.platform, "machine", lambda: "aarch64")
        assert native.supported_levels() == ()
        with pytest.raises(RuntimeError, match="on x86-64"):
            build_kernels.build(Path("nowhere"), "cpu", [], 1)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert native.supported_levels() == ()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the kernels of a few operations as a wheel ships them."""
    folder = tmp_path_factory.mktemp("wheel")
    build_kernels.build(folder / "cpu", "cpu", ["check_tensors", "finite"], 2)
    return folder


@needs_levels
@pytest.mark.full
def test_shipped_code_needs_no_compiler_and_gives_the_same_results(
    wheel: Path, tmp_path: Path, python: Callable[..., str]
) -> None:
    script = """
    import json
    import numpy as np
    from fastema.engine import registry
    from fastema.kernels import table as abi
    found = []
    for layout in ("flat", "strided"):
        x = np.random.default_rng(3).normal(size=1000).astype(np.float32)
        x[::7] = np.nan
        table, control = np.zeros((1, abi.COLUMNS), np.int64), np.zeros(abi.CONTROLS, np.int64)
        table[0, abi.DST] = table[0, abi.SRC] = x.ctypes.data
        table[0, abi.COUNT], table[0, abi.DST_STEP], table[0, abi.SRC_STEP] = 1000, 1, 1
        table[0, abi.INDEX_RUN] = 1
        numbers, results = np.ones(1), np.empty(1)
        control[abi.CLAIM], control[abi.RESULTS] = 1, results.ctypes.data
        finite = registry.kernel("finite", ("f32", "f32"), layout)
        finite(table.ctypes.data, 1, numbers.ctypes.data, control.ctypes.data)
        found.append(results[0])
    print(json.dumps([found, "numba" in sys.modules]))
    """
    cache = str(tmp_path / "cache")
    script = SHIPPED + script
    assert json.loads(python(script, str(wheel), NUMBA_CACHE_DIR=cache)) == [[143.0] * 2, False]
    assert not _files(tmp_path)
    # Kernels built from other sources are not loaded.
    other = tmp_path / "other"
    shutil.copytree(wheel, other)
    (other / "cpu" / "stamp").write_text("0" * 16)
    assert json.loads(python(script, str(other), NUMBA_CACHE_DIR=cache)) == [[143.0] * 2, True]


def test_stamp_covers_every_kernel_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stamps, "__file__", str(copy / "stamp.py"))
    stamp = stamps.source_stamp
    assert stamp() == disk_cache.SOURCE_STAMP
    seen = {stamp()}
    for source in sorted(copy.glob("*.py")):
        with source.open("a") as file:
            file.write("# \n")
        assert stamp() not in seen, source.name
        seen.add(stamp())
    (copy / "new.py").write_text("")
    assert stamp() not in seen


@pytest.mark.parametrize("installed", ["zip", "pyc only", "pyc only, zip"])
def test_stamp_changes_with_a_kernel_that_has_no_source_file(
    installed: str, tmp_path: Path, python: Callable[..., str]
) -> None:
    script = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from fastema.kernels import stamp
    assert stamp.__file__.startswith(sys.argv[1])
    print(stamp.source_stamp())
    """
    stamps_seen = []
    for version in ("one", "two"):
        tree = tmp_path / version
        shutil.copytree(KERNELS, tree / "fastema" / "kernels")
        (tree / "fastema" / "__init__.py").write_text("")
        source = tree / "fastema" / "kernels" / "scalar.py"
        source.write_text(source.read_text() + ("\n_EDITED = 1\n" if version == "two" else ""))
        if "pyc" in installed:
            compileall.compile_dir(tree, quiet=2, legacy=True)
            for path in tree.rglob("*.py"):
                path.unlink()
        if "zip" in installed:
            tree = Path(shutil.make_archive(str(tree), "zip", tree))
        stamps_seen.append(python(script, str(tree)))
    assert stamps_seen[0] != stamps_seen[1]


def test_stamp_changes_with_the_bytecode_of_a_frozen_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen program's loader gives code objects, and no file."""
    added = ""

    def get_code(name: str) -> CodeType:
        source = (KERNELS / f"{name.rpartition('.')[2]}.py").read_text()
        return compile(source + added * name.endswith(".scalar"), name, "exec")

    spec = SimpleNamespace(origin=None, loader=SimpleNamespace(get_code=get_code))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr(stamps, "__file__", str(tmp_path / "stamp.pyc"))
    first = stamps.source_stamp()
    assert stamps.source_stamp() == first
    added = "\n_EDITED = 1\n"
    edited = stamps.source_stamp()
    added = "\n_EDITED = 2\n"
    assert len({first, edited, stamps.source_stamp()}) == 3
    monkeypatch.setattr("pkgutil.iter_modules", lambda *args: iter(()))
    last_resort = stamps.source_stamp()
    monkeypatch.setattr(fastema, "__version__", "99.0")
    assert stamps.source_stamp() != last_resort


def test_bytecode_is_described_alike_in_every_process(python: Callable[..., str]) -> None:
    script = """
    from fastema.kernels.stamp import _describe
    source = "def f(x): return x in {'one', 'two', 'three', 'four'} and (0.5, -0.0, 'a', (1, {2}))"
    print(_describe(compile(source, "somewhere", "exec")))
    """
    first, second = (python(script, PYTHONHASHSEED=seed) for seed in "12")
    assert first == second


def test_an_edited_kernel_is_recompiled(tmp_path: Path) -> None:
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


needs_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX file modes")


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the cache be in ``above/shared/fastema``, or else in ``private/fastema``."""
    (tmp_path / "above" / "shared").mkdir(parents=True)
    places = tmp_path / "above" / "shared" / "fastema", tmp_path / "private" / "fastema"
    monkeypatch.setattr(disk_cache, "_roots", lambda: iter(places))
    return tmp_path


def chosen() -> str:
    """Return which of the two places the cache is in."""
    found = disk_cache.folder.__wrapped__()
    assert found is not None
    assert found.name == disk_cache.SOURCE_STAMP
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    return found.parents[1].name


@needs_owners
@pytest.mark.parametrize("open_to", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize("level", [0, 1, 2, 3], ids=["folder", "root", "parent", "above"])
def test_a_folder_that_others_can_write_or_exchange_is_not_used(
    level: int, open_to: int, roots: Path
) -> None:
    assert chosen() == "shared"
    folder = roots / "above" / "shared" / "fastema" / disk_cache.SOURCE_STAMP
    exposed = [folder, *folder.parents][level]
    exposed.chmod(0o700 | open_to)
    assert chosen() == "private"
    exposed.chmod(0o700)
    assert chosen() == "shared"


@needs_owners
def test_a_cache_below_a_sticky_folder_is_used(roots: Path) -> None:
    """In /tmp everyone can create files, but nobody can rename another user's."""
    (roots / "above").chmod(0o1777)
    assert chosen() == "shared"


def pretend_owner(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file, folder or link appear to belong to another user."""
    another, lstat, fstat = os.geteuid() + 12_345, os.lstat, os.fstat
    inode = lstat(path).st_ino

    def owned(status: os.stat_result) -> os.stat_result:
        if status.st_ino != inode:
            return status
        return os.stat_result((*status[:4], another, *status[5:]))

    monkeypatch.setattr(os, "lstat", lambda path: owned(lstat(path)))
    monkeypatch.setattr(os, "fstat", lambda descriptor: owned(fstat(descriptor)))


@needs_owners
@pytest.mark.parametrize("level", [0, 1, 2, 3], ids=["folder", "root", "parent", "above"])
def test_a_folder_below_that_of_another_user_is_not_used(
    level: int, roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen() == "shared"
    folder = roots / "above" / "shared" / "fastema" / disk_cache.SOURCE_STAMP
    pretend_owner([folder, *folder.parents][level], monkeypatch)
    assert chosen() == "private"


@needs_owners
@pytest.mark.parametrize("relative", [False, True])
def test_only_links_of_this_user_lead_to_the_cache(
    relative: bool, roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = roots / "above" / "shared"
    link.rmdir()
    target = roots / "elsewhere" / "big"
    target.mkdir(parents=True)
    link.symlink_to("../elsewhere/./big" if relative else target)
    assert chosen() == "big"
    # Later changes of the link lead nowhere else: the path was resolved when it was checked.
    assert disk_cache.folder.__wrapped__() == target / "fastema" / disk_cache.SOURCE_STAMP
    pretend_owner(link, monkeypatch)
    assert chosen() == "private"


@needs_owners
def test_links_that_never_end_are_no_cache(roots: Path) -> None:
    link = roots / "above" / "shared"
    link.rmdir()
    link.symlink_to(link)
    assert chosen() == "private"


@needs_owners
@pytest.mark.parametrize("fault", ["link", "owner", "mode"])
def test_an_entry_that_another_user_could_have_written_is_not_loaded(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, code = tmp_path / "lerp.o", b"code"
    disk_cache.write(entry, code)
    assert disk_cache.read(entry) == code
    if fault == "link":
        entry.rename(tmp_path / "other.o")
        entry.symlink_to(tmp_path / "other.o")
    elif fault == "owner":
        pretend_owner(entry, monkeypatch)
    else:
        entry.chmod(0o620)
    assert disk_cache.read(entry) is None
