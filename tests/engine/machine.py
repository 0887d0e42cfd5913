"""A machine on paper: the seconds of a step from known costs, so that tests know what would be best."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.pace import Load
from engine.scheduler import Step


@dataclass
class Machine:
    """Costs in seconds: of a step, of a row, of a key read for a prompt and for a stream.

    The defaults are about those of 6 layers x 256 on two cores. `speed` says how much
    longer the n-th step takes than it should, `noise` is the standard deviation of the
    logarithm of the seconds.
    """

    step: float = 0.012
    row: float = 43e-6
    prompt_key: float = 48e-9
    stream_key: float = 500e-9
    noise: float = 0.0
    slower: Callable[[int], float] = lambda steps: 1.0
    steps: int = 0
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def exactly(self, load: Load) -> float:
        """What a step of `load` should take."""
        rows = load.prompt_rows + load.stream_rows
        keys = load.prompt_keys * self.prompt_key + load.stream_keys * self.stream_key
        return self.step + rows * self.row + keys

    def run(self, load: Load) -> float:
        """What the next step, of `load`, takes."""
        self.steps += 1
        noise = self._rng.lognormvariate(0.0, self.noise) if self.noise else 1.0
        return self.exactly(load) * self.slower(self.steps) * noise

    def largest_chunk(self, streams: Load, start: int, seconds: float) -> int:
        """How many tokens from position `start` on fit into a step beside `streams`, at least 1 and at most 2,048."""
        low, high = 1, 2048
        while low < high:
            middle = (low + high + 1) // 2
            load = Load(stream_rows=streams.stream_rows, stream_keys=streams.stream_keys)
            load.add_prompt(start, middle)
            low, high = (middle, high) if self.exactly(load) <= seconds else (low, middle - 1)
        return low

    def rate(self, streams: Load, start: int, end: int, seconds: float) -> float:
        """Tokens per second of a prefill whose every step takes as nearly `seconds` as there are whole tokens."""
        position, total = start, 0.0
        while position < end:
            tokens = min(self.largest_chunk(streams, position, seconds), end - position)
            load = Load(stream_rows=streams.stream_rows, stream_keys=streams.stream_keys)
            load.add_prompt(position, tokens)
            total += self.exactly(load)
            position += tokens
        return (end - start) / total


def load_of(step: Step) -> Load:
    """What a step computes, counted from its chunks: a chunk of one token that samples is a stream's."""
    load = Load()
    for chunk in step.chunks:
        first, last = chunk.start, chunk.start + len(chunk.tokens)
        if len(chunk.tokens) == 1 and chunk.sample:
            load.stream_rows += 1
            load.stream_keys += last
        else:
            load.prompt_rows += last - first
            load.prompt_keys += sum(range(first + 1, last + 1))
    return load
