"""What the site has besides the pages in docs/: README, results, commands, a page for each peer.

A hook of MkDocs, see ``mkdocs.yml``. Links that leave docs/ lead to the pages that are made here,
and those to files of the checkout become plain names.
"""

from __future__ import annotations

import io
import posixpath
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import generate  # noqa: E402  (docs/ is no package)
from docstring_roles import as_markdown  # noqa: E402

PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
"""Pages of the checkout that the site has under other names."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
_NAMED = re.compile(r"`bench/results/([\w-]+)\.md`")


def _results() -> list[Path]:
    found = sorted((ROOT / "bench" / "results").glob("*.md"))
    return [path for path in found if "quick" not in path.stem]


def _places() -> dict[str, str]:
    """The site's address of every file of the checkout that it has, by its path there."""
    found = dict(PLACES)
    for path in _results():
        found[f"bench/results/{path.name}"] = f"results/{path.name}"
    for path in [*(ROOT / "bench" / "results").glob("*.png"), *(ROOT / "examples").glob("*.png")]:
        found[path.relative_to(ROOT).as_posix()] = f"pictures/{path.name}"
    for path in (ROOT / "docs").rglob("*.*"):
        found[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT / "docs").as_posix()
    return found


def rewritten(text: str, source: str, address: str, places: dict[str, str]) -> str:
    """Return a page whose links lead to the site's pages.

    Parameters
    ----------
    text : str
    source, address : str
        The page's path in the checkout, and its address in the site.
    places : dict
        Addresses by path.
    """

    def link(found: re.Match[str]) -> str:
        picture, label, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path not in places:
            return f"`{path}`" if label.strip("`") == target else f"{label} (`{path}`)"
        relative = posixpath.relpath(places[path], posixpath.dirname(address) or ".")
        return f"{picture}[{label}]({relative}{anchor or ''})"

    def named(found: re.Match[str]) -> str:
        path = f"bench/results/{found[1]}.md"
        if path not in places:
            return found[0]
        relative = posixpath.relpath(places[path], posixpath.dirname(address) or ".")
        return f"[{found[1]}]({relative})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else _NAMED.sub(named, _LINK.sub(link, part))
        for part in parts
    )


def _commands() -> str:
    """What every command prints for ``--help``."""
    from fastema.cli import COMMANDS, main

    def help_of(*arguments: str) -> str:
        out = io.StringIO()
        with redirect_stdout(out), suppress(SystemExit):
            main([*arguments, "--help"])
        return f"```text\n{out.getvalue().rstrip()}\n```\n"

    sections = [f"# Commands\n\n{help_of()}"]
    sections += [f"## fastema {name}\n\n{help_of(name)}" for name in sorted(COMMANDS)]
    return "\n".join(sections)


def _peer_page(module: str, name: str) -> str:
    """How to come from one peer: the import, the differences, the classes."""
    plain = name.strip("`")
    lines = [
        f"# Coming from {plain}\n",
        as_markdown(generate.introduction(module)) + "\n",
        f"```python\nfrom fastema.compat import {module}\n```\n",
    ]
    if module in generate.installable():
        lines.append(
            f"Or leave the script as it is, and call `fastema.compat.install({module!r})` before "
            "it runs; [Replace what you use](../drop-in.md) says what that does.\n"
        )
    rows = generate.differences(module)
    if rows:
        cells = [f"| {theirs} | {ours} |".replace("``", "`") for theirs, ours in rows]
        table = "\n".join(["| theirs | ours |", "|---|---|", *cells])
        lines += ["## What is different\n", f"{table}\n"]
    lines += ["## Classes and functions\n"]
    lines += [
        f"::: fastema.compat.{module}.{one}\n    options:\n      heading_level: 3\n"
        for one in generate.public(module)
    ]
    return "\n".join(lines)


def on_config(config: Any) -> Any:
    """Name the pages that are made here in the navigation."""
    nav = {next(iter(one)): one for one in config["nav"]}
    nav["Coming from"]["Coming from"] += [
        {name.strip("`"): f"from/{module}.md"} for module, name in generate.PEERS.items()
    ]
    nav["Benchmarks"]["Benchmarks"] += [
        {path.stem.replace("-", " "): f"results/{path.name}"} for path in _results()
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is made here."""
    places = _places()
    made: dict[str, str | bytes] = {"reference/commands.md": _commands()}
    for module, name in generate.PEERS.items():
        made[f"from/{module}.md"] = _peer_page(module, name)
    for path, address in places.items():
        if not path.startswith("docs/"):
            file = ROOT / path
            made[address] = file.read_text("utf-8") if path.endswith(".md") else file.read_bytes()
            if isinstance(text := made[address], str):
                made[address] = rewritten(text, path, address, places)
    for address, content in made.items():
        files.append(File.generated(config, address, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links of the pages in docs/ that leave it to where the site has their targets."""
    if page.file.generated_by is not None:
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri, _places())
