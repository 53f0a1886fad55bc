"""Modules of fastema import only what the table allows: imports inside functions, under
TYPE_CHECKING and through `import_module` count too."""

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
    " .plan .posthoc .rules .average .tensorflow .torch .tracking .transformers"
)
FRAMEWORKS = (
    "cupy diffusers ema_pytorch flax jax jaxlib keras lightning pytorch_lightning"
    " tensorflow timm torch torch_ema transformers"
)
COMPILER = "numba numpy llvmlite"
CALLBACKS = (
    ".errors .hints .average .plan .binding .checkpoint .tracking .rules .bridges .engine.blocks"
    " .engine.interrupts numpy"
)
MOVING = f"{LAYOUT} .bridges.registry .bridges.dlpack .bridges.moving .bridges.names numpy alone"

# Allowed imports besides the standard library and modules of the same package. The most specific
# key counts, and a key may end in `_`. `.layout` is fastema's own; `lazy:` allows an import only
# where it does not run while the module is imported; `not:` forbids one that another entry or the
# standard library allows; `alone`: modules of the same package need an entry too; `late:` allows an
# import that only runs when somebody asks, and that counts in no cycle.
TABLE = {
    "": f".lazy lazy:.fastema {' '.join(f'lazy:{name}' for name in BELOW_CLI.split())}"
    " lazy:numpy lazy:torch",
    "errors": "",
    "lazy": "",
    "hints": ".errors",
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
    # Bridges do not import each other. The registry imports a bridge once its framework is
    # imported. New memory comes from the bridge of an array.
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
    " .bridges.torch_openmp .bridges.torch_parts .bridges.torch_ranks lazy:.bridges.torch_link"
    " numpy torch alone",
    "bridges.torch_cuda": f"{LAYOUT} .bridges.torch_parts lazy:.bridges.torch_foreach numpy torch"
    " alone",
    "bridges.torch_other": f"{LAYOUT} .bridges.torch_cuda lazy:.bridges.torch_foreach numpy torch"
    " alone",
    "bridges.torch_link": f"{LAYOUT} .bridges.torch_cuda .bridges.torch_parts torch alone",
    **dict.fromkeys(
        ("bridges.torch_openmp", "bridges.torch_parts", "bridges.torch_ranks"),
        f"{LAYOUT} torch alone",
    ),
    "bridges.torch_foreach": f"{LAYOUT} .kernels.table .kernels.operations numpy torch alone",
    "binding": f"{LAYOUT} .engine .bridges",
    "plan": f"{BELOW_AVERAGES} .hints",
    "average": f"{BELOW_AVERAGES} .hints .rules numpy lazy:typing_extensions",
    "average.foreign": f"{BELOW_AVERAGES} .hints .rules late:.checkpoint.detection",
    "tracking": ".errors .hints .rules .engine .bridges .lazy numpy",
    "tracking.plots.picture": ".errors .tracking numpy matplotlib",
    "tracking.plots": ".errors .tracking numpy lazy:matplotlib",
    "tracking.tensorboard": ".errors .hints .tracking .rules numpy lazy:tensorboard",
    "tracking.logs.event_files": ".errors .tracking numpy lazy:tensorboard",
    "keras": f"{CALLBACKS} keras lazy:typing_extensions",
    "lightning": f"{CALLBACKS} lightning pytorch_lightning torch lazy:typing_extensions",
    "transformers": f"{CALLBACKS} transformers torch lazy:typing_extensions",
    "tensorflow": ".errors .hints .plan .binding .bridges .engine.blocks .engine.interrupts numpy"
    " tensorflow",
    "checkpoint": f"{LAYOUT} .average .engine .bridges .rules numpy",
    # Finds the layouts of libraries, which stand above it.
    "checkpoint.detection": f"{LAYOUT} .average .bridges .rules late:.compat",
    "checkpoint.layout": f"{LAYOUT} .bridges .rules lazy:torch",
    "checkpoint.conversion": f"{LAYOUT} .average .bridges .rules lazy:torch",
    "checkpoint.transfer": f"{LAYOUT} .average .bridges .rules torch",
    # Never imports torch: a process without torch.distributed is the only rank.
    "distributed": f"{LAYOUT} .average .binding .checkpoint .bridges .rules numpy",
    "posthoc": f"{BELOW_AVERAGES} .average .checkpoint .plan .rules numpy lazy:rich",
    # fastema.torch is importable without PyTorch, so its functions import PyTorch.
    "torch": ".errors lazy:torch lazy:rich",
    "compat": f"{LAYOUT} .average .binding .rules .plan .bridges .checkpoint .posthoc .torch"
    f" .tensorflow .lightning .engine.blocks .engine.interrupts .lazy numpy {FRAMEWORKS}",
    "compat.installation": ".errors .compat .engine.interrupts .engine.locks",
    "compat.keras": ".errors .keras .plan .binding .engine.interrupts keras",
    "compat.torch_ema": ".errors .compat .checkpoint .rules .lazy",
    "compat.torch_ema.classes": ".errors .compat .engine.blocks .engine.interrupts torch",
    "compat.ema_pytorch": f"{LAYOUT} .compat .average .rules .plan .bridges .checkpoint .posthoc"
    " .engine.interrupts .lazy numpy torch",
    "compat.averager": f"{LAYOUT} .binding .plan .bridges .engine.blocks torch",
    # test_light_import.py checks that extras are imported only when a command runs.
    "cli": f".fastema {BELOW_CLI} numpy numba matplotlib rich sklearn psutil torchvision"
    f" {FRAMEWORKS}",
    "__main__": ".cli",
}


def _package_sources() -> dict[str, str]:
    package = Path(fastema.__file__).parent
    # In a checkout fastema/kernels is a link, which rglob does not follow.
    kernels = (package / "kernels").resolve()
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    files |= {f"kernels/{p.relative_to(kernels).as_posix()}": p for p in kernels.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(files.items())}


def _module_name(path: str) -> str:
    """Return the dotted name of a path below fastema/, empty for fastema itself."""
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


SOURCES = _package_sources()
MODULES = {_module_name(path) for path in SOURCES}


def _walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield each node, and whether it does not run while the module is imported."""
    yield node, lazy
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    guard = (
        isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"
    )
    body = node.body if isinstance(node, ast.If) else []
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, lazy or (guard and child in body))


def _literal(node: ast.expr) -> str:
    """Return a string, or the complete names before the first brace of an f-string."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _literal(node.values[0]).rpartition(".")[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def imports(path: str, code: str) -> Iterator[tuple[str, bool, int]]:
    """Yield (dotted target, lazy, line) of each import; fastema's own begin with a dot."""
    package = _module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package.pop()

    def absolute(level: int, name: str) -> str:
        if not level:
            return name
        return ".".join(["fastema", *filter(None, package[: len(package) - level + 1]), name])

    for node, lazy in _walk(ast.parse(code, path)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node.level, node.module or "").rstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                # `from a import b` names the module a.b or a member of a.
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


def _table_key(module: str) -> str | None:
    """Return the most specific key of the table for a module."""
    parts = tuple(f"{key}{'' if key.endswith('_') else '.'}" for key in TABLE if key)
    fits = [part for part in parts if f"{module}.".startswith(part)]
    return max(fits, key=len).removesuffix(".") if fits else module if module in TABLE else None


def _is_allowed(target: str, lazy: bool, module: str, entry: str) -> bool:
    tokens = entry.split()
    if module and "alone" not in tokens:
        tokens.append("." + module.split(".")[0])

    def listed(prefix: str = "") -> bool:
        return any(f"{prefix}{target}.".startswith(f"{token}.") for token in tokens)

    if listed("not:"):
        return False
    is_standard = target.split(".")[0] in sys.stdlib_module_names
    return is_standard or listed() or (lazy and (listed("lazy:") or listed("late:")))


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each forbidden import and for each module missing from the table."""
    problems = []
    for path, code in sources.items():
        module = _module_name(path)
        key = _table_key(module)
        if key is None:
            problems.append(f"{path}: add it to the table and to CONTRIBUTING.md")
            continue
        for target, lazy, line in imports(path, code):
            if not _is_allowed(target, lazy, module, TABLE[key]):
                when = "" if lazy else " while it is imported"
                problems.append(f"{path}:{line}: {key or 'fastema'} imports {target}{when}")
    return problems


def assert_no_cycle(sources: Mapping[str, str]) -> None:
    """Raise CycleError if modules import each other, wherever the imports stand."""
    targets: dict[str, set[str]] = {}
    for path, code in sources.items():
        module = _module_name(path)
        late = {f"late:{target}" for target, _, _ in imports(path, code)}
        late &= set(TABLE.get(_table_key(module) or "", "").split())
        found = {target for target, _, _ in imports(path, code) if target[0] == "."}
        targets[module] = {one[1:] for one in found if f"late:{one}" not in late}
    TopologicalSorter(targets).prepare()


def test_modules_import_only_what_the_table_allows_without_cycles() -> None:
    assert {"engine/cuda.py", "kernels/table.py", "average/average.py"} <= SOURCES.keys()
    assert violations(SOURCES) == []
    assert_no_cycle(SOURCES)
    typed = "if TYPE_CHECKING:\n    from fastema.layout import group"
    with pytest.raises(CycleError):
        assert_no_cycle({"layout/spec.py": typed, "layout/group.py": "from . import spec"})


FORBIDDEN = {
    "engine/ops.py": [
        "from fastema.average import average",
        "from .. import shadow",
        "import fastema",
        "class C:\n    async def f(self):\n        from ..average import average",
        "if TYPE_CHECKING:\n    from fastema.average import average",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "f = lambda: import_module('..average', __package__)",
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
