"""The front end: light, clear about what is missing, and with the exit codes it documents."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from fastema import __version__, cli

from ..support.process import run_python

# The names are refused as an import hook, or an installation without the extra, would do it.
WITHOUT = """
import sys
from fastema.cli import main

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
sys.exit(main({arguments!r}))
"""


class _Interrupted:
    """A command that the user stops."""

    SUMMARY = "Never ends."
    EXTRA = "none"
    NEEDS: Mapping[str, str] = {}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--forever", action="store_true")

    def run(self, args: argparse.Namespace) -> int:
        raise KeyboardInterrupt


def test_version(fastema: Any) -> None:
    version = f"fastema {__version__}\n"
    assert fastema("--version").out == version
    done = run_python("-m", "fastema", "--version")
    assert (done.returncode, done.stdout) == (0, version)


@pytest.mark.parametrize(("command", "said"), [("", "demo"), ("polish", "polish")])
def test_what_is_no_command(command: str, said: str, fastema: Any) -> None:
    assert said in fastema(command, code=2).err


def test_the_front_end_is_light() -> None:
    done = run_python(
        "-c",
        "import json, sys; before = set(sys.modules); from fastema.cli import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
    )
    assert done.returncode == 0, done.stderr
    packages = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert packages - sys.stdlib_module_names - {"fastema"} == set()


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (["sklearn"], "scikit-learn is not installed"),
        (["matplotlib", "rich"], "matplotlib and rich are not installed"),
        (
            ["matplotlib", "rich", "sklearn", "torch"],
            "torch, scikit-learn, matplotlib and rich are not installed",
        ),
    ],
    ids=["one", "two", "all"],
)
def test_missing_packages_are_named_with_the_way_to_get_them(
    missing: list[str], named: str
) -> None:
    done = run_python("-c", WITHOUT.format(missing=missing, arguments=["demo"]))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f'fastema demo: {named}; get what this command needs with: pip install "fastema[demo]"\n'
    )


def test_help_needs_no_extra() -> None:
    missing = ["matplotlib", "rich", "sklearn", "torch", "numba", "numpy"]
    done = run_python("-c", WITHOUT.format(missing=missing, arguments=["demo", "--help"]))
    assert done.returncode == 0, done.stderr
    assert "--decay" in done.stdout


def test_interrupt(monkeypatch: pytest.MonkeyPatch, fastema: Any) -> None:
    monkeypatch.setitem(cli.COMMANDS, "wait", _Interrupted())
    assert fastema("wait --forever", code=130).err == "fastema wait: interrupted\n"
