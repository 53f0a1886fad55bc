"""Docstrings for the site: roles and literals as Markdown, the options that averages share."""

from __future__ import annotations

import re
from inspect import formatannotation
from typing import Any

import griffe

from fastema.average.options import document_options, shared_parameters

_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_LITERAL = re.compile(r"``([^`]+(?:`[^`]+)*?)``")


def as_markdown(text: str) -> str:
    """Return a docstring with its roles and literals as Markdown's code."""
    return _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", text))


class Roles(griffe.Extension):
    """Rewrites docstrings, and lists shared options where fastema does so when it is imported."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See :class:`griffe.Extension`."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(document_options(obj.docstring.value))

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """See :class:`griffe.Extension`."""
        if not any(str(one.annotation) == "Unpack[AverageOptions]" for one in func.parameters):
            return
        func.parameters = griffe.Parameters(
            *(one for one in func.parameters if one.kind != griffe.ParameterKind.var_keyword),
            *(
                griffe.Parameter(
                    one.name,
                    annotation=formatannotation(one.annotation),
                    kind=griffe.ParameterKind.keyword_only,
                    default=repr(one.default),
                )
                for one in shared_parameters()
            ),
        )
