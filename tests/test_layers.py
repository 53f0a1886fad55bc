"""Imports point down: each room of the house may import what the table below allows it, no more.

Read with ast, so that an import counts wherever it stands: at the top, inside a function, under
TYPE_CHECKING, relative, or as a literal handed to `importlib.import_module`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastema

FRAMEWORKS = (
    "cupy diffusers ema_pytorch flax jax jaxlib keras lightning optax pytorch_lightning"
    " tensorflow timm torch torch_ema transformers"
)
ROOMS_BELOW_CLI = (
    "binding bridges checkpoint compat distributed engine errors keras layout lightning plan"
    " posthoc rules shadow tensorflow torch tracking transformers typing"
)


@dataclass(frozen=True)
class Import:
    target: str  # dotted, such as `fastema.layout.spec` or `numba.cuda`
    line: int
    lazy: bool  # inside a function or under TYPE_CHECKING: not run while the module is imported


@dataclass(frozen=True)
class Room:
    """What a room or a module may import besides the standard library and its own room."""

    ours: str = ""  # rooms and modules of fastema
    theirs: str = ""  # third-party packages
    lazy_ours: str = ""  # only where it does not run while we are imported
    lazy_theirs: str = ""
    never: str = ""  # not of ours, and not allowed although a line above or Python itself has it
    own_room: bool = True

    def allows(self, found: Import, module: str) -> bool:
        """Whether `module`, which is in this room, may import what was found."""
        target, top = found.target, found.target.split(".")[0]
        if top == "fastema":
            inner = target.removeprefix("fastema.")
            own = self.own_room and module != "" and _among(inner, module.split(".")[0])
            return own or _among(inner, self.ours) or (found.lazy and _among(inner, self.lazy_ours))
        if _among(target, self.never):
            return False
        return (
            top in sys.stdlib_module_names
            or _among(target, self.theirs)
            or (found.lazy and _among(target, self.lazy_theirs))
        )


# The most specific entry counts: `kernels.scalar` before `kernels`. "" is fastema/__init__.py.
TABLE = {
    "": Room(ours="lazy", lazy_ours=f"fastema {ROOMS_BELOW_CLI}", lazy_theirs="numpy torch"),
    "errors": Room(),
    "lazy": Room(),
    "typing": Room(theirs="numpy"),
    "kernels": Room(theirs="numba numpy llvmlite", never="numba.cuda"),
    "kernels.scalar": Room(theirs="numpy"),
    "kernels.table": Room(theirs="numpy", own_room=False),
    "kernels.operations": Room(own_room=False),
    "kernels.words": Room(theirs="numba numpy llvmlite", lazy_theirs="cuda numba_cuda"),
    "kernels.jit": Room(theirs="numba numpy llvmlite", lazy_theirs="cuda numba_cuda"),
    "kernels.cuda": Room(theirs="numba numpy llvmlite", lazy_theirs="cuda numba_cuda"),
    "kernels.cuda_": Room(theirs="numba numpy llvmlite cuda numba_cuda"),
    "rules": Room(ours="errors typing", never="time datetime"),
    "rules.posthoc": Room(ours="errors typing", theirs="numpy", never="time datetime"),
    "layout": Room(ours="errors typing kernels.table", theirs="numpy"),
    "engine": Room(ours="layout errors typing kernels", theirs="numpy"),
    "engine.cuda": Room(
        ours="layout errors typing kernels engine", theirs="numpy", lazy_theirs="cuda"
    ),
    # Bridges meet in the registry, which imports one when its framework is there, and do not
    # know each other. DLPack and what wrappers do to names is what they share.
    "bridges": Room(ours="layout errors typing", own_room=False),
    "bridges.registry": Room(
        ours="layout errors typing bridges.names", lazy_ours="bridges", own_room=False
    ),
    # New memory is asked of the bridge that an array has.
    "bridges.memory": Room(
        ours="layout errors typing bridges.registry", theirs="numpy", own_room=False
    ),
    **{
        f"bridges.{name}": Room(
            ours="layout errors typing bridges.registry bridges.dlpack bridges.names",
            theirs=f"numpy {packages}",
            own_room=False,
        )
        for name, packages in {
            "dlpack": "",
            "moving": "",
            "names": "",
            "numpy": "",
        }.items()
    },
    # Frameworks whose arrays lie elsewhere after every step.
    **{
        f"bridges.{name}": Room(
            ours="layout errors typing bridges.registry bridges.dlpack bridges.moving"
            " bridges.names",
            theirs=f"numpy {name}",
            own_room=False,
        )
        for name in ("jax", "keras", "tensorflow")
    },
    "bridges.cupy": Room(
        ours="layout errors typing bridges.names", theirs="numpy cupy", own_room=False
    ),
    # Of torch's bridge: its GPUs, its DTensors and the ranks that hold them, and what its own
    # functions do where our kernels are missing.
    "bridges.torch": Room(
        ours="layout errors typing bridges.dlpack bridges.names bridges.torch_cuda "
        "bridges.torch_parts bridges.torch_ranks",
        theirs="numpy torch",
        own_room=False,
    ),
    "bridges.torch_cuda": Room(
        ours="layout errors typing",
        theirs="numpy torch",
        lazy_ours="bridges.torch_foreach",
        own_room=False,
    ),
    "bridges.torch_parts": Room(ours="layout errors typing", theirs="torch", own_room=False),
    "bridges.torch_ranks": Room(ours="layout errors typing", theirs="torch", own_room=False),
    "bridges.torch_foreach": Room(
        ours="layout errors typing kernels.table kernels.operations",
        theirs="numpy torch",
        own_room=False,
    ),
    # What ties an average to a model; it asks its surfaces what is to be paired.
    "binding": Room(ours="engine bridges layout errors typing"),
    "plan": Room(ours="binding engine bridges layout errors typing"),
    "shadow": Room(
        ours="binding rules engine bridges layout errors typing",
        theirs="numpy",
        lazy_theirs="typing_extensions",  # which type checkers bring along
    ),
    # Bridges read what frameworks hold in place of numbers.
    "tracking": Room(ours="rules engine bridges errors lazy typing", theirs="numpy"),
    "tracking.plots.picture": Room(ours="tracking errors typing", theirs="numpy matplotlib"),
    "tracking.plots": Room(ours="tracking errors typing", theirs="numpy", lazy_theirs="matplotlib"),
    "tracking.tensorboard": Room(
        ours="tracking rules errors typing", theirs="numpy", lazy_theirs="tensorboard"
    ),
    "tracking.logs.event_files": Room(
        ours="tracking errors typing", theirs="numpy", lazy_theirs="tensorboard"
    ),
    **{
        name: Room(
            ours="shadow plan binding checkpoint tracking rules bridges engine.blocks"
            " engine.interrupts errors typing",
            theirs=f"numpy {packages}",
        )
        for name, packages in {
            "keras": "keras",
            "lightning": "lightning pytorch_lightning torch",
            "transformers": "transformers torch",
        }.items()
    },
    # Its averages and what it notes of them must not be parted by an interrupt.
    "tensorflow": Room(
        ours="plan binding bridges engine.blocks engine.interrupts errors typing",
        theirs="numpy tensorflow",
    ),
    "checkpoint": Room(ours="engine bridges layout errors typing", theirs="numpy"),
    # Where PyTorch runs no processes this one is alone: torch is never imported here.
    "distributed": Room(
        ours="shadow binding checkpoint bridges rules layout errors typing", theirs="numpy"
    ),
    # What is made of averages and files together.
    "posthoc": Room(
        ours="shadow binding checkpoint plan rules engine bridges layout errors typing",
        theirs="numpy",
        lazy_theirs="rich",
    ),
    # In fastema's own namespace: there where PyTorch is not, so PyTorch is imported by the call.
    "torch": Room(ours="errors typing", lazy_theirs="torch rich"),
    "compat": Room(
        ours="shadow binding rules plan bridges layout checkpoint posthoc torch tensorflow"
        " lightning engine.blocks errors lazy typing",
        theirs=f"numpy {FRAMEWORKS}",
    ),
    "compat.installation": Room(ours="compat engine.interrupts engine.locks errors typing"),
    "compat.keras": Room(ours="keras plan binding engine.interrupts errors typing", theirs="keras"),
    # What the drop-in classes share takes back the weights whatever interrupts it.
    "compat.torch_ema": Room(ours="compat engine.blocks errors typing", theirs="torch"),
    "compat.ema_pytorch": Room(
        ours="compat shadow rules plan bridges layout checkpoint posthoc engine.interrupts errors"
        " typing",
        theirs="numpy torch",
    ),
    "compat.averager": Room(
        ours="binding plan bridges layout engine.blocks errors typing", theirs="torch"
    ),
    # Commands sit on top of everything; what the extras bring is imported when a command runs,
    # which test_light_import.py sees to.
    "cli": Room(
        ours=f"fastema {ROOMS_BELOW_CLI}",
        theirs=f"numpy numba matplotlib rich sklearn psutil {FRAMEWORKS}",
    ),
    "__main__": Room(ours="cli"),
}


def _among(target: str, names: str) -> bool:
    """Whether `target` is one of `names` or lies within one."""
    return any(target == name or target.startswith(f"{name}.") for name in names.split())


def _entry(module: str) -> str | None:
    """Key of the most specific entry of TABLE for a module; an entry may end in `_`."""
    fits = [
        key
        for key in TABLE
        if key == module
        or (key and module.startswith(f"{key}."))
        or (key.endswith("_") and module.startswith(key))
    ]
    return max(fits, key=len, default=None)


def _dotted(path: str) -> tuple[str, bool]:
    """Return the module of a path below fastema/, and whether it is a package's __init__."""
    parts = path.removesuffix(".py").split("/")
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


class _Imports(ast.NodeVisitor):
    def __init__(self, module: str, is_package: bool, known: frozenset[str]) -> None:
        name = f"fastema.{module}".rstrip(".")
        self.package = name if is_package else name.rpartition(".")[0]
        self.known = known
        self.lazy = False
        self.found: list[Import] = []

    def _add(self, node: ast.AST, target: str) -> None:
        self.found.append(Import(target, getattr(node, "lineno", 0), self.lazy))

    def _relative(self, level: int, rest: str) -> str:
        package = self.package.split(".")
        return ".".join([*package[: len(package) - (level - 1)], *filter(None, [rest])])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            source = self._relative(node.level, source)
        ours = source.split(".")[0] == "fastema"
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            # Of ours, `from a import b` names the module a.b or something that a holds.
            self._add(node, source if ours and inner not in self.known else inner)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in ("import_module", "__import__") and node.args:
            literal = self._literal(node.args[0])
            rest = literal.lstrip(".")
            if rest != literal:
                literal = self._relative(len(literal) - len(rest), rest)
            if literal:
                self._add(node, literal)
        self.generic_visit(node)

    @staticmethod
    def _literal(node: ast.expr) -> str:
        """Return the string; of an f-string, the whole names that stand before the first hole."""
        if isinstance(node, ast.JoinedStr) and node.values:
            head = node.values[0]
            text = head.value if isinstance(head, ast.Constant) else ""
            return text.rpartition(".")[0]
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    def _visit_lazily(self, nodes: list[ast.stmt] | list[ast.expr]) -> None:
        before, self.lazy = self.lazy, True
        for node in nodes:
            self.visit(node)
        self.lazy = before

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for expression in (*node.decorator_list, node.args):
            self.visit(expression)
        self._visit_lazily(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_lazily([node.body])

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
        if name == "TYPE_CHECKING":
            self._visit_lazily(node.body)
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)


def imports(sources: Mapping[str, str]) -> Iterator[tuple[str, str, Import]]:
    """Yield (path, module, import) for each import in `sources`, a mapping of path to code."""
    modules = {f"fastema.{_dotted(path)[0]}" for path in sources}
    known = frozenset(modules | {module.rpartition(".")[0] for module in modules})
    for path, code in sources.items():
        module, is_package = _dotted(path)
        visitor = _Imports(module, is_package, known)
        visitor.visit(ast.parse(code, path))
        for found in visitor.found:
            yield path, module, found


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each import that the table does not allow and each homeless module."""
    problems = [
        f"{path}: in no room of the table: give it one, and say in CONTRIBUTING.md what it is for"
        for path in sources
        if _entry(_dotted(path)[0]) is None
    ]
    for path, module, found in imports(sources):
        key = _entry(module)
        if key is not None and not TABLE[key].allows(found, module):
            when = "" if found.lazy else " while it is imported"
            problems.append(f"{path}:{found.line}: {key or 'fastema'} imports {found.target}{when}")
    return problems


def circles(sources: Mapping[str, str]) -> set[str]:
    """Return the modules that import each other, wherever the imports stand, joined by blanks."""
    below: dict[str, set[str]] = {_dotted(path)[0]: set() for path in sources}
    for _, module, found in imports(sources):
        if found.target.startswith("fastema."):
            below[module].add(found.target.removeprefix("fastema."))

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            for other in below.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {module: reached(module) for module in below}
    return {
        " ".join(sorted(other for other in found if module in reach.get(other, set())))
        for module, found in reach.items()
        if module in found
    }


def _package_sources() -> dict[str, str]:
    package = Path(fastema.__file__).parent
    # rglob does not go through the link that fastema/kernels is in a checkout.
    kernels = (package / "kernels").resolve()
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    files |= {f"kernels/{p.relative_to(kernels).as_posix()}": p for p in kernels.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(files.items())}


def test_imports_point_down() -> None:
    assert violations(_package_sources()) == []


def test_no_module_is_imported_by_what_it_imports() -> None:
    assert circles(_package_sources()) == set()


def test_a_circle_is_seen() -> None:
    assert circles(HOUSE) == set()
    typed = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastema.layout import group"
    )
    house = {**HOUSE, "layout/spec.py": typed, "layout/group.py": "import fastema.layout.spec"}
    assert circles(house) == {"layout.group layout.spec"}


def test_the_walk_sees_the_whole_house() -> None:
    sources = _package_sources()
    rooms = {path.split("/")[0] for path in sources if "/" in path}
    assert {"kernels", "rules", "layout", "engine", "bridges", "shadow", "cli"} <= rooms
    assert {"checkpoint", "posthoc.py", "torch", "plan.py"} <= rooms | sources.keys()
    targets = {(module, found.target) for _, module, found in imports(sources)}
    assert any(module.startswith("engine") and "kernels." in name for module, name in targets)


# A house in small; each planted line is added to one of its modules.
HOUSE = {
    "__init__.py": "",
    "errors.py": "",
    "typing.py": "",
    "kernels/table.py": "",
    "kernels/words.py": "",
    "kernels/scalar.py": "",
    "rules/__init__.py": "",
    "rules/ema.py": "",
    "layout/__init__.py": "",
    "layout/spec.py": "",
    "layout/table.py": "",
    "engine/__init__.py": "",
    "engine/ops.py": "",
    "bridges/__init__.py": "",
    "bridges/registry.py": "",
    "bridges/memory.py": "",
    "bridges/numpy.py": "",
    "bridges/torch.py": "",
    "shadow/__init__.py": "",
    "shadow/average.py": "",
    "plan.py": "",
    "checkpoint/__init__.py": "",
    "checkpoint/files.py": "",
    "posthoc.py": "",
    "torch.py": "",
    "keras.py": "",
    "tensorflow.py": "",
    "__main__.py": "",
    "cli/__init__.py": "",
    "cli/demo.py": "",
}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("engine/ops.py", "from fastema.shadow import average"),
        ("engine/ops.py", "import fastema.shadow.average"),
        ("engine/ops.py", "from ..shadow.average import EMA"),
        ("engine/ops.py", "from .. import shadow"),
        ("engine/__init__.py", "from ..shadow import average"),
        ("engine/ops.py", "from fastema import EMA"),
        ("engine/ops.py", "import fastema"),
        ("engine/ops.py", "def f():\n    from fastema import shadow"),
        ("engine/ops.py", "class C:\n    async def f(self):\n        from ..shadow import average"),
        ("engine/ops.py", "if TYPE_CHECKING:\n    from fastema.shadow import average"),
        ("engine/ops.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("engine/ops.py", "def f():\n    import torch.nn as nn"),
        ("engine/ops.py", "def f():\n    return importlib.import_module('fastema.shadow')"),
        ("engine/ops.py", "f = lambda: import_module('..shadow', __package__)"),
        ("engine/ops.py", "f = lambda x: import_module(f'fastema.bridges.{x}')"),
        ("engine/ops.py", "torch = __import__('torch')"),
        ("engine/ops.py", "from ..bridges import registry"),
        ("engine/ops.py", "from fastema.rules import ema"),
        ("layout/table.py", "from fastema.kernels import words"),
        ("layout/table.py", "from fastema.kernels import table, scalar"),
        ("layout/table.py", "import numba"),
        ("layout/spec.py", "from fastema.rules import ema"),
        ("rules/ema.py", "import time"),
        ("rules/ema.py", "from time import perf_counter"),
        ("rules/ema.py", "import numpy as np"),
        ("rules/ema.py", "def f():\n    from fastema.engine import ops"),
        ("kernels/words.py", "from fastema.layout import spec"),
        ("kernels/words.py", "from fastema.errors import FastemaError"),
        ("kernels/words.py", "import torch"),
        ("kernels/scalar.py", "import numba"),
        ("kernels/table.py", "from fastema.kernels.words import add"),
        ("kernels/table.py", "from . import words"),
        ("bridges/__init__.py", "from fastema.bridges import torch"),
        ("bridges/registry.py", "from fastema.bridges import torch"),
        ("bridges/registry.py", "torch = import_module('fastema.bridges.torch')"),
        ("bridges/registry.py", "def f():\n    import torch"),
        ("bridges/memory.py", "from fastema.bridges import torch"),
        ("bridges/memory.py", "def f():\n    from fastema.engine import ops"),
        ("bridges/memory.py", "import torch"),
        ("bridges/registry.py", "from fastema.bridges import memory"),
        ("bridges/torch.py", "from fastema.bridges.memory import allocate"),
        ("bridges/torch.py", "def f():\n    import jax"),
        ("bridges/torch.py", "from fastema.bridges.numpy import specs"),
        ("bridges/torch.py", "from . import numpy"),
        ("bridges/torch.py", "from fastema.engine import ops"),
        ("bridges/torch.py", "def f():\n    from fastema.kernels import table"),
        ("shadow/average.py", "def f():\n    import torch"),
        ("shadow/average.py", "from fastema.kernels.table import CHUNK"),
        ("shadow/average.py", "from fastema.cli import demo"),
        ("shadow/average.py", "def f():\n    from fastema import posthoc"),
        ("shadow/average.py", "from fastema.checkpoint import files"),
        ("shadow/average.py", "from fastema.plan import Plan"),
        ("plan.py", "from fastema.shadow import average"),
        ("checkpoint/files.py", "from fastema.shadow import average"),
        ("checkpoint/files.py", "def f():\n    import safetensors"),
        ("checkpoint/files.py", "def f():\n    import torch"),
        ("checkpoint/files.py", "from fastema.kernels import table"),
        ("posthoc.py", "from fastema.kernels import table"),
        ("posthoc.py", "def f():\n    import torch"),
        ("posthoc.py", "import rich"),
        ("torch.py", "from fastema.shadow import average"),
        ("torch.py", "from fastema.bridges import torch"),
        ("torch.py", "import numpy"),
        ("torch.py", "import torch"),
        ("rules/ema.py", "from fastema.posthoc import synthesize"),
        ("keras.py", "from fastema import tensorflow"),
        ("keras.py", "from fastema.engine import ops"),
        ("cli/demo.py", "from fastema.kernels import table"),
        ("__init__.py", "from fastema.shadow import average"),
        ("__init__.py", "import numpy"),
        ("errors.py", "from fastema.layout import spec"),
        ("attic.py", "import math"),
        ("attic/old.py", ""),
    ],
)
def test_planted_violation_is_caught(path: str, line: str) -> None:
    assert violations(HOUSE) == []
    found = violations({**HOUSE, path: line})
    assert found
    assert all(problem.startswith(path) for problem in found)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("engine/ops.py", "from typing import Any\nimport os, threading, numpy as np"),
        ("engine/ops.py", "from fastema.kernels import words\nfrom ..layout.table import x"),
        ("engine/__init__.py", "from .ops import lerp_\nfrom fastema.errors import FastemaError"),
        ("layout/table.py", "from fastema.kernels import table\nfrom fastema.typing import X"),
        ("layout/table.py", "import fastema.kernels.table as kt\nfrom .spec import TensorSpec"),
        ("kernels/scalar.py", "from fastema.kernels import words\nimport math"),
        ("kernels/words.py", "import numba\nfrom llvmlite import ir"),
        ("kernels/cuda_update.py", "from numba import cuda\nfrom fastema.kernels import table"),
        ("bridges/torch.py", "import torch, numpy\nfrom fastema.layout.spec import TensorSpec"),
        ("bridges/torch.py", "from fastema.bridges.dlpack import exchange_address"),
        ("bridges/registry.py", "def f(): return import_module(f'fastema.bridges.{name}')"),
        ("shadow/average.py", "from fastema.engine import ops\nfrom fastema.bridges import x"),
        ("bridges/memory.py", "from fastema.bridges.registry import bridge_of"),
        ("shadow/average.py", "from fastema.bridges import memory"),
        ("plan.py", "from fastema.bridges.memory import allocate\nfrom fastema.engine import ops"),
        ("checkpoint/files.py", "import numpy\nfrom fastema.layout.spec import TensorSpec"),
        ("checkpoint/files.py", "from fastema.engine import ops\nfrom .files import x"),
        ("posthoc.py", "from fastema.shadow import average\nfrom fastema.checkpoint import files"),
        ("posthoc.py", "import numpy\nfrom fastema.plan import Plan\ndef f():\n    import rich"),
        ("torch.py", "from fastema.errors import FastemaError\ndef f():\n    import torch"),
        ("keras.py", "import keras\nfrom fastema.shadow import average"),
        ("cli/demo.py", "import fastema, torch\nfrom rich.table import Table"),
        ("__init__.py", "if TYPE_CHECKING:\n    from fastema.shadow.average import EMA"),
    ],
)
def test_what_the_table_allows_passes(path: str, line: str) -> None:
    assert violations({**HOUSE, path: line}) == []
