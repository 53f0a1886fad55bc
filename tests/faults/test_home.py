"""No home, a read-only home, no place for temporary files: updates work all the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders of POSIX systems")

READ_ONLY = "/proc"
NOWHERE = "/dev/null/nowhere"  # nobody can make a folder there, root neither

UPDATE = """
    import sys
    import tempfile
    import numpy as np
    if sys.argv[1] == "no temporary folder":
        tempfile._candidate_tempdir_list = lambda: ["/dev/null/nowhere"]
    import fastema
    avg, x = np.arange(1.0, 40.0), np.arange(1, 40, dtype=np.float32)
    fastema.lerp_([avg], [3 * x], 0.5)
    np.testing.assert_array_equal(avg, 2 * x)
    from fastema.kernels import jit
    print(jit.cache_folder())
"""
BARE = dict.fromkeys(
    ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR", "TEMP", "TMP", "LOCALAPPDATA"]
)


@pytest.mark.slow
def test_read_only_home_and_cache_home(tmp_path: Path, python: Callable[..., str]) -> None:
    settings = {**BARE, "HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "TMPDIR": str(tmp_path)}
    used = python(UPDATE, "", **settings).strip()
    assert Path(used).parent == tmp_path / f"fastema-{os.getuid()}"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(READ_ONLY), reason="no folder that nobody can write to")
def test_home_that_may_be_read_but_not_written(tmp_path: Path, python: Callable[..., str]) -> None:
    settings = {**BARE, "HOME": READ_ONLY, "TMPDIR": str(tmp_path)}
    assert Path(python(UPDATE, "", **settings).strip()).is_relative_to(tmp_path)


def test_cache_home_is_used(tmp_path: Path, python: Callable[..., str]) -> None:
    used = python(UPDATE, "", **{**BARE, "HOME": NOWHERE, "XDG_CACHE_HOME": str(tmp_path)})
    assert Path(used.strip()).parent == tmp_path / "fastema"


def test_unwritable_cache_setting_is_passed_over(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    settings = {**BARE, "NUMBA_CACHE_DIR": NOWHERE, "XDG_CACHE_HOME": str(tmp_path)}
    assert Path(python(UPDATE, "", **settings).strip()).parent == tmp_path / "fastema"


@pytest.mark.slow
def test_user_without_a_home(tmp_path: Path, python: Callable[..., str]) -> None:
    # As in a container whose user id the list of users does not know.
    unknown = "import pwd\npwd.getpwuid = {}.__getitem__\n"
    used = python(unknown + dedent(UPDATE), "", **{**BARE, "TMPDIR": str(tmp_path)}).strip()
    assert Path(used).parent == tmp_path / f"fastema-{os.getuid()}"


def test_nothing_can_be_written_anywhere(python: Callable[..., str]) -> None:
    settings = {**BARE, "HOME": NOWHERE, "TMPDIR": NOWHERE, "NUMBA_CACHE_DIR": NOWHERE}
    assert python(UPDATE, "no temporary folder", **settings).strip() == "None"
