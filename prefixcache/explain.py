"""What a prompt cost, why its cached prefix ended where it did, and what to do about it, in plain words.

Positions count tokens from the beginning of the prompt, unless they say characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from prefixcache.reasons import MissReason

if TYPE_CHECKING:  # only for its types: the results come with protobuf, which takes time to import
    from prefixcache.results import Completion, Lookup

CONTEXT_CHARACTERS = 32
SIGHT_CHARACTERS = 400
"""How far from the place where a prompt leaves the cached path something that varies is looked for."""


class Miss(Protocol):
    """What `Started`, `Completion` and `Lookup` of `prefixcache.results` have in common."""

    @property
    def miss_reason(self) -> MissReason | None: ...

    @property
    def miss_position(self) -> int: ...

    @property
    def alternative_tokens(self) -> int: ...


def phrase(miss: Miss) -> str:
    """Return the reason in two or three words, for a table."""
    match miss.miss_reason:
        case None:
            return "not said"
        case MissReason.NONE:
            return "all cached"
        case (
            MissReason.DIVERGED
            | MissReason.EVICTED
            | MissReason.INVALIDATED
            | MissReason.EXPIRED
            | MissReason.IN_FLIGHT
        ):
            return f"{label(miss.miss_reason)} at {miss.miss_position:,}"
        case reason:
            return label(reason)


def label(reason: str) -> str:
    """Return the name of a reason as words: "never seen"."""
    return reason.replace("_", " ")


def sentence(miss: Miss) -> str:
    """Return the reason as a clause with the position."""
    position = f"token {miss.miss_position:,}"
    match miss.miss_reason:
        case MissReason.NONE:
            return "all of it was cached but the last token, which is always computed"
        case MissReason.NEVER_SEEN if miss.miss_position == 0:
            return "nothing that begins like this has been cached yet"
        case MissReason.NEVER_SEEN:
            return f"what is cached ends at {position}: nothing that goes on from there has been cached yet"
        case MissReason.DIVERGED if miss.miss_position == 0:
            return "no cached prompt begins like this"
        case MissReason.DIVERGED:
            length = f" of {miss.alternative_tokens:,} tokens" if miss.alternative_tokens else ""
            return f"a cached prompt{length} is the same up to {position} and goes on differently"
        case MissReason.EVICTED:
            return f"what follows {position} was cached, but has been evicted for lack of room"
        case MissReason.INVALIDATED:
            return f"what follows {position} was cached, but has been invalidated"
        case MissReason.EXPIRED:
            return f"what follows {position} was cached, but its time to live is over"
        case MissReason.TOO_SHORT:
            return "the prompt is a single token, and that one is always computed"
        case MissReason.IN_FLIGHT:
            return f"what follows {position} is being computed for another request right now"
        case MissReason.BYPASSED:
            return "the request asked for the cache not to be read"
        case None:
            return "the server did not say why"


def elsewhere(found: Lookup) -> list[str]:
    """Return what other replicas hold of a prompt, a clause for each."""
    return [
        f"replica {other.replica_id} at {other.address} holds {other.cached_tokens:,} of the {found.prompt_tokens:,}"
        for other in found.elsewhere
    ]


def cost(completion: Completion) -> str:
    """Return what a request cost and why, as one line."""
    usage = completion.usage
    parts = [
        f"{usage.prompt_tokens:,} prompt tokens = {usage.cached_tokens:,} cached + {usage.computed_tokens:,} prefilled",
        sentence(completion),
    ]
    if completion.ttft is not None:
        parts.insert(1, f"first token after {completion.ttft * 1000:,.0f} ms")
    if completion.finish_reason == "length":
        parts.append(f"output cut off after {usage.completion_tokens:,} tokens")
    if completion.replica is not None:
        parts.append(f"answered by replica {completion.replica}")
    return "; ".join(parts)


class Place(NamedTuple):
    """A place in a text; `line` and `column` count from 1, `characters` from 0."""

    characters: int
    line: int
    column: int


def place_in(text: str, characters: int) -> Place:
    """Return where the text behind its first `characters` begins."""
    start_of_line = text.rfind("\n", 0, characters) + 1
    return Place(characters, text.count("\n", 0, characters) + 1, characters - start_of_line + 1)


def around(text: str, characters: int) -> tuple[str, str]:
    """Return the end of the first `characters` of a text, and the beginning of the rest."""
    before, after = max(0, characters - CONTEXT_CHARACTERS), characters + CONTEXT_CHARACTERS
    return text[before:characters], text[characters:after]


class Varying(NamedTuple):
    """Something in a text that tends to differ from prompt to prompt: what it is called, and where it stands."""

    what: str
    start: int
    end: int


def varying_at(text: str, characters: int) -> Varying | None:
    """Return what varies around or right behind a place, in the same line, if it is of a kind that tends to."""
    from prefixcache.doctor.pieces import VOLATILE, cut

    start = max(text.rfind("\n", 0, characters) + 1, characters - SIGHT_CHARACTERS)
    end = text.find("\n", characters)
    sight = text[start : end if end >= 0 else None][: characters - start + SIGHT_CHARACTERS]
    for kind, piece in cut(sight):
        start, begin = start + len(piece), start
        if start > characters and any(map(str.isalnum, piece)):  # spaces and quotes may share its first token
            return Varying(VOLATILE[kind], begin, start) if kind in VOLATILE else None
    return None


def advice(miss: Miss, varying: str = "") -> str:
    """Return what to do about a miss, as a clause; `varying` names what varies where the prompt diverges."""
    match miss.miss_reason:
        case MissReason.DIVERGED if varying:
            return f"move the {varying}, and whatever else changes, behind everything that stays the same"
        case MissReason.DIVERGED:
            return (
                "if this part changes from prompt to prompt, move it behind everything that stays the same; "
                "`prefixcache doctor` finds such places in a file of prompts"
            )
        case MissReason.NEVER_SEEN:
            return "nothing: it is cached once it has been computed; `prefixcache warm` does that ahead of time"
        case MissReason.EVICTED:
            return "give the server more --cache-memory, or keep the prompt by a pin or a higher priority"
        case MissReason.EXPIRED:
            return "ask for a longer time to live"
        case MissReason.INVALIDATED:
            return "nothing: it was forgotten on request, and is cached again once it has been computed"
        case MissReason.IN_FLIGHT:
            return "nothing: a request sent now waits for it instead of computing it again"
        case MissReason.BYPASSED:
            return "let the request read the cache"
        case MissReason.NONE | MissReason.TOO_SHORT | None:
            return "nothing"
