"""A reader's side of the hints: who is there, and who holds how much of a prompt."""

from __future__ import annotations
