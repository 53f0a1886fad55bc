"""What a user installs: the sdist, the wheel built from it, and the wheel put to work elsewhere."""

from __future__ import annotations

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import fastema
from fastema.kernels.stamp import source_stamp

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("these tests build from a checkout; there is none", allow_module_level=True)


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install -e '.[test]')")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel that was built from the sdist, not the tree."""
    _need("build", "hatchling")
    folder = tmp_path_factory.mktemp("dist")
    # From an empty folder: a `build` folder beside pyproject.toml would be taken for the tool.
    build = (sys.executable, "-m", "build", "--no-isolation")
    _run(*build, "--outdir", folder, ROOT, cwd=tmp_path_factory.mktemp("empty"))
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the wheel, installed, and nothing else."""
    _need("pip")
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip")
    _run(*pip, "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def _python(installed: Path, code: str, cwd: Path) -> str:
    """Run `code` with the installed wheel ahead of every other fastema on the path."""
    return _run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(installed))


@pytest.mark.slow
def test_wheel_holds_the_kernels(wheel_names: list[str]) -> None:
    inside = {n.removeprefix("fastema/kernels/") for n in wheel_names if "/kernels/" in n}
    assert KERNELS
    assert inside == KERNELS


def _tree(folder: Path) -> Path:
    """Copy what a build takes."""
    for name in ("fastema", "kernels", ".ci"):
        skipped = shutil.ignore_patterns("__pycache__", "compiled", "kernels")
        shutil.copytree(ROOT / name, folder / name, ignore=skipped if name == "fastema" else None)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def _wheel(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, tree],
        cwd=out,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_release_has_kernels_of_these_sources_or_fails(tmp_path: Path) -> None:
    _need("build", "hatchling")
    tree, out = _tree(tmp_path / "tree"), tmp_path / "out"
    out.mkdir()
    done = _wheel(tree, out, FASTEMA_RELEASE="1")
    assert done.returncode
    assert "no compiled kernels in fastema/compiled/cpu: make compiled" in done.stderr + done.stdout
    assert not list(out.iterdir())
    compiled = tree / "fastema" / "compiled"
    for target in ("cpu/x86-64-v3", "gpu/sm_90"):
        (compiled / target).mkdir(parents=True)
        (compiled / target / "lerp.xz").write_bytes(b"code")
    (compiled / "cpu" / "stamp").write_text(source_stamp())
    (compiled / "gpu" / "stamp").write_text("0" * 16)
    done = _wheel(tree, out)
    assert done.returncode
    assert "compiled/gpu were compiled from other sources" in done.stderr + done.stdout
    (compiled / "gpu" / "stamp").write_text(source_stamp())
    done = _wheel(tree, out, FASTEMA_RELEASE="1")
    assert not done.returncode, done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        for target in ("cpu/x86-64-v3", "gpu/sm_90"):
            assert archive.read(f"fastema/compiled/{target}/lerp.xz") == b"code"
            stamp = archive.read(f"fastema/compiled/{target[:3]}/stamp")
            assert stamp.decode() == source_stamp()


@pytest.mark.slow
def test_wheel_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "fastema"
    assert metadata["Version"] == fastema.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    core = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert core == ["numba", "numpy"]
    extras = metadata.get_all("Provides-Extra", [])
    assert {"torch", "demo", "bench", "test", "dev"} <= set(extras)


@pytest.mark.slow
def test_sdist_keeps_the_shape_of_the_tree(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"} <= names
    assert "tests/test_packaging.py" in names
    # A link in an archive is an error on systems without links, and a second copy is a trap.
    assert not [m.name for m in members if m.islnk() or m.issym()]
    assert not [name for name in names if name.startswith("fastema/kernels")]


@pytest.mark.slow
def test_installed_wheel_updates_an_average(installed: Path, tmp_path: Path) -> None:
    code = """
import fastema, numpy as np
avg = [np.zeros(1000, np.float32), np.ones((3, 5), np.float64)]
x = [np.ones(1000, np.float32), np.full((3, 5), 5.0)]
fastema.lerp_(avg, x, 0.25)
assert (avg[0] == 0.25).all(), avg[0]
assert (avg[1] == 2.0).all(), avg[1]
assert (x[1] == 5.0).all(), x[1]
print(fastema.__file__, fastema.__version__)
"""
    file, version = _python(installed, code, tmp_path).rsplit(maxsplit=1)
    assert Path(file).is_relative_to(installed)
    assert version == fastema.__version__
    # Numba's cache of compiled kernels must lie elsewhere, or it outlives an uninstall.
    assert not [p.name for p in installed.rglob("*.nb[ci]")]


@pytest.mark.slow
def test_installed_wheel_has_its_command(installed: Path, tmp_path: Path) -> None:
    code = """
import fastema, importlib.metadata, inspect
(script,) = importlib.metadata.distribution("fastema").entry_points.select(name="fastema")
main = script.load()
print(inspect.getfile(main))
"""
    assert Path(_python(installed, code, tmp_path).strip()).is_relative_to(installed)
    shown = _run(
        sys.executable, "-m", "fastema", "--version", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert fastema.__version__ in shown


def test_kernels_link_is_tracked() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        [git, "ls-files", "--stage", "fastema/kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip(f"git does not read this checkout: {listed.stderr.strip()}")
    mode = listed.stdout.split()[:1]
    assert mode == ["120000"], "git add fastema/kernels: it has to be tracked as a link"
