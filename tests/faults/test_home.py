"""No home, a read-only home, no place for temporary files: updates work all the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders of POSIX systems")

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
    from fastema.engine import disk_cache
    print(disk_cache.folder())
"""
BARE = dict.fromkeys(
    ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR", "TEMP", "TMP", "LOCALAPPDATA"]
)


CASES = {
    # settings beside BARE ({} is a folder that can be written to), and the folder of the cache
    "no home": ({"TMPDIR": "{}"}, "{}/fastema-USER"),
    "home that cannot be made": (
        {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "TMPDIR": "{}"},
        "{}/fastema-USER",
    ),
    "cache setting that cannot be written": (
        {"NUMBA_CACHE_DIR": NOWHERE, "XDG_CACHE_HOME": "{}"},
        "{}/fastema",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_cached_in_the_first_folder_that_can_be_written(
    case: str, tmp_path: Path, python: Callable[..., str]
) -> None:
    given, folder = CASES[case]
    settings = {**BARE, **{name: value.format(tmp_path) for name, value in given.items()}}
    # As in a container whose user id the list of users does not know.
    unknown = "import pwd\npwd.getpwuid = {}.__getitem__\n" if case == "no home" else ""
    used = Path(python(unknown + dedent(UPDATE), "", **settings).strip())
    assert str(used.parent) == folder.format(tmp_path).replace("USER", str(os.getuid()))


def test_update_works_where_nothing_can_be_written(python: Callable[..., str]) -> None:
    settings = {**BARE, "HOME": NOWHERE, "TMPDIR": NOWHERE, "NUMBA_CACHE_DIR": NOWHERE}
    assert python(UPDATE, "no temporary folder", **settings).strip() == "None"
