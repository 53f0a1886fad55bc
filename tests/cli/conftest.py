from collections.abc import Callable
from typing import NamedTuple

import pytest

from fastema.cli import main


class Said(NamedTuple):
    """What a command wrote on standard output, and on standard error."""

    out: str
    err: str


@pytest.fixture
def fastema(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``fastema("plan --json", path, code=2)``: what it says, after asserting its exit code."""

    def called(line: str, *arguments: object, code: int = 0) -> Said:
        try:
            found = main([*line.split(), *map(str, arguments)])
        except SystemExit as stopped:
            found = stopped.code
        said = Said(*capsys.readouterr())
        assert found == code, said
        return said

    return called
