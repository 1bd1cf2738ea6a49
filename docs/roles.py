# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Docstrings name each other as Sphinx does (``:class:`X```): the site shows the names alone."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`[~.]?(?:anomalib_pedenet\.)?([^`]+)`")


class Roles(griffe.Extension):
    """Takes the roles out of docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:  # noqa: ANN401 - of griffe
        """Take the roles out of an object's docstring.

        Args:
            obj (griffe.Object): What is documented.
            **_ (Any): Unused.
        """
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
