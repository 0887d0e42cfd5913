"""What a prompt cost and why its cached prefix ended where it did, in plain words.

Positions count tokens from the beginning of the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from prefixcache.errors import PrefixCacheError
from prefixcache.reasons import MissReason

if TYPE_CHECKING:  # only for its types: the results come with protobuf, which takes time to import
    from prefixcache.results import Completion

CONTEXT_CHARACTERS = 32


class Miss(Protocol):
    """What `Started`, `Completion` and `Lookup` of `prefixcache.results` have in common."""

    @property
    def miss_reason(self) -> MissReason | None: ...

    @property
    def miss_position(self) -> int: ...


class Tokenizing(Protocol):
    """What a client can do with text."""

    def tokenize(self, prompt: str) -> list[int]: ...


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
            return f"a cached prompt is the same up to {position} and goes on differently"
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
    return "; ".join(parts)


def around(client: Tokenizing, text: str, position: int) -> tuple[str, str] | None:
    """Return the ends of the text before and after its token `position`, or None if there is no such place.

    The characters are found by tokenizing beginnings of the text: about log2(characters)
    calls. Where a tokenizer merges across the cut, the place may be a few characters off.
    """
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fits = len(client.tokenize(text[:middle])) <= position
        except PrefixCacheError:
            return None
        low, high = (middle, high) if fits else (low, middle - 1)
    if low in (0, len(text)):
        return None
    return text[max(0, low - CONTEXT_CHARACTERS) : low], text[low : low + CONTEXT_CHARACTERS]
