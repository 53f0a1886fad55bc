"""What a user installs: the sdist, the wheel built from it, and that wheel at work elsewhere."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastema
from fastema.kernels.stamp import source_stamp

from .support.requirements import require_packages

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}
# Run from an empty folder: a `build` folder beside pyproject.toml would shadow the tool.
BUILD = (sys.executable, "-m", "build", "--no-isolation")

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("these tests build from a checkout; there is none", allow_module_level=True)


def _try(*command: str | Path, cwd: Path, **environment: str) -> tuple[int, str]:
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, check=False, text=True, **both)
    return done.returncode, done.stdout


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    code, output = _try(*command, cwd=cwd, **environment)
    assert code == 0, f"{command}\n{output}"
    return output


@pytest.fixture(scope="module")
def dist_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and a wheel built from the sdist rather than the tree."""
    require_packages("build", "hatchling")
    folder = tmp_path_factory.mktemp("dist")
    _run(*BUILD, "--outdir", folder, ROOT, cwd=tmp_path_factory.mktemp("empty"))
    return folder


@pytest.mark.slow
def test_sdist_holds_the_tree_and_the_wheel_package_and_kernels(dist_folder: Path) -> None:
    (path,) = dist_folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"} <= names
    assert "tests/test_packaging.py" in names
    # Links fail to unpack on some systems, and a second copy could be edited by mistake.
    assert not [m.name for m in members if m.islnk() or m.issym()]
    assert not [name for name in names if name.startswith("fastema/kernels")]
    (wheel,) = dist_folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(archive.read(metadata))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastema", f"fastema-{fastema.__version__}.dist-info"}
    assert {n.removeprefix("fastema/kernels/") for n in names if "/kernels/" in n} == KERNELS
    assert "fastema/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastema").rglob("*.py")} <= names
    assert (said["Name"], said["Version"]) == ("fastema", fastema.__version__)
    assert said["Requires-Python"] == ">=3.10"
    needed = [one for one in said.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert needed == ["numba", "numpy"]


@pytest.mark.slow
def test_build_fails_without_kernels_of_these_sources(tmp_path: Path) -> None:
    require_packages("build", "hatchling")
    tree, out = tmp_path / "tree", tmp_path / "out"
    out.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", "compiled", "kernels")
    shutil.copytree(ROOT / "fastema", tree / "fastema", ignore=skipped)
    for name in ("kernels", ".ci"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = (*BUILD, "--wheel", "--outdir", out, tree)
    code, output = _try(*command, cwd=out, FASTEMA_RELEASE="1")
    assert code
    assert "no compiled kernels in fastema/compiled/cpu: make compiled" in output
    assert not list(out.iterdir())
    compiled, targets = tree / "fastema" / "compiled", ("cpu/x86-64-v3", "gpu/sm_90")
    for target in targets:
        (compiled / target).mkdir(parents=True)
        (compiled / target / "lerp.xz").write_bytes(b"code")
    (compiled / "cpu" / "stamp").write_text(source_stamp())
    (compiled / "gpu" / "stamp").write_text("0" * 16)
    code, output = _try(*command, cwd=out)
    assert code
    assert "compiled/gpu were compiled from other sources" in output
    (compiled / "gpu" / "stamp").write_text(source_stamp())
    _run(*command, cwd=out, FASTEMA_RELEASE="1")
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        for target in targets:
            assert archive.read(f"fastema/compiled/{target}/lerp.xz") == b"code"
            stamp = archive.read(f"fastema/compiled/{target[:3]}/stamp")
            assert stamp.decode() == source_stamp()


@pytest.mark.slow
def test_cpu_wheel_has_cpu_kernels_alone_and_the_tag_of_their_platform(tmp_path: Path) -> None:
    require_packages("build", "hatchling")
    tree, out = tmp_path / "tree", tmp_path / "out"
    out.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", "compiled", "kernels")
    shutil.copytree(ROOT / "fastema", tree / "fastema", ignore=skipped)
    for name in ("kernels", ".ci"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    for target, sources in (("cpu/x86-64-v3", source_stamp()), ("gpu/sm_90", "0" * 16)):
        folder = tree / "fastema" / "compiled" / target
        folder.mkdir(parents=True)
        (folder / "lerp.xz").write_bytes(b"code")
        (folder.parent / "stamp").write_text(sources)
    _run(*BUILD, "--wheel", "--outdir", out, tree, cwd=out, FASTEMA_RELEASE="cpu")
    (path,) = out.iterdir()
    assert path.name.endswith("-py3-none-manylinux_2_17_x86_64.whl")
    with zipfile.ZipFile(path) as archive:
        compiled = [name for name in archive.namelist() if name.startswith("fastema/compiled/")]
    assert compiled == ["fastema/compiled/cpu/stamp", "fastema/compiled/cpu/x86-64-v3/lerp.xz"]


def needed_environment(arguments: str) -> str:
    """Return the environment in which ``make compiled`` would compile."""
    command = ("make", "-n", "compiled", f"ARGS={arguments}", "VENV=.nowhere")
    (line,) = [
        one
        for one in _run(*command, cwd=ROOT).splitlines()
        if "build_kernels" in one and "python -m" in one
    ]
    return line.partition("/")[0]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        *(("", "-cuda12"), ("--device gpu", "-cuda12"), ("--device cpu --device gpu", "-cuda12")),
        *(("--device cpu", "-build"), ("--operation lerp --device=cpu", "-build")),
    ],
)
def test_kernels_of_cpus_are_compiled_without_a_gpu_toolkit(
    arguments: str, environment: str
) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    assert needed_environment(arguments) == f".nowhere{environment}"
