"""Everything that the package exports exists and is documented."""

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import fastema
from fastema import errors, rules

ROOT = Path(__file__).parents[1]
in_a_checkout = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="belongs to a checkout")


# An import of TensorFlow takes seconds and half a gigabyte.
@pytest.mark.parametrize("tensorflow", [False, pytest.param(True, marks=pytest.mark.tensorflow)])
def test_every_module_is_documented_and_defines_its_exports(tensorflow: bool) -> None:
    for info in pkgutil.walk_packages(fastema.__path__, "fastema."):
        left_out = info.name.startswith("fastema.kernels") or info.name.endswith("__main__")
        if left_out or ("tensorflow" in info.name) is not tensorflow:
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:  # for a framework that is not installed
            if (error.name or "").startswith("fastema"):
                raise
            continue
        assert (module.__doc__ or "").strip(), info.name
        names = list(getattr(module, "__all__", []))
        assert len(names) == len(set(names)), f"{info.name}.__all__ repeats a name"
        missing = [name for name in names if not hasattr(module, name)]
        assert missing == [], f"{info.name}.__all__ lists missing names"


@pytest.mark.parametrize("name", sorted(set(fastema.__all__) - {"__version__"}))
def test_exported_name_is_documented(name: str) -> None:
    exported = getattr(fastema, name)
    doc = inspect.getdoc(exported)
    assert doc
    if inspect.isclass(exported):
        members = [m for m in dir(exported) if not m.startswith("_")]
        assert [m for m in members if not inspect.getdoc(inspect.getattr_static(exported, m))] == []
    if inspect.isclass(exported) or inspect.isroutine(exported):
        parameters = inspect.signature(exported).parameters
        assert [p for p in parameters if p[0] != "_" and p not in doc] == []


def test_every_error_is_also_a_builtin_exception() -> None:
    found = [c for c in vars(errors).values() if inspect.isclass(c)]
    classes = [c for c in found if issubclass(c, Exception) and not issubclass(c, Warning)]
    standard = {value for value in vars(builtins).values() if inspect.isclass(value)}
    assert errors.FastemaError in classes
    for one in classes:
        assert issubclass(one, errors.FastemaError)
        assert one.__doc__
        if one is not errors.FastemaError and not one.__subclasses__():
            assert (set(one.__mro__) & standard) - {Exception, BaseException, object}, one


WITHOUT_FRAMEWORKS = """
    import importlib, inspect, pydoc, sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name in ("torch", "keras", "lightning", "tensorflow", "transformers", "matplotlib"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    package = importlib.import_module(sys.argv[1])
    found = dict(inspect.getmembers(package))
    print(*sorted(set(package.__all__) - found.keys()))
    assert pydoc.render_doc(package)
    exec(f"from {sys.argv[1]} import *")
    missing = sorted(name for name in package._HOMES if not hasattr(package, name))
    print(*missing)
    for name in missing:
        try:
            getattr(package, name)
        except AttributeError as error:
            print(error)
"""


@pytest.mark.parametrize("package", ["fastema", "fastema.compat", "fastema.tracking"])
def test_packages_can_be_inspected_without_frameworks(
    package: str, python: Callable[..., str]
) -> None:
    promised, missing, *said = python(WITHOUT_FRAMEWORKS, package).splitlines()
    assert promised == ""
    assert ("keras" in missing) == (package != "fastema.tracking")
    assert all("needs the package" in line for line in said)
    # Type checkers know every lazy name.
    module = importlib.import_module(package)
    tree = ast.parse(inspect.getsource(module))
    conditions = {ast.unparse(one.test): one.body for one in tree.body if isinstance(one, ast.If)}
    imports = [one for one in conditions["TYPE_CHECKING"] if isinstance(one, ast.ImportFrom)]
    known = {alias.asname or alias.name for one in imports for alias in one.names}
    assert known == set(module._HOMES)


# Modules of fastema/compat that belong to no peer, and peers without classes, only with layouts.
NO_PEERS = {
    *("__init__", "averager", "installation", "lists", "mirrored", "modules", "shares"),
    *("signatures", "composer", "d2go", "mmengine", "nemo"),
}


@in_a_checkout
def test_drop_ins_are_in_every_list_of_drop_ins() -> None:
    from fastema.compat import _HOMES, __all__, installation

    peers = set(_HOMES) - set(__all__)
    files = {path.stem for path in (ROOT / "fastema" / "compat").iterdir() if path.stem[0] != "_"}
    assert files - NO_PEERS == peers, "_HOMES in fastema/compat/__init__.py"
    page = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    table = page.partition("## What there is")[2].partition("## ")[0]
    listed = {row.split("|")[2].strip(" `") for row in table.splitlines() if row.startswith("| ")}
    assert listed - {"module"} == peers, "the table of docs/drop-in.md, What there is"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:fastema\.compat)?\.(\w+)`", readme))
    assert named >= peers - {"tensorflow"}, "README.md, Replace what you use"
    assert installation._KNOWN.keys() <= peers
    described = set(re.findall(r'``"(\w+)"``', installation.install.__doc__ or ""))
    assert installation._KNOWN.keys() == described, "install's docstring"
    generator = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert generator["PEERS"].keys() == peers - {"tensorflow"}, "PEERS in docs/generate.py"


@in_a_checkout
def test_every_rule_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "rules.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^        - (\w+)$", page, re.MULTILINE))
    functions = {name for name in rules.__all__ if inspect.isfunction(getattr(rules, name))}
    assert listed >= functions, "docs/reference/rules.md"
