"""GPU kernels kept on disk: found again, whole or not at all, never those of other sources."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastema.engine import cubins
from fastema.engine.cubins import CLOCK, INSTALL, Cubin, Key, Unavailable, cubin
from fastema.kernels import jit

from ..support.requirements import require_packages

KEY = Key("lerp", ("f32", "bf16"), "flat", (9, 0))


class Compiler:
    """Makes cubins that tell which key they are of, and counts."""

    def __init__(self, size: int = 20_000) -> None:
        self.size = size
        self.asked: list[Key] = []

    def __call__(self, key: Key) -> Cubin:
        self.asked.append(key)
        return content(key, self.size)


def content(key: Key, size: int) -> Cubin:
    generator = np.random.default_rng(list(repr(key).encode()))
    return Cubin(f"kernel_of_{key.operation}_é", generator.bytes(size))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    return tmp_path


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_kernel_is_compiled_once(folder: Path) -> None:
    compiler = Compiler()
    first = cubin(KEY, compiler)
    assert first == content(KEY, compiler.size)
    entry = only(folder)
    assert entry.suffix == ".cubin"
    assert entry.name.startswith("lerp-")
    before = entry.stat()
    assert cubin(KEY, compiler) == first
    assert compiler.asked == [KEY]
    assert (only(folder).stat().st_mtime_ns, entry.stat().st_ino) == (
        before.st_mtime_ns,
        before.st_ino,
    )


def test_nobody_else_can_write_an_entry(folder: Path) -> None:
    cubin(KEY, Compiler())
    assert not only(folder).stat().st_mode & 0o022


@given(name=st.text(max_size=300), code=st.binary(max_size=3_000))
def test_any_cubin_is_read_as_it_was_written(name: str, code: bytes) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no compiler makes
        return
    made = Cubin(name, code)
    assert cubins._unpacked(cubins._packed(made)) == made


OTHER_KEYS = [
    KEY._replace(operation="copy"),
    KEY._replace(formats=("bf16", "f32")),
    KEY._replace(formats=("f32", "bf16", "f32", "f32")),
    KEY._replace(layout="strided"),
    KEY._replace(capability=(8, 0)),
    KEY._replace(capability=(12, 0)),
    Key(CLOCK, (), "", (9, 0)),
]


def test_every_key_has_an_entry_of_its_own(folder: Path) -> None:
    compiler = Compiler()
    for _ in range(2):
        for key in (KEY, *OTHER_KEYS):
            assert cubin(key, compiler) == content(key, compiler.size)
    assert compiler.asked == [KEY, *OTHER_KEYS]
    assert len(list(folder.iterdir())) == 1 + len(OTHER_KEYS)


def test_other_sources_are_another_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    cubin(KEY, compiler)
    monkeypatch.setattr(jit, "SOURCE_STAMP", "0123456789abcdef")
    cubin(KEY, compiler)
    assert compiler.asked == [KEY, KEY]
    monkeypatch.undo()
    monkeypatch.setattr(jit, "cache_folder", lambda: folder)
    cubin(KEY, compiler)
    assert compiler.asked == [KEY, KEY]


@pytest.mark.parametrize("name", cubins._COMPILERS)
@pytest.mark.parametrize("change", ["another", "none"])
def test_other_compilers_make_another_kernel(
    name: str, change: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = dict.fromkeys(cubins._COMPILERS, "1.2.3")

    def version(asked: str) -> str:
        if asked not in versions:
            raise cubins.metadata.PackageNotFoundError(asked)
        return versions[asked]

    monkeypatch.setattr(cubins, "_versions", cubins._versions.__wrapped__)
    monkeypatch.setattr(cubins.metadata, "version", version)
    compiler = Compiler()
    cubin(KEY, compiler)
    if change == "none":
        del versions[name]
    else:
        versions[name] = "1.2.4"
    cubin(KEY, compiler)
    assert compiler.asked == [KEY, KEY]
    versions[name] = "1.2.3"
    cubin(KEY, compiler)
    assert compiler.asked == [KEY, KEY]


def test_the_compilers_that_are_here_are_told_apart() -> None:
    require_packages("numba_cuda", "cuda.core")
    known = {one.split()[0] for one in cubins._versions()}
    assert known >= {"numba", "numba-cuda", "llvmlite", "cuda-core"}


# -- damage ---------------------------------------------------------------------------------------


def damaged(stored: bytes, kind: str, generator: np.random.Generator) -> bytes:
    if kind == "empty":
        return b""
    if kind == "truncated":
        return stored[: int(generator.integers(1, len(stored)))]
    if kind == "longer":
        return stored + generator.bytes(int(generator.integers(1, 100)))
    if kind == "magic":
        return b"fastema cubin 0\n" + stored[16:]
    if kind == "garbage":
        return generator.bytes(len(stored))
    if kind == "zeros":  # what some file systems leave after a power cut
        return bytes(len(stored))
    flipped = bytearray(stored)
    flipped[int(generator.integers(len(stored)))] ^= 1 << int(generator.integers(8))
    return bytes(flipped)


@pytest.mark.parametrize(
    "kind", ["empty", "truncated", "longer", "magic", "garbage", "zeros", "flipped"]
)
def test_a_damaged_entry_is_compiled_again_and_made_good(kind: str, folder: Path) -> None:
    generator = np.random.default_rng(len(kind))
    compiler = Compiler(300)
    whole = cubin(KEY, compiler)
    entry = only(folder)
    stored = entry.read_bytes()
    for turn in range(40):
        entry.write_bytes(damaged(stored, kind, generator))
        assert cubin(KEY, compiler) == whole
        assert len(compiler.asked) == 2 + turn
        assert only(folder).read_bytes() == stored
    assert cubin(KEY, compiler) == whole
    assert len(compiler.asked) == 41


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_single_damage_goes_unseen(data: st.DataObject) -> None:
    stored = cubins._packed(content(KEY, 64))
    place = data.draw(st.integers(0, len(stored) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != stored[place]))
    assert cubins._unpacked(stored[:place] + bytes([value]) + stored[place + 1 :]) is None
    assert cubins._unpacked(stored[:place]) is None


def test_an_entry_of_another_key_is_not_taken_for_a_whole_one(folder: Path) -> None:
    """Names are hashes of all that the code depends on; nothing inside has to be believed."""
    compiler = Compiler()
    cubin(KEY, compiler)
    path = cubins._path(KEY)
    assert path == only(folder)
    names = {cubins._path(key) for key in OTHER_KEYS}
    assert len(names) == len(OTHER_KEYS)
    assert path not in names


# -- folders that cannot be used ------------------------------------------------------------------


def absent(folder: Path) -> Path | None:
    return folder / "not" / "there"


def a_file(folder: Path) -> Path | None:
    path = folder / "file"
    path.write_text("")
    return path


def none_at_all(folder: Path) -> Path | None:
    return None


def no_writing(folder: Path) -> Path | None:
    if hasattr(os, "geteuid") and not os.geteuid():
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)
    return folder


@pytest.mark.parametrize("place", [absent, a_file, none_at_all, no_writing])
def test_without_a_folder_kernels_are_compiled_each_time(
    place: Callable[[Path], Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(tmp_path)
    monkeypatch.setattr(jit, "cache_folder", lambda: folder)
    compiler = Compiler()
    for _ in range(2):
        assert cubin(KEY, compiler) == content(KEY, compiler.size)
    assert compiler.asked == [KEY, KEY]
    tmp_path.chmod(0o700)
    assert not list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize("failing", ["mkstemp", "fdopen", "replace"])
def test_a_full_disk_leaves_nothing_behind(
    failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile if failing == "mkstemp" else os, failing, full)
    compiler = Compiler()
    assert cubin(KEY, compiler) == content(KEY, compiler.size)
    assert not list(folder.iterdir())
    monkeypatch.undo()


def test_a_folder_in_the_place_of_an_entry(folder: Path) -> None:
    path = cubins._path(KEY)
    assert path is not None
    path.mkdir()
    compiler = Compiler()
    assert cubin(KEY, compiler) == content(KEY, compiler.size)
    assert list(folder.iterdir()) == [path]


# -- several processes ----------------------------------------------------------------------------

WRITERS = """
    import os, signal, sys, time
    from pathlib import Path
    import numpy as np
    from fastema.engine import cubins
    from fastema.engine.cubins import Cubin, Key, cubin
    from fastema.kernels import jit

    folder, role = Path(sys.argv[1]), sys.argv[2]
    jit.cache_folder = lambda: folder
    KEYS = [Key("lerp", ("f32", f), "flat", (9, 0)) for f in ("f32", "f16", "bf16")]

    def content(key):
        generator = np.random.default_rng(list(repr(key).encode()))
        return Cubin(repr(key), generator.bytes(1 << 20))

    CONTENT = {key: content(key) for key in KEYS}
"""


def test_processes_do_not_disturb_each_other(tmp_path: Path, python: Callable[..., str]) -> None:
    """Each finds whole entries or none, while the others write them and take them away."""
    out = python(
        WRITERS
        + """
    children = []
    for child in range(3):
        pid = os.fork()
        if not pid:
            generator, hits, misses = np.random.default_rng(child), 0, 0
            for _ in range(150):
                key = KEYS[generator.integers(3)]
                asked = []
                found = cubin(key, lambda key: asked.append(key) or CONTENT[key])
                assert found == CONTENT[key]
                hits, misses = hits + (not asked), misses + bool(asked)
                if generator.random() < 0.3:
                    cubins._path(key).unlink(missing_ok=True)
            assert hits > 10 and misses > 10, (hits, misses)
            os._exit(0)
        children.append(pid)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(ends, sorted(path.suffix for path in folder.iterdir() if path.suffix != ".cubin"))
    """,
        str(tmp_path),
        "several",
    )
    assert out.split("\n")[0] == "[0, 0, 0] []"


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    out = python(
        WRITERS
        + """
    generator = np.random.default_rng(1)
    whole = halves = turns = 0
    while turns < 30 or (whole + halves < 6 and turns < 1_000):
        turns += 1
        pid = os.fork()
        if not pid:
            while True:  # compile, write, take away, until killed
                for key in KEYS:
                    cubin(key, CONTENT.__getitem__)
                    cubins._path(key).unlink(missing_ok=True)
        time.sleep(generator.uniform(0.002, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        halves += any(path.suffix == ".tmp" for path in folder.iterdir())
        for path in folder.glob("*.tmp"):
            path.unlink()
        for key in KEYS:
            asked = []
            assert cubin(key, lambda key: asked.append(key) or CONTENT[key]) == CONTENT[key]
            whole += not asked
            cubins._path(key).unlink()
    print(whole, halves)
    """,
        str(tmp_path),
        "killed",
    )
    whole, halves = map(int, out.split())
    assert whole + halves >= 6  # so many were killed in the middle of it


def test_a_process_that_ends_before_the_entry_is_in_place(
    tmp_path: Path, python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = python(
        WRITERS
        + """
    for where in ("replace", "write"):
        pid = os.fork()
        if not pid:
            if where == "replace":
                os.replace = lambda *paths: os._exit(9)
            else:
                class Half(bytes):
                    pass
                opened = os.fdopen
                def fdopen(*args):
                    file = opened(*args)
                    file.raw.write(b"fastema cubin 1\\n" + bytes(1000))
                    os._exit(9)
                os.fdopen = fdopen
            cubin(KEYS[0], CONTENT.__getitem__)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert not list(folder.glob("*.cubin"))
        assert list(folder.glob("*.tmp"))
    asked = []
    for _ in range(2):
        assert cubin(KEYS[0], lambda key: asked.append(key) or CONTENT[key]) == CONTENT[KEYS[0]]
    print(len(asked))
    """,
        str(tmp_path),
        "ended",
    )
    assert out.strip() == "1"


# -- what is missing ------------------------------------------------------------------------------

ASK = """
    from fastema.engine.cubins import Key, Unavailable, cubin
    for key in (Key("lerp", ("f32", "bf16"), "flat", (9, 0)), Key("advance", (), "", (9, 0))):
        try:
            cubin(key)
        except Unavailable as error:
            print(str(error).replace("\\n", "<newline>"))
        else:
            print("compiled")
"""

NO_MODULE = """
    import sys

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if any(name == gone or name.startswith(gone + ".") for gone in GONE):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path[:] = [Missing, *(f for f in sys.meta_path if "numba_cuda" not in repr(f))]
"""

NO_LIBRARY = """
    from cuda import pathfinder
    import cuda.pathfinder._dynamic_libs.load_nvidia_dynamic_lib as loader

    found = loader.load_nvidia_dynamic_lib

    def load(name):
        if name == GONE:
            raise pathfinder.DynamicLibNotFoundError(f"Failure finding lib{name}.so\\nlisted: ...")
        return found(name)

    pathfinder.load_nvidia_dynamic_lib = loader.load_nvidia_dynamic_lib = load
"""


def messages(python: Callable[..., str], tmp_path: Path, setup: str, gone: Any) -> list[str]:
    script = f"    GONE = {gone!r}\n{setup}{ASK}"
    out = python(script, NUMBA_CACHE_DIR=str(tmp_path), quiet=False).splitlines()
    assert not list(tmp_path.rglob("*.cubin"))
    return out


def check_sentence(message: str, operation: str) -> None:
    assert message.startswith(f"the GPU kernel {operation}(")
    assert message.endswith(f": {INSTALL}")
    assert INSTALL.startswith("pip install 'fastema[cuda]'")
    assert "<newline>" not in message
    assert "sm_90" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "gone",
    [
        ("numba_cuda",),  # numba has a GPU target of its own, of long ago, that must not stand in
        ("numba_cuda", "numba.cuda"),
        ("cuda.core",),
        ("cuda",),
    ],
    ids=" ".join,
)
def test_without_a_package_a_sentence_says_what_to_install(
    gone: tuple[str, ...], tmp_path: Path, python: Callable[..., str]
) -> None:
    found = messages(python, tmp_path, NO_MODULE, gone)
    for message, operation in zip(found, ("lerp", "advance"), strict=True):
        check_sentence(message, operation)
        assert "(ModuleNotFoundError: No module named" in message or "(ImportError: " in message


@pytest.mark.parametrize(
    "gone", ["nvvm", *(pytest.param(one, marks=pytest.mark.slow) for one in ("nvrtc", "nvJitLink"))]
)
def test_without_a_library_a_sentence_says_what_to_install(
    gone: str, tmp_path: Path, python: Callable[..., str]
) -> None:
    require_packages("numba_cuda", "cuda.core")
    found = messages(python, tmp_path, NO_LIBRARY, gone)
    for message, operation in zip(found, ("lerp", "advance"), strict=True):
        check_sentence(message, operation)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("several\nlines"),
        RuntimeError(""),
        OSError(2, "No such file", "libnvvm.so"),
        KeyError("x"),
        AssertionError(),
    ],
    ids=repr,
)
def test_any_error_of_a_compiler_is_one_sentence(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.kernels import cuda

    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(cuda, "compile_kernel", fail)
    with pytest.raises(Unavailable) as caught:
        cubin(KEY)
    check_sentence(str(caught.value).replace("\n", "<newline>"), "lerp")
    assert type(error).__name__ in str(caught.value)
    assert caught.value.__cause__ is error
    assert not list(folder.iterdir())


def test_an_interrupt_is_no_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastema.kernels import cuda

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda, "compile_kernel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cubin(KEY)
    assert not list(folder.iterdir())


# -- the real compiler ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("key", [KEY, Key(CLOCK, (), "", (9, 0))], ids=lambda key: key.operation)
def test_a_real_kernel(key: Key, folder: Path) -> None:
    require_packages("numba_cuda", "cuda.core")
    begin = time.perf_counter()
    made = cubin(key)
    compiled = time.perf_counter()
    assert made.code[:4] == b"\x7fELF"
    assert made.name.encode() + b"\0" in made.code
    found = cubin(key)
    read = time.perf_counter()
    assert found == made
    print(f"{key.operation}: compiled in {compiled - begin:.3f} s, found in {read - compiled:.6f}")


@pytest.mark.slow
def test_a_gpu_that_is_not_supported(folder: Path) -> None:
    require_packages("numba_cuda", "cuda.core")
    for capability in ((3, 5), (90, 0)):
        with pytest.raises(Unavailable, match=r"fastema\[cuda\]"):
            cubin(KEY._replace(capability=capability))
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_another_process_compiles_nothing(tmp_path: Path, python: Callable[..., str]) -> None:
    """It does not even import the compilers: a fresh process has its kernels at once."""
    require_packages("numba_cuda", "cuda.core")
    script = """
        import sys, time
        from fastema.engine.cubins import Key, cubin
        from fastema.kernels import jit
        begin = time.perf_counter()
        made = cubin(Key("lerp", ("f32", "bf16"), "flat", (9, 0)))
        elapsed = time.perf_counter() - begin
        import hashlib
        compilers = sorted({name for name in sys.modules if name in ("numba.cuda", "cuda.core")})
        print(hashlib.sha256(repr(made).encode()).hexdigest(), compilers, f"{elapsed:.4f}")
    """
    runs = [python(script, NUMBA_CACHE_DIR=str(tmp_path)).split(maxsplit=1) for _ in range(2)]
    print(runs)
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].startswith("['cuda.core', 'numba.cuda']")
    assert runs[1][1].startswith("[] ")
