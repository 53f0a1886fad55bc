"""Each package and module of fastema imports only what the table allows it, wherever the import
stands: read with ast, also within functions, under TYPE_CHECKING and by `import_module`."""

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastema

LAYOUT = ".errors .layout"
BELOW_AVERAGES = f"{LAYOUT} .binding .engine .bridges"
BELOW_CLI = (
    ".binding .bridges .checkpoint .compat .distributed .engine .errors .keras .layout .lightning"
    " .plan .posthoc .rules .shadow .tensorflow .torch .tracking .transformers"
)
FRAMEWORKS = (
    "cupy diffusers ema_pytorch flax jax jaxlib keras lightning optax pytorch_lightning"
    " tensorflow timm torch torch_ema transformers"
)
COMPILER = "numba numpy llvmlite"
CALLBACKS = (
    ".errors .shadow .plan .binding .checkpoint .tracking .rules .bridges .engine.blocks"
    " .engine.interrupts numpy"
)
MOVING = f"{LAYOUT} .bridges.registry .bridges.dlpack .bridges.moving .bridges.names numpy alone"

# What may be imported besides the standard library and modules of the same package. The most
# specific entry counts, and an entry may end in `_`. `.layout` is fastema's own; `lazy:` allows it
# only where it does not run while the module is imported, `not:` forbids it although another entry
# or the standard library has it; `alone`: modules of the same package need an entry too.
TABLE = {
    "": f".lazy lazy:.fastema {' '.join(f'lazy:{name}' for name in BELOW_CLI.split())}"
    " lazy:numpy lazy:torch",
    "errors": "",
    "lazy": "",
    "kernels": f"{COMPILER} not:numba.cuda",
    "kernels.scalar": "numpy",
    "kernels.table": "numpy alone",
    "kernels.operations": "alone",
    "kernels.words": f"{COMPILER} lazy:cuda lazy:numba_cuda",
    "kernels.jit": f"{COMPILER} lazy:cuda lazy:numba_cuda",
    "kernels.cuda": f"{COMPILER} lazy:cuda lazy:numba_cuda",
    "kernels.cuda_": f"{COMPILER} cuda numba_cuda",
    "rules": ".errors not:time not:datetime",
    "rules.posthoc": ".errors numpy not:time not:datetime",
    "layout": ".errors .kernels.table numpy",
    "engine": f"{LAYOUT} .kernels numpy",
    "engine.native": ".engine .kernels lazy:llvmlite",
    "engine.cuda": f"{LAYOUT} .kernels .engine numpy lazy:cuda",
    # Bridges meet in the registry, which imports one when its framework is there, and do not
    # know each other. New memory is asked of the bridge that an array has.
    "bridges": f"{LAYOUT} alone",
    "bridges.registry": f"{LAYOUT} .bridges.names lazy:.bridges alone",
    "bridges.memory": f"{LAYOUT} .bridges.registry numpy alone",
    "bridges.dlpack": f"{LAYOUT} .bridges.registry .bridges.names numpy alone",
    "bridges.moving": f"{LAYOUT} .bridges.registry .bridges.dlpack .bridges.names numpy alone",
    "bridges.names": f"{LAYOUT} .bridges.registry .bridges.dlpack numpy alone",
    "bridges.numpy": f"{LAYOUT} .bridges.registry .bridges.dlpack .bridges.names numpy alone",
    "bridges.jax": f"{MOVING} jax",
    "bridges.keras": f"{MOVING} keras",
    "bridges.tensorflow": f"{MOVING} tensorflow",
    "bridges.cupy": f"{LAYOUT} .bridges.names numpy cupy alone",
    "bridges.torch": f"{LAYOUT} .bridges.dlpack .bridges.names .bridges.torch_other"
    " .bridges.torch_parts .bridges.torch_ranks lazy:.bridges.torch_link numpy torch alone",
    "bridges.torch_cuda": f"{LAYOUT} lazy:.bridges.torch_foreach numpy torch alone",
    "bridges.torch_other": f"{LAYOUT} .bridges.torch_cuda lazy:.bridges.torch_foreach numpy torch"
    " alone",
    "bridges.torch_link": f"{LAYOUT} .bridges.torch_parts torch alone",
    **dict.fromkeys(("bridges.torch_parts", "bridges.torch_ranks"), f"{LAYOUT} torch alone"),
    "bridges.torch_foreach": f"{LAYOUT} .kernels.table .kernels.operations numpy torch alone",
    "binding": f"{LAYOUT} .engine .bridges",
    "plan": BELOW_AVERAGES,
    "shadow": f"{BELOW_AVERAGES} .rules numpy lazy:typing_extensions",
    "tracking": ".errors .rules .engine .bridges .lazy numpy",
    "tracking.plots.picture": ".errors .tracking numpy matplotlib",
    "tracking.plots": ".errors .tracking numpy lazy:matplotlib",
    "tracking.tensorboard": ".errors .tracking .rules numpy lazy:tensorboard",
    "tracking.logs.event_files": ".errors .tracking numpy lazy:tensorboard",
    "keras": f"{CALLBACKS} keras",
    "lightning": f"{CALLBACKS} lightning pytorch_lightning torch",
    "transformers": f"{CALLBACKS} transformers torch",
    "tensorflow": ".errors .plan .binding .bridges .engine.blocks .engine.interrupts numpy"
    " tensorflow",
    "checkpoint": f"{LAYOUT} .shadow .engine .bridges .rules numpy",
    "checkpoint.conversion": f"{LAYOUT} .shadow .bridges .rules lazy:torch",
    "checkpoint.transfer": f"{LAYOUT} .shadow .bridges .rules torch",
    # Where PyTorch runs no processes this one is alone: torch is never imported here.
    "distributed": f"{LAYOUT} .shadow .binding .checkpoint .bridges .rules numpy",
    "posthoc": f"{BELOW_AVERAGES} .shadow .checkpoint .plan .rules numpy lazy:rich",
    # Found as fastema.torch also where PyTorch is missing, so the call imports PyTorch.
    "torch": ".errors lazy:torch lazy:rich",
    "compat": f"{LAYOUT} .shadow .binding .rules .plan .bridges .checkpoint .posthoc .torch"
    f" .tensorflow .lightning .engine.blocks .engine.interrupts .lazy numpy {FRAMEWORKS}",
    "compat.installation": ".errors .compat .engine.interrupts .engine.locks",
    "compat.keras": ".errors .keras .plan .binding .engine.interrupts keras",
    "compat.torch_ema": ".errors .compat .engine.blocks .engine.interrupts torch",
    "compat.ema_pytorch": f"{LAYOUT} .compat .shadow .rules .plan .bridges .checkpoint .posthoc"
    " .engine.interrupts numpy torch",
    "compat.averager": f"{LAYOUT} .binding .plan .bridges .engine.blocks torch",
    # test_light_import.py sees that what the extras bring is imported when a command runs.
    "cli": f".fastema {BELOW_CLI} numpy numba matplotlib rich sklearn psutil torchvision"
    f" {FRAMEWORKS}",
    "__main__": ".cli",
}


def _package_sources() -> dict[str, str]:
    package = Path(fastema.__file__).parent
    # rglob does not go through the link that fastema/kernels is in a checkout.
    kernels = (package / "kernels").resolve()
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    files |= {f"kernels/{p.relative_to(kernels).as_posix()}": p for p in kernels.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(files.items())}


def _module(path: str) -> str:
    """Return the dotted name of a path below fastema/, empty for fastema itself."""
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


SOURCES = _package_sources()
MODULES = {_module(path) for path in SOURCES}


def _nodes(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield each node, and whether it does not run while the module is imported."""
    yield node, lazy
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    guard = (
        isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"
    )
    body = node.body if isinstance(node, ast.If) else []
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child, lazy or (guard and child in body))


def _literal(node: ast.expr) -> str:
    """Return a string; of an f-string, the whole names that stand before the first brace."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _literal(node.values[0]).rpartition(".")[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def imports(path: str, code: str) -> Iterator[tuple[str, bool, int]]:
    """Yield (dotted target, lazy, line) of each import; fastema's own begin with a dot."""
    package = _module(path).split(".")
    if not path.endswith("__init__.py"):
        package.pop()

    def absolute(level: int, name: str) -> str:
        if not level:
            return name
        return ".".join(["fastema", *filter(None, package[: len(package) - level + 1]), name])

    for node, lazy in _nodes(ast.parse(code, path)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node.level, node.module or "").rstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                # `from a import b` names the module a.b or something that a holds.
                ours = source.split(".")[0] == "fastema"
                is_module = inner.removeprefix("fastema.") in MODULES
                targets.append(source if ours and not is_module else inner)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = _literal(node.args[0]) if called in ("import_module", "__import__") else ""
            level = len(name) - len(name.lstrip("."))
            targets = [absolute(level, name.lstrip("."))] if name else []
        for target in targets:
            ours = target == "fastema" or target.startswith("fastema.")
            name = target.removeprefix("fastema") or ".fastema"
            yield name if ours else target, lazy, getattr(node, "lineno", 0)


def _entry(module: str) -> str | None:
    """Return the most specific key of the table for a module."""
    parts = tuple(f"{key}{'' if key.endswith('_') else '.'}" for key in TABLE if key)
    fits = [part for part in parts if f"{module}.".startswith(part)]
    return max(fits, key=len).removesuffix(".") if fits else module if module in TABLE else None


def _allowed(target: str, lazy: bool, module: str, entry: str) -> bool:
    tokens = entry.split()
    if module and "alone" not in tokens:
        tokens.append("." + module.split(".")[0])

    def listed(prefix: str = "") -> bool:
        return any(f"{prefix}{target}.".startswith(f"{token}.") for token in tokens)

    if listed("not:"):
        return False
    is_standard = target.split(".")[0] in sys.stdlib_module_names
    return is_standard or listed() or (lazy and listed("lazy:"))


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each import that the table does not allow and each unlisted module."""
    problems = []
    for path, code in sources.items():
        module = _module(path)
        key = _entry(module)
        if key is None:
            problems.append(f"{path}: add it to the table and to CONTRIBUTING.md")
            continue
        for target, lazy, line in imports(path, code):
            if not _allowed(target, lazy, module, TABLE[key]):
                when = "" if lazy else " while it is imported"
                problems.append(f"{path}:{line}: {key or 'fastema'} imports {target}{when}")
    return problems


def assert_no_cycle(sources: Mapping[str, str]) -> None:
    """Raise CycleError where modules import each other, wherever the imports stand."""
    targets = {
        _module(path): {target[1:] for target, _, _ in imports(path, code) if target[0] == "."}
        for path, code in sources.items()
    }
    TopologicalSorter(targets).prepare()


def test_modules_import_only_what_the_table_allows_and_never_each_other() -> None:
    assert {"engine/cuda.py", "kernels/table.py", "shadow/average.py"} <= SOURCES.keys()
    assert violations(SOURCES) == []
    assert_no_cycle(SOURCES)
    typed = "if TYPE_CHECKING:\n    from fastema.layout import group"
    with pytest.raises(CycleError):
        assert_no_cycle({"layout/spec.py": typed, "layout/group.py": "from . import spec"})


FORBIDDEN = {
    "engine/ops.py": [
        "from fastema.shadow import average",
        "from .. import shadow",
        "import fastema",
        "class C:\n    async def f(self):\n        from ..shadow import average",
        "if TYPE_CHECKING:\n    from fastema.shadow import average",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "f = lambda: import_module('..shadow', __package__)",
        "f = lambda x: import_module(f'fastema.bridges.{x}')",
    ],
    "rules/ema.py": ["from time import perf_counter", "import numpy as np"],
    "kernels/window.py": ["from numba import cuda"],
    "bridges/registry.py": ["from fastema.bridges import torch", "def f():\n    import torch"],
    "bridges/torch.py": ["def f():\n    import jax"],
    "__init__.py": ["if TYPE_CHECKING:\n    x = 1\nelse:\n    import numpy"],
    "attic/old.py": [""],
}


@pytest.mark.parametrize(
    ("path", "code"), [(path, code) for path, codes in FORBIDDEN.items() for code in codes]
)
def test_forbidden_import_is_reported(path: str, code: str) -> None:
    (problem,) = violations({path: code})
    assert problem.startswith(path)
