"""Docstrings for the site: reStructuredText's roles and double backticks become Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_LITERAL = re.compile(r"``([^`]+(?:`[^`]+)*?)``")


def as_markdown(text: str) -> str:
    """Return a docstring with its roles and literals as Markdown's code."""
    return _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", text))


class Roles(griffe.Extension):
    """Rewrites the docstring of every object that is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See :class:`griffe.Extension`."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
