"""The ``fastema`` command: one module or package per subcommand, registered in `COMMANDS`.

A command module imports only argparse at the top and everything else inside ``run``, so that
``fastema --help`` answers at once. It defines ``SUMMARY``, one line for the help; ``EXTRA``, the
extra of fastema that the command needs; ``NEEDS``, a mapping from the import names of required
packages to their distributions; ``add_arguments(parser)``; and ``run(args)``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import fastema
from fastema.cli import average, bench, convert, demo, doctor, inspect, plan, smooth
from fastema.errors import FastemaError

COMMANDS: dict[str, Any] = {
    "average": average,
    "bench": bench,
    "convert": convert,
    "demo": demo,
    "doctor": doctor,
    "inspect": inspect,
    "plan": plan,
    "smooth": smooth,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``fastema`` command line and return its exit code.

    `argv` defaults to ``sys.argv[1:]``. The exit code is 0 on success, 2 for a usage error, an
    unusable input or a missing package, and 130 after an interrupt. argparse raises SystemExit for
    ``--help`` and for wrong arguments.
    """
    if sys.stdout is None:
        print("fastema: standard output is closed", file=sys.stderr)
        return 2
    parser, commands = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.get(args.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS[args.command]
    missing = [package for module, package in command.NEEDS.items() if not _installed(module)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        print(
            f"fastema {args.command}: {names} {verb} not installed; install what this "
            f'command needs: pip install "fastema[{command.EXTRA}]"',
            file=sys.stderr,
        )
        return 2
    try:
        code: int = command.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"fastema {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader closed the pipe. Without a new stdout, Python would report that again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FastemaError as error:
        text = _name_options(str(error), commands[args.command])
        print(f"fastema {args.command}: {text}", file=sys.stderr)
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        print(f"fastema {args.command}: {about}{error.strerror or error}", file=sys.stderr)
    return 2


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the main parser, and a mapping from each command's name to its parser."""
    parser = argparse.ArgumentParser(
        prog="fastema",
        description="In-place moving averages of model weights at the speed of memory.",
    )
    parser.add_argument("--version", action="version", version=f"fastema {fastema.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    made = {}
    for name, command in COMMANDS.items():
        made[name] = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(made[name])
    return parser, made


def _name_options(text: str, parser: argparse.ArgumentParser) -> str:
    """Replace the names of Python arguments in an error by the command's options.

    ``decay=1.5`` becomes ``--decay 1.5``, and ``pass decay`` becomes ``pass --decay``.
    """
    for action in parser._actions:
        option = next((one for one in action.option_strings if one.startswith("--")), "")
        if option:
            name = re.escape(action.dest)
            text = re.sub(rf"(?<!\S){name}='([^']*)'", rf"{option} \1", text)
            text = re.sub(rf"(?<!\S){name}=(?=\S)", f"{option} ", text)
            text = re.sub(rf"\bpass {name}\b", f"pass {option}", text)
    return text


def _installed(module: str) -> bool:
    """Return whether `module` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # an import hook refused the name
        return False
