"""README and docs/: links lead somewhere, and what is generated is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")
FILE = re.compile(r"`((?:bench/results|docs|examples|tests|fastema|kernels|bench)/[\w./-]+\.\w+)`")


@pytest.mark.skipif(not PAGES[0].exists(), reason="pages belong to a checkout, not to an install")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.skipif(not PAGES[0].exists(), reason="pages belong to a checkout, not to an install")
def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    made = {"index.md", "examples.md", "contributing.md", "changelog.md", "reference/commands.md"}
    assert pages == named - made


@pytest.mark.skipif(not PAGES[0].exists(), reason="pages belong to a checkout, not to an install")
def test_generated_tables_are_up_to_date() -> None:
    script = ROOT / "docs" / "generate.py"
    command = [sys.executable, script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
