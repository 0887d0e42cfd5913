"""A replica's side of the hints: keeps its lease and its table in Redis current, in a thread of its own."""

from __future__ import annotations
