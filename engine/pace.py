"""How many prompt tokens a step may compute beside running streams.

A stream gets one token per step, so it pauses for as long as the step takes. While
anybody decodes, a step takes so much of the prompts that, by estimate, it stays below
a limit; while nobody does, as much as is allowed, which prefills fastest.

    room = pace.chunk(load, start, rest)    while planning, once per prompt
    pace.observe(load, seconds)             when the step has been run

The estimate. A step costs something in any case (the weights are read), something per
row, and something per key that attention reads for a prompt or for a stream. These four
costs are fitted to what steps of each kind were like lately; kinds are told apart so
that many short steps do not wash away what is known of long ones. By how much the last
few steps took longer or shorter than fitted, in the median, corrects the estimate: a
machine that becomes slower is followed within three steps, a single slow step changes
next to nothing.

Where the estimate knows little, it is not trusted: of some kind of step it must be
known that this one, even if all the time went to the rows or all of it to the keys,
would take at most TRUST times what is aimed at.

Progress wins over the limit: prompts get at least SHARE of the time that the streams in
the same step take, even if these alone take longer than the limit (a busy machine, a
large model), and at least MIN_TOKENS of a step.

A background prompt, which nobody waits for, is computed in much shorter steps, since a
live request that arrives waits for the end of one: up to a limit of its own, but at least
BACKGROUND_TOKENS in each. Beside streams only so many steps have a part of it that, taken
together, the streams are slowed down by BACKGROUND_SHARE.

Pure arithmetic: no clock, no randomness. Planning a step with streams and prompts costs
some 40 microseconds, observing a step about one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

MIN_TOKENS = 32
"""The least of a prompt that a step takes, whatever it costs. Fewer would make prefill much slower and a step
little shorter, since the weights are read for any number."""
AIM = 0.9
"""The share of the limit that is planned for; the rest is for noise and for STRETCH."""
SHARE = 0.5
"""Prompts get at least so much time as a share of what the streams in the same step take."""
BACKGROUND_TOKENS = 8
"""The least of a background prompt that a step takes."""
BACKGROUND_SHARE = 0.25
"""Streams are slowed down by a background prompt by at most this share; and a step that takes longer than the
limit with the least of one may take longer by this share."""
STRETCH = 1 / 8
"""By how large a share a chunk may exceed the plan to end with its prompt or a block."""
TRUST = 2.0
RECENT = 5
"""Of so many last steps the median corrects the estimate."""
MEMORY = 4
"""Steps of one kind are averaged over about so many."""
HALF_LIFE = 16
"""After so many other steps, what is known of a kind counts half."""
SWEEPS = 8

Features = tuple[float, float, float, float]

# What the costs are to each other before more than one step is known. The first is that of a step in any case, in rows.
SHAPE: Features = (16.0, 1.0, 1 / 2048, 1 / 256)


@dataclass(slots=True)
class Load:
    """What a step computes: rows of prompts and of streams, and how many keys attention reads for each kind."""

    prompt_rows: int = 0
    prompt_keys: int = 0
    stream_rows: int = 0
    stream_keys: int = 0
    background: bool = False  # whether the prompt is one that nobody waits for

    @property
    def rows(self) -> int:
        return self.prompt_rows + self.stream_rows

    def add_prompt(self, start: int, tokens: int) -> None:
        """Add `tokens` of a prompt at positions from `start` on."""
        self.prompt_rows += tokens
        self.prompt_keys += tokens * start + tokens * (tokens + 1) // 2

    @property
    def features(self) -> Features:
        """What the four costs are multiplied by."""
        return (1.0, float(self.rows), float(self.prompt_keys), float(self.stream_keys))

    @property
    def kind(self) -> tuple[int, int]:
        """Loads of one kind are within a factor of two in rows, and of four in keys per row of a prompt."""
        if not self.prompt_rows:
            return -self.stream_rows.bit_length(), 0
        return self.prompt_rows.bit_length(), (self.prompt_keys // self.prompt_rows).bit_length() // 2


@dataclass(slots=True)
class _Average:
    """What steps of one kind were like: features and seconds, averaged over the last few."""

    features: Features
    seconds: float
    count: int = 1
    last: int = 0

    def add(self, features: Features, seconds: float) -> None:
        self.count += 1
        share = 1 / min(self.count, MEMORY)
        a, b, c, d = self.features
        e, f, g, h = features
        self.features = (a + (e - a) * share, b + (f - b) * share, c + (g - c) * share, d + (h - d) * share)
        self.seconds += (seconds - self.seconds) * share


class Pace:
    """Says how long the chunks of prompts may be; learns from every step.

    `max_pause` is the limit in seconds for a step with streams, 0 for none; `max_tokens`
    the most tokens of any step, which must leave one to the first prompt of each;
    `block_size` where chunks end when they can. `background_pause` is the limit in
    seconds for a step with a background prompt.
    """

    def __init__(self, max_pause: float, max_tokens: int, block_size: int, background_pause: float = 0.01) -> None:
        self._limit = max_pause
        self._background_limit = background_pause
        self._max_tokens = max_tokens
        self._block_size = block_size
        self._steps = 0
        self._averages: dict[tuple[int, int], _Average] = {}
        self._recent: deque[tuple[Features, float]] = deque(maxlen=RECENT)
        self._costs: list[float] = []  # seconds per feature; empty until a step has been observed
        self._correction = 1.0
        self._owed = 0.0  # seconds by which a background prompt has slowed down streams beyond its share
        self._fitted = 0  # the number of steps it was fitted to

    def chunk(self, load: Load, start: int, rest: int) -> int:
        """Return how many of the next `rest` tokens of a prompt, from position `start` on, a step of `load` may add.

        The first prompt of a step gets at least one token, and MIN_TOKENS if `max_tokens`
        leaves them; 0 says that the step is full. A prompt that is cut is cut at the end
        of a block if that leaves anything, and not just before its own end.
        """
        most = self._max_tokens - load.rows
        room = most
        if self._limit and load.stream_rows:
            room = self._room(load, start)
            if not load.prompt_rows:
                room = max(room, MIN_TOKENS)
            room = min(room, most)
        if rest > _stretched(room, most) and room < min(self._block_size, MIN_TOKENS) and load.prompt_rows:
            return 0  # not worth a chunk
        return self._cut(start, rest, room, most)

    def spares(self, load: Load) -> bool:
        """Say whether a background prompt may be computed in a step of `load`, which has no other."""
        return load.rows < self._max_tokens and not (load.stream_rows and self._owed > 0)

    def background_chunk(self, load: Load, start: int, rest: int) -> int:
        """Return what `chunk` does for a background prompt, the only one in a step of `load` that spares it time."""
        most = self._max_tokens - load.rows
        room = min(max(self._background_room(load, start), BACKGROUND_TOKENS), most)
        return self._cut(start, rest, room, most)

    def _cut(self, start: int, rest: int, room: int, most: int) -> int:
        """Return about `room` tokens, at most `most`, such that a prompt is cut where it does no harm."""
        stretched = _stretched(room, most)
        if rest <= stretched:
            return rest
        if rest - room < MIN_TOKENS and room >= 2 * MIN_TOKENS:
            room = stretched = rest - MIN_TOKENS  # the last step costs the same for so many
        nearest = start + min(room + self._block_size // 2, stretched)
        aligned = nearest // self._block_size * self._block_size - start
        return aligned if aligned > 0 else room

    def observe(self, load: Load, seconds: float) -> None:
        """Learn what a step took. Steps without rows, or of less than a microsecond, are ignored."""
        if seconds < 1e-6 or not load.rows:
            return
        self._steps += 1
        features, kind = load.features, load.kind
        average = self._averages.get(kind)
        if average is None:
            average = self._averages[kind] = _Average(features, seconds)
        else:
            average.add(features, seconds)
        average.last = self._steps
        self._recent.append((features, seconds))
        self._owe(load, seconds)

    def _room(self, load: Load, start: int) -> int:
        """Return how many tokens from position `start` on fit below the limit; may be 0."""
        if not self._steps:
            return 0
        self._fit()
        aim = max(self._limit * AIM / self._correction, self._streams_seconds(load) * (1 + SHARE))
        return self._room_within(aim, load, start)

    def _background_room(self, load: Load, start: int) -> int:
        """Return how many tokens of a background prompt fit below its limit; may be 0."""
        if not self._steps:
            return 0
        self._fit()
        _, per_row, _, _ = self._costs
        # Of the least that it takes, so that chunks grow until it shows what a row costs and what a step does.
        least = (self._streams_seconds(load) + per_row * BACKGROUND_TOKENS) * (1 + BACKGROUND_SHARE)
        aim = max(self._background_limit * AIM / self._correction, least)
        return self._room_within(aim, load, start)

    def _owe(self, load: Load, seconds: float) -> None:
        """Book by how much longer streams waited in a step because of a background prompt."""
        if load.background and load.stream_rows and self._costs:
            alone = min(self._streams_seconds(load) * self._correction, seconds)
            self._owed += seconds - (1 + BACKGROUND_SHARE) * alone
        elif load.stream_rows:
            self._owed = max(self._owed - BACKGROUND_SHARE * seconds, 0.0)

    def _streams_seconds(self, load: Load) -> float:
        """What a step would take with nothing but its streams."""
        return self._fitted_seconds((1.0, float(load.stream_rows), 0.0, float(load.stream_keys)))

    def _room_within(self, aim: float, load: Load, start: int) -> int:
        """Return how many tokens from position `start` on bring a step of `load` to `aim` seconds, as fitted."""
        _, per_row, per_key, _ = self._costs
        expected = _longest(aim - self._fitted_seconds(load.features), per_row + per_key * start, per_key)
        trusted = self._trusted(aim * self._correction * TRUST, load, start)
        return int(min(expected, trusted, self._max_tokens))

    def _fit(self) -> None:
        """Bring the costs up to the steps observed."""
        if self._fitted == self._steps:
            return
        self._fitted = self._steps
        if not self._costs:
            features, seconds = self._recent[-1]
            scale = seconds / sum(map(float.__mul__, SHAPE, features))
            self._costs = [scale * part for part in SHAPE]
        self._improve()
        self._correction = median(seconds / (self._fitted_seconds(known) or seconds) for known, seconds in self._recent)

    def _trusted(self, seconds: float, load: Load, start: int) -> float:
        """Return how many tokens take at most `seconds`, judging by the most favourable kind of step that was seen.

        Of its time all may have gone to the rows, or all to the keys: the worse of both counts.
        """
        trusted = 0.0
        for average in self._averages.values():
            _, rows, keys, _ = average.features
            times = seconds / average.seconds
            by_rows = times * rows - load.rows
            if by_rows > trusted:
                by_keys = _longest(times * keys - load.prompt_keys, start, 1.0)
                trusted = max(trusted, min(by_rows, by_keys))
        return trusted

    def _improve(self) -> None:
        """Move the costs towards the least sum of squared relative errors, none of them negative.

        By coordinate descent from where they are: what the averages do not determine stays.
        """
        products = [[0.0] * 4 for _ in range(4)]
        targets = [0.0] * 4
        for average in self._averages.values():
            weight = HALF_LIFE / (HALF_LIFE + self._steps - average.last)
            relative = [feature / average.seconds for feature in average.features]
            for i, one in enumerate(relative):
                weighted = weight * one
                targets[i] += weighted
                row = products[i]
                for j in range(4):
                    row[j] += weighted * relative[j]
        costs = self._costs
        for _ in range(SWEEPS):
            for i, row in enumerate(products):
                if row[i]:
                    error = targets[i] - sum(map(float.__mul__, row, costs))
                    costs[i] = max(costs[i] + error / row[i], 0.0)

    def _fitted_seconds(self, features: Features) -> float:
        return sum(map(float.__mul__, self._costs, features))


def _stretched(room: int, most: int) -> int:
    return min(room + int(room * STRETCH), most)


def _longest(spare: float, first: float, growth: float) -> float:
    """Return the largest n with n * first + n * n * growth / 2 <= spare, 0 if there is none."""
    if spare <= 0:
        return 0.0
    below = first + math.sqrt(first * first + 2 * growth * spare)
    return 2 * spare / below if below else math.inf
