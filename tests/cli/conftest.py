from collections.abc import Callable
from typing import NamedTuple

import pytest

from fastema.cli import main


class Output(NamedTuple):
    """What a command wrote to standard output and standard error."""

    out: str
    err: str


@pytest.fixture
def fastema(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """Return a function that runs a command line, asserts its exit code and returns its output."""

    def call(line: str, *arguments: object, code: int = 0) -> Output:
        try:
            found = main([*line.split(), *map(str, arguments)])
        except SystemExit as stopped:
            found = stopped.code
        said = Output(*capsys.readouterr())
        assert found == code, said
        return said

    return call
