"""The documentation: examples run, links resolve, and generated parts are up to date."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastema

ROOT = Path(__file__).resolve().parents[1]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> Iterator[str]:
    yield "fastema"
    for found in pkgutil.walk_packages(fastema.__path__, "fastema.", onerror=lambda name: None):
        if not found.name.endswith("__main__"):  # importing it runs the command
            yield found.name
    # fastema/kernels has no __init__.py, so the walk does not enter it.
    folder = Path(fastema.__file__).parent / "kernels"
    yield from (f"fastema.kernels.{path.stem}" for path in folder.glob("*.py"))


MODULES = sorted(set(modules()))


def import_or_skip(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastema":
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.tensorflow] * ("tensorflow" in n)) for n in MODULES]
)
def test_docstring_examples_run(name: str) -> None:
    module = import_or_skip(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=FLAGS)
    lines: list[str] = []
    for example in finder.find(module, module.__name__):
        runner.run(example, out=lines.append)
    assert not runner.failures, "".join(lines)
    assert runner.tries or name not in ("fastema", "fastema.plan", "fastema.average.average")


FENCE = re.compile(r"^```(?:python|py)\b[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# tests/distributed runs sharded.md, on several ranks.
WRITTEN = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [path for path in WRITTEN if path.name != "sharded.md"]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")
FILE = re.compile(r"`((?:bench/results|docs|examples|tests|fastema|kernels|bench)/[\w./-]+\.\w+)`")
in_a_checkout = pytest.mark.skipif(
    not PAGES[0].exists(), reason="pages belong to a checkout, not to an install"
)


def relative_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def page_names() -> dict[str, Any]:
    """Return the names that pages may use: a small model in training, and its data."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]

    def evaluate(evaluated: Any) -> float:
        with torch.no_grad():
            return float(sum(evaluated(x).square().mean() for x, _ in batches))

    return {
        "torch": torch,
        "fastema": fastema,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader": batches,
        "batches": batches,
        "loss_fn": nn.functional.cross_entropy,
        "evaluate": evaluate,
    }


@in_a_checkout
# NumPy 2 warns about variables of Keras on PyTorch.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=relative_name)
def test_python_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks run in order, in one namespace and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = page_names()
    text = page.read_text(encoding="utf-8")
    for number, found in enumerate(FENCE.finditer(text), 1):
        block = found[1]
        line = text[: found.start(1)].count("\n")
        if ">>>" in block:
            example = doctest.DocTestParser().get_doctest(
                block, names, f"{page.name} block {number}", str(page), line
            )
            lines: list[str] = []
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(example, out=lines.append, clear_globs=False)
            assert not runner.failures, "".join(lines)
            names.update(example.globs)
        else:
            # Keep the line numbers of the page, so that a traceback points into it.
            code = compile("\n" * line + block, str(page), "exec")
            if 'device="cuda"' not in block or names["torch"].cuda.is_available():
                exec(code, names)


@in_a_checkout
@pytest.mark.parametrize("page", [*WRITTEN, ROOT / "CONTRIBUTING.md"], ids=relative_name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert not missing


@in_a_checkout
def test_every_page_is_in_the_navigation_and_generated_tables_are_up_to_date() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    found = set(re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    made = {"index.md", "examples.md", "contributing.md", "changelog.md", "reference/commands.md"}
    assert pages == found - made
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_code_fit_the_site_without_scrolling(page: str) -> None:
    """docs/site.css says at which width of the window."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 98] == []


def test_the_site_is_searched_and_read_without_a_network() -> None:
    """The offline plugin adds a script from the network, unless one of its name is listed."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^plugins:\n(  .*\n)*?  - search\n  - offline", text, re.MULTILINE)
    (script,) = re.findall(r"^  polyfills: \[(.*iframe-worker.*)\]", text, re.MULTILINE)
    assert (ROOT / "docs" / script).is_file()
    assert re.search(r"^  font: false", text, re.MULTILINE)
    assert "//" not in re.sub(r"#.*", "", text).replace('site_url: ""', "")
