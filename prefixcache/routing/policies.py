"""Which replica gets a request. A policy is one function that puts the candidates in order, best first.

Add one to POLICIES and it can be chosen by name. A policy keeps nothing: all it knows is
what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from prefixcache.tokens import HASH_BYTES

FIRST_BLOCKS = 16
"""How many blocks from the first say what a prompt is about, if nothing else does."""
SAVING = 8
"""How many waiting tokens it is worth not to compute one."""
REQUEST_TOKENS = 500
"""What a request costs those beside it, in tokens computed."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request, as a policy sees it.

    `hashes` are 16 bytes for each whole block that could be reused, empty if not known;
    `tokens` is the length of the prompt, 0 if not known; `turn` counts requests.
    """

    hashes: bytes
    tokens: int
    session: str = ""
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica, as a policy sees it.

    `cached_tokens` of the prompt need not be computed there. `waiting_tokens` are prompt
    tokens that its requests still have to compute. Of its `blocks`, `room` are free or can
    be evicted.
    """

    replica_id: str
    cached_tokens: int
    running: int
    waiting: int
    waiting_tokens: int
    room: int
    blocks: int

    @property
    def requests(self) -> int:
        return self.running + self.waiting


Policy = Callable[[Wanted, Sequence[Candidate]], Sequence[Candidate]]


def round_robin(wanted: Wanted, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Each in its turn, whatever is asked."""
    first = wanted.turn % len(candidates)
    return [*candidates[first:], *candidates[:first]]


def least_loaded(wanted: Wanted, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """The fewest requests, then the fewest tokens to compute; in turn if equal."""
    return sorted(round_robin(wanted, candidates), key=lambda one: (one.requests, one.waiting_tokens))


def session(wanted: Wanted, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """A session stays where it began; without one, the prompt's first blocks decide."""
    if not wanted.session:
        return consistent_hash(wanted, candidates)
    return rendezvous(wanted.session.encode(), candidates)


def consistent_hash(wanted: Wanted, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Prompts that begin alike go to one replica; those too short to say go to the least loaded."""
    first = wanted.hashes[: FIRST_BLOCKS * HASH_BYTES][-HASH_BYTES:]
    return rendezvous(first, candidates) if first else least_loaded(wanted, candidates)


def rendezvous(key: bytes, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """The order that a key gives: if a replica comes or goes, only the keys for which it is first move.

    D. G. Thaler, C. V. Ravishankar: Using Name-Based Mappings to Increase Hit Rates
    (IEEE/ACM Transactions on Networking 6, 1998).
    """
    return sorted(candidates, key=lambda one: xxh3_64_intdigest(key + one.replica_id.encode()), reverse=True)


def prefix(wanted: Wanted, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Least (tokens waiting there) + SAVING x (tokens it would compute + REQUEST_TOKENS x requests there).

    All of it is work, counted in prompt tokens. Those that wait are computed before this
    prompt, whoever gets it: they cost time once. What this prompt computes anew costs its own
    time, that of all who come after it, and the room of blocks that another replica has
    already; and each request makes the steps longer, and its end is far. Equal scores, as
    those of a prompt that nobody knows, go to the replica with most room, in turn if equal.

    SAVING is what keeps a prefix where it is: it spreads to a second replica when what
    waits at the first exceeds that many times what it saves, and from then on both hold it
    and share its requests by their load, so that it does not go back and forth.

    The sum does what (tokens it would compute) x (requests + 1) is meant to do (D. Zhang et
    al.: LMetric, arXiv 2603.15202), which knows nothing of how much is waiting: under load it
    sends short prompts behind long ones. `benchmarks.bench_routing` compares the two.
    """
    return sorted(
        round_robin(wanted, candidates),
        key=lambda one: (
            one.waiting_tokens + SAVING * (max(wanted.tokens - one.cached_tokens, 1) + REQUEST_TOKENS * one.requests),
            -one.room,
        ),
    )


DEFAULT = "prefix"
POLICIES: dict[str, Policy] = {
    "prefix": prefix,
    "round-robin": round_robin,
    "least-loaded": least_loaded,
    "session": session,
    "consistent-hash": consistent_hash,
}
