"""Streams of requests for measuring the cache: what is asked, and what is generated.

Every generator is deterministic and yields packed tokens one request at a time, so
that no more than one prompt need be held. `sized` is the only one that repeats
nothing; the others differ in where prompts part: after a long system prompt
(agents), where the last turn ended (chat), as in a recorded trace (trace), or
anywhere (branch).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from prefixcache.tokens import TOKEN_BYTES

TRACE_BLOCK_TOKENS = 512
"""Tokens that one hash id of a trace stands for."""


class Request(NamedTuple):
    """A prompt and what is generated after it, packed. The whole of it is what gets cached."""

    prompt: bytes
    output: bytes

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // TOKEN_BYTES

    @property
    def output_tokens(self) -> int:
        return len(self.output) // TOKEN_BYTES


Workload = Callable[[], Iterator[Request]]


def agents(
    requests: int = 5_000, systems: int = 64, system: int = 2_048, own: int = 128, output: int = 64
) -> Iterator[Request]:
    """System prompts chosen by Zipf's law (exponent 1), each followed by a question of its own."""
    source = random.Random("agents")
    prompts = [_tokens(source, system) for _ in range(systems)]
    for chosen in source.choices(prompts, cum_weights=zipf(systems), k=requests):
        yield Request(chosen + _tokens(source, own), _tokens(source, output))


def zipf(count: int) -> list[float]:
    """Cumulative weights of `count` choices by Zipf's law (exponent 1)."""
    return list(accumulate(1 / rank for rank in range(1, count + 1)))


def chat(sessions: int = 500, turns: int = 12, user: int = 100, output: int = 200) -> Iterator[Request]:
    """Conversations that grow by a question and an answer per turn.

    Their lengths are half to one and a half times the means given; each round goes
    through all sessions in another order.
    """
    source = random.Random("chat")
    histories = [b""] * sessions
    for _ in range(turns):
        for session in source.sample(range(sessions), sessions):
            prompt = histories[session] + _tokens(source, source.randint(user // 2, user * 3 // 2))
            answer = _tokens(source, source.randint(output // 2, output * 3 // 2))
            histories[session] = prompt + answer
            yield Request(prompt, answer)


def branch(requests: int = 20_000, base: int = 4_096, own: int = 64) -> Iterator[Request]:
    """Prompts that leave one base at random depths: the worst case, a chain of ever shorter edges."""
    source = random.Random("branch")
    trunk = _tokens(source, base)
    for _ in range(requests):
        yield Request(trunk[: source.randrange(base) * TOKEN_BYTES] + _tokens(source, own), b"")


def recorded(path: Path, requests: int = 3_000) -> Iterator[Request]:
    """The first requests of a trace in the Mooncake format.

    That is JSON lines with input_length, output_length and hash_ids. Each hash id
    becomes 512 tokens made from it; the prompt is cut to its recorded length.
    """
    with path.open() as lines:
        for _, line in zip(range(requests), lines, strict=False):
            entry = json.loads(line)
            yield _from_hash_ids(entry["hash_ids"], entry["input_length"], entry["output_length"], line)


def synthetic(requests: int = 3_000) -> Iterator[Request]:
    """A stand-in for a recorded trace: long prompts that share a first piece, many going on where another ended."""
    source = random.Random("synthetic trace")
    fresh = iter(range(1, 1 << 40))
    live: list[list[int]] = []
    for number in range(requests):
        if live and source.random() < 0.45:
            ids = source.choice(live[-200:])
        else:
            ids = [0]
            live.append(ids)
        ids.extend(next(fresh) for _ in range(int(source.lognormvariate(2.1, 0.9)) + 1))
        length = len(ids) * TRACE_BLOCK_TOKENS - source.randrange(TRACE_BLOCK_TOKENS)
        yield _from_hash_ids(ids, length, source.randint(20, 700), f"synthetic {number}")


def sized(requests: int, length: int = 512) -> Iterator[Request]:
    """Prompts that share nothing."""
    source = random.Random("sized")
    for _ in range(requests):
        yield Request(_tokens(source, length), b"")


def unique_blocks(workload: Iterable[Request], block_size: int) -> int:
    """How many blocks the whole blocks of all prompts and outputs fill if every one is kept once."""
    size = block_size * TOKEN_BYTES
    seen: set[int] = set()
    for prompt, output in workload:
        sequence = prompt + output
        before = 0
        for start in range(0, len(sequence) - size + 1, size):
            before = hash((before, sequence[start : start + size]))
            seen.add(before)
    return len(seen)


def _from_hash_ids(ids: list[int], length: int, output: int, name: str) -> Request:
    prompt = b"".join(_tokens(random.Random(i), TRACE_BLOCK_TOKENS) for i in ids)
    return Request(prompt[: length * TOKEN_BYTES], _tokens(random.Random(name), output))


def _tokens(source: random.Random, count: int) -> bytes:
    """Packed tokens with any ids; what they are makes no difference to a cache."""
    return source.randbytes(count * TOKEN_BYTES)
