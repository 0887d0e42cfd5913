"""What to ask the embedded model: a sheet of facts to stand in its system prompt, and questions about it.

The names and numbers on it are none of those that the model was trained on.
"""

from __future__ import annotations

import re
from pathlib import Path

QUESTIONS = (
    "How much is the Korwood sofa?",
    "And on which shelf is it?",
    "What about the Dalland kettle?",
    "When do you close?",
    "What does the Zarquil lamp cost?",
)
"""A few to begin with; the last one is about something that is not on the sheet."""


def sheet() -> str:
    """Return the sheet: a shop's stock, well over 1,000 tokens of it."""
    return Path(__file__).with_name("sample.md").read_text(encoding="utf-8").strip()


def facts() -> dict[str, dict[str, str]]:
    """Return what the sheet says of each thing, and of `The desk`: values by what they are called."""
    rows = re.findall(r"^(?:- )?([^:\n]+): (.+;.+)$", sheet(), re.MULTILINE)
    return {thing: dict(map(_fact, values.split("; "))) for thing, values in rows}


def _fact(text: str) -> tuple[str, str]:
    """Take apart a label, which is in small letters, and its value, which begins with none."""
    match = re.fullmatch(r"([a-z ]+) ([^a-z].*)", text)
    assert match is not None
    return match[1], match[2]
