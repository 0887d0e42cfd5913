"""What the doctor found: plain data, and what it advises in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefixcache.doctor.orders import ITEMS, KEYS, LINES, SECTIONS, TOOLS
from prefixcache.doctor.pieces import VOLATILE
from prefixcache.doctor.spots import SPACES, VARYING

_ORDERS = {
    KEYS: "JSON keys in varying order",
    ITEMS: "list items in varying order",
    TOOLS: "tools in varying order",
    LINES: "lines or enumerated words in varying order",
    SECTIONS: "sections in varying order",
}
_ORDER_ADVICE = {
    KEYS: "Write JSON with sorted keys: json.dumps(value, sort_keys=True).",
    ITEMS: "Sort the items before writing them; a Python set has another order in every process.",
    TOOLS: "Send the tools in the same order every time, sorted by name, say.",
    LINES: "Sort them before writing them; a Python set has another order in every process.",
    SECTIONS: "Write the sections in the same order every time; sort retrieved documents by their id, not their score.",
}
_CLOCKS = {"datetime", "time", "timestamp"}
_DATES = {"date", "weekday"}
_IDS = {"uuid", "id", "hex"}


Counted = Literal["server", "estimate", "given"]
"""By the tokenizer of a server, at four characters each, or as token ids that were given."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a prompt: lines and columns count from 1, within the part; `token` counts from 0.

    `part` is such as "system message" or "tool 2", "" in a prompt that is one text.
    """

    prompt: str
    part: str
    line: int
    column: int
    token: int


@dataclass(frozen=True, slots=True)
class Example:
    """What a prompt has at the place, and the text around it on its line."""

    before: str
    value: str
    after: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that keeps prompts from sharing what comes behind it.

    It is in so many `prompts` of so many `groups`, at up to so many `places` in each, of
    which `place` is the first; there are `variants` of it. `saved_tokens` need no longer be
    computed if this is changed together with the other findings, `saved_alone` if nothing
    else is.
    """

    kind: str
    title: str
    place: Place
    examples: tuple[Example, ...]
    prompts: int
    places: int
    groups: int
    variants: int
    advice: str
    saved_tokens: int
    saved_alone: int
    saved_seconds: float | None


@dataclass(frozen=True, slots=True)
class Share:
    """Prompt tokens, and how many of them come from the cache."""

    tokens: int
    cached: int

    @property
    def share(self) -> float:
        return self.cached / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """Everything found, best advice first.

    Of the prompts, `groups` of two or more are alike; `ungrouped` are like no other.
    `counted` says whose tokens these are. `measured` is what a server that was followed
    found in its cache.
    """

    prompts: int
    groups: int
    ungrouped: int
    counted: Counted
    block_size: int
    today: Share
    after: Share
    saved_tokens: int
    saved_seconds: float | None
    findings: Sequence[Finding]
    measured: Share | None = None


def title(kinds: Sequence[str]) -> str:
    """Return what varies in words, such as "date and time"."""
    (first, *more) = kinds
    if first == VARYING:
        return "varying text"
    if first == SPACES:
        return "spaces and line ends that differ"
    if first in _ORDERS:
        return _ORDERS[first]
    return " and ".join([VOLATILE[first], *(VOLATILE[kind] for kind in more[:1])])


def advice(kinds: Sequence[str]) -> str:
    """Return what to do about it, in a sentence or two."""
    given = set(kinds)
    if kinds[0] in _ORDER_ADVICE:
        return _ORDER_ADVICE[kinds[0]]
    if SPACES in given:
        return "Build these prompts from one template, and strip what is put into it."
    if VARYING in given:
        return "Move it behind what is the same in all of these prompts: to the end, or into the last user message."
    if given & _CLOCKS:
        return "Move it to the end, or leave it out; a date alone changes once a day."
    if given & _DATES:
        return "Move it to the end: it makes every prompt new once a day."
    if given & _IDS:
        return "Leave it out if the model has no use for it, or move it to the end."
    return "Move it to the end, or leave it out if the model has no use for it."
