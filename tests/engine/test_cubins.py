"""The disk cache of GPU kernels: entries are reused, verified, and bound to compiler versions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastema.engine import cubins, disk_cache
from fastema.engine.cubins import INSTALL, Cubin, Key, cubin
from fastema.kernels.variants import CLOCK

from ..support.requirements import require_packages

KEY = Key("lerp", ("f32", "bf16"), "flat", (9, 0))
KEYS = [
    KEY,
    KEY._replace(operation="copy"),
    KEY._replace(formats=("bf16", "f32")),
    KEY._replace(formats=("f32", "bf16", "f32", "f32")),
    KEY._replace(layout="strided"),
    KEY._replace(capability=(8, 0)),
    KEY._replace(capability=(12, 0)),
    Key(CLOCK, (), "", (9, 0)),
]


class Compiler:
    """A fake compiler that returns a distinct cubin for each key and records its calls."""

    def __init__(self, size: int = 20_000) -> None:
        self.size = size
        self.asked: list[Key] = []

    def cubin_for(self, key: Key) -> Cubin:
        generator = np.random.default_rng(list(repr(key).encode()))
        return Cubin(f"kernel_of_{key.operation}_é", generator.bytes(self.size))

    def __call__(self, key: Key) -> Cubin:
        self.asked.append(key)
        return self.cubin_for(key)

    def check(self, key: Key, asked: int) -> None:
        """Assert that the kernel is right and the compiler has run ``asked`` times in total."""
        assert cubin(key, self) == self.cubin_for(key)
        assert len(self.asked) == asked


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(disk_cache, "folder", lambda: tmp_path)
    return tmp_path


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_each_kernel_is_compiled_once_into_its_own_entry(folder: Path) -> None:
    compiler = Compiler()
    compiler.check(KEY, 1)
    entry = only_file(folder)
    assert entry.suffix == ".cubin"
    assert entry.name.startswith("lerp-")
    assert not entry.stat().st_mode & 0o022  # nobody else can write it
    before = entry.stat()
    for turn in range(2):
        for number, key in enumerate(KEYS, 1):
            compiler.check(key, number if not turn else len(KEYS))
    assert compiler.asked == KEYS
    assert len(list(folder.iterdir())) == len(KEYS)
    after = entry.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("name", cubins._COMPILERS)
@pytest.mark.parametrize("other", ["1.2.4", None])
def test_each_compiler_version_has_its_own_entries(
    name: str, other: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions: dict[str, str | None] = dict.fromkeys(cubins._COMPILERS, "1.2.3")

    def version(asked: str) -> str:
        found = versions[asked]
        if found is None:
            raise disk_cache.metadata.PackageNotFoundError(asked)
        return found

    monkeypatch.setattr(disk_cache, "versions", disk_cache.versions.__wrapped__)
    monkeypatch.setattr(disk_cache.metadata, "version", version)
    compiler = Compiler()
    for installed, asked in (("1.2.3", 1), (other, 2), ("1.2.3", 2)):
        versions[name] = installed
        compiler.check(KEY, asked)


def flip(stored: bytes, generator: np.random.Generator) -> bytes:
    flipped = bytearray(stored)
    flipped[int(generator.integers(len(stored)))] ^= 1 << int(generator.integers(8))
    return bytes(flipped)


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "empty": lambda stored, generator: b"",
    "truncated": lambda stored, generator: stored[: int(generator.integers(1, len(stored)))],
    "longer": lambda stored, generator: stored + generator.bytes(int(generator.integers(1, 100))),
    "magic": lambda stored, generator: b"fastema kernel 0\n" + stored[17:],
    "garbage": lambda stored, generator: generator.bytes(len(stored)),
    "zeros": lambda stored, generator: bytes(len(stored)),  # after a crash, on some file systems
    "flipped": flip,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_entry_is_recompiled_and_replaced(kind: str, folder: Path) -> None:
    generator = np.random.default_rng(len(kind))
    compiler = Compiler(300)
    compiler.check(KEY, 1)
    stored = only_file(folder).read_bytes()
    for turn in range(40):
        only_file(folder).write_bytes(DAMAGES[kind](stored, generator))
        compiler.check(KEY, 2 + turn)
        assert only_file(folder).read_bytes() == stored
    compiler.check(KEY, 41)


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
        if name in GONE:
            raise pathfinder.DynamicLibNotFoundError(f"Failure finding lib{name}.so\\nlisted: ...")
        return found(name)

    pathfinder.load_nvidia_dynamic_lib = loader.load_nvidia_dynamic_lib = load
"""


def check_install_hint(message: str, operation: str) -> None:
    assert message.startswith(f"the GPU kernel {operation}(")
    assert message.endswith(f": {INSTALL}")
    assert INSTALL.startswith("pip install 'fastema[cuda]'")
    assert "<newline>" not in message
    assert "sm_90" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("setup", "gone"),
    [
        (NO_MODULE, ["numba_cuda"]),  # Numba's old built-in GPU target must not be used
        (NO_MODULE, ["numba_cuda", "numba.cuda"]),
        (NO_MODULE, ["cuda.core"]),
        (NO_MODULE, ["cuda"]),
        (NO_LIBRARY, ["nvvm"]),
        pytest.param(NO_LIBRARY, ["nvrtc"], marks=pytest.mark.slow),
        pytest.param(NO_LIBRARY, ["nvJitLink"], marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_missing_package_or_library_raises_an_install_hint(
    setup: str, gone: list[str], tmp_path: Path, python: Callable[..., str]
) -> None:
    if setup == NO_LIBRARY:
        require_packages("numba_cuda", "cuda.core")
    script = f"    GONE = {gone!r}\n{setup}{ASK}"
    said = python(script, NUMBA_CACHE_DIR=str(tmp_path), quiet=False).splitlines()
    assert not list(tmp_path.rglob("*.cubin"))
    for message, operation in zip(said, ("lerp", "advance"), strict=True):
        check_install_hint(message, operation)
        if setup == NO_MODULE:
            assert "(ModuleNotFoundError: No module named" in message or "(ImportError" in message


@pytest.mark.parametrize("ptx", ["mul.f32 %f1, %f2, %f3;", "mul.rn.f32 %f1, %f2, %f3;"])
def test_a_kernel_compiled_here_whose_arithmetic_could_be_fused_is_refused(
    ptx: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.kernels import cuda

    made = cuda.Binary("fastema_lerp", ptx, b"code", 32, 0, 0)
    monkeypatch.setattr(cuda, "compile_kernel", lambda *key: made)
    if ".rn" in ptx:
        assert cubin(KEY) == ("fastema_lerp", b"code")
        return
    with pytest.raises(cubins.Unavailable, match="its products and sums could be fused") as refusal:
        cubin(KEY)
    check_install_hint(str(refusal.value), "lerp")
    assert not list(folder.iterdir())  # nothing wrong is cached


@pytest.mark.slow
def test_another_process_reads_kernels_without_importing_compilers(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    require_packages("numba_cuda", "cuda.core")
    script = """
        import hashlib, sys
        from fastema.engine.cubins import Key, cubin
        for key in (Key("lerp", ("f32", "bf16"), "flat", (9, 0)), Key("advance", (), "", (9, 0))):
            made = cubin(key)
            assert made.code[:4] == b"\\x7fELF"
            assert made.name.encode() + b"\\0" in made.code
            print(hashlib.sha256(repr(made).encode()).hexdigest())
        print(sorted({name for name in sys.modules if name in ("numba.cuda", "cuda.core")}))
    """
    once, again = (python(script, NUMBA_CACHE_DIR=str(tmp_path)).split("\n") for _ in range(2))
    assert once[:2] == again[:2]
    assert (once[2], again[2]) == ("['cuda.core', 'numba.cuda']", "[]")
