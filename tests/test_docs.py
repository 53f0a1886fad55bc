"""What the documentation shows runs: examples in docstrings, Python blocks in Markdown files."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
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


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastema":
            raise
        pytest.skip(f"{error.name} is not installed")


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.tensorflow) if "tensorflow" in name else name


@pytest.mark.parametrize("name", [*map(marked, MODULES)])
def test_examples_of_a_module(name: str) -> None:
    module = imported(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=FLAGS)
    lines: list[str] = []
    for example in finder.find(module, module.__name__):
        runner.run(example, out=lines.append)
    assert not runner.failures, "".join(lines)


def test_the_examples_are_found() -> None:
    """A walk that finds nothing passes every test."""
    shown = {"fastema", "fastema.plan", "fastema.posthoc", "fastema.rules.ema"}
    shown |= {"fastema.torch.batch_norm"}
    shown |= {f"fastema.shadow.{name}" for name in ("average", "ema", "swa", "sma")}
    assert shown <= set(MODULES)
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in sorted(shown):
        module = imported(name)
        assert any(test.examples for test in finder.find(module, name)), name


# -- Markdown -------------------------------------------------------------------------------------

FENCE = re.compile(r"^```(?:python|py)\b[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# That page is run on ranks, by tests/distributed.
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    if path.exists() and path.name != "sharded.md"
]


def surroundings() -> dict[str, Any]:
    """What a page may take for granted: a small model in training, and something to train it on."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )
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
        "loss_fn": torch.nn.functional.cross_entropy,
        "evaluate": evaluate,
    }


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.skipif(not PAGES, reason="pages belong to a checkout, not to an install")
# Of Keras' variables on PyTorch, which NumPy 2 finds fault with.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_of_a_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = surroundings()
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
            # Lines of the page, so that a traceback points into it.
            code = compile("\n" * line + block, str(page), "exec")
            if 'device="cuda"' not in block or names["torch"].cuda.is_available():
                exec(code, names)
