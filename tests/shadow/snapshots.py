"""Snapshots of averages of any framework's weights, beside those of NumPy's."""

from __future__ import annotations
