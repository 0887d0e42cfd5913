"""Arithmetic: from what was received, and when, to figures. No clock is read here.

A figure that does not apply, or that the target does not tell, is None.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Figures = dict[str, float | None]

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Record:
    """One call and what came of it.

    `times[i]` is when the event with `counts[i]` output tokens arrived (seconds of any
    clock, the same as `sent`). `tokens` are the ids of the output if the target gave
    them all. `prompt_tokens` and `cached_tokens` are what the target says; `processed` is
    when it said that the prompt has been computed, if it says that.
    """

    label: str
    prompt: int
    asked: int
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    processed: float | None = None
    error: str | None = None

    def add(self, now: float, count: int) -> None:
        """Count tokens that arrived now."""
        if count:
            self.times.append(now)
            self.counts.append(count)

    def check(self) -> None:
        """Mark a request that ended, but not as asked, as failed."""
        if self.error is not None:
            return
        if self.received != self.asked:
            self.error = f"{self.received} tokens came where {self.asked} were asked for"
        elif self.prompt_tokens is not None and self.prompt_tokens != self.prompt:
            self.error = f"the target counts {self.prompt_tokens} prompt tokens where {self.prompt} were sent"

    @property
    def received(self) -> int:
        return sum(self.counts)

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.times[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first event: (last - first) / (tokens after the first event)."""
        later = self.received - self.counts[0]
        return (self.times[-1] - self.times[0]) / later if later else None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The percentile, interpolated between the two closest values; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def together(records: Sequence[Record]) -> float | None:
    """Tokens per second while all of them decode.

    Counted are the tokens that arrive after the moment at which the last sequence has
    got its first token, up to the moment at which the first sequence has got its last.
    None if there is no such time, or if not every sequence could have got a token in it.
    """
    if not records:
        return None
    begin = max(record.times[0] for record in records)
    end = min(record.times[-1] for record in records)
    if end <= begin:
        return None
    tokens = sum(
        count
        for record in records
        for time, count in zip(record.times, record.counts, strict=True)
        if begin < time <= end
    )
    return tokens / (end - begin) if tokens >= len(records) else None


def figures(records: Sequence[Record], wall: float, ttft_limit: float) -> Figures:
    """The figures of the calls of one label in one repeat.

    `wall` is the phase's length in seconds, `ttft_limit` (seconds) what a good request
    stays under. Failed calls count as such and nowhere else.
    """
    good = [record for record in records if record.error is None]
    output = sum(record.received for record in good)
    prompt = sum(record.prompt for record in good)
    told = [record.cached_tokens for record in good if record.cached_tokens is not None]
    cached = sum(told) if good and len(told) == len(good) else None
    ttfts = [record.ttft for record in good]
    tpots = [tpot for record in good if (tpot := record.tpot) is not None]
    result: Figures = {
        "requests": len(records),
        "failed": len(records) - len(good),
        "wall s": wall,
        "prompt tokens": prompt,
        "cached tokens": cached,
        "cached per request": cached / len(good) if cached is not None else None,
        "reused": cached / prompt if cached is not None and prompt else None,
        "output tokens": output,
        "output tokens/s": output / wall,
        "total tokens/s": (prompt + output) / wall,
        "goodput/s": sum(ttft <= ttft_limit for ttft in ttfts) / wall,
        "decode tokens/s": statistics.median(1 / tpot for tpot in tpots) if tpots and min(tpots) > 0 else None,
        "together tokens/s": together(good) if len(good) == len(records) else None,
    }
    for name, values in (("ttft", ttfts), ("tpot", tpots)):
        for percent in PERCENTILES:
            value = percentile(values, percent)
            result[f"{name} p{percent} ms"] = None if value is None else 1e3 * value
    return result


def medians(repeats: Sequence[Figures]) -> Figures:
    """The median of each figure over repeats; None if one of them has none."""
    return {name: _median([repeat[name] for repeat in repeats]) for name in repeats[0]}


def ratios(peer: Sequence[Figures], reference: Sequence[Figures]) -> Figures:
    """The median over repeats of each figure of `peer` divided by that of `reference` in the same repeat."""
    return {name: _median([_ratio(p[name], r[name]) for p, r in zip(peer, reference, strict=True)]) for name in peer[0]}


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _median(values: Iterable[float | None]) -> float | None:
    known = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return statistics.median(known)


@dataclass(slots=True)
class Agreement:
    """How many requests got the tokens that the reference gave for the same prompt."""

    compared: int = 0
    equal: int = 0

    def add(self, records: Sequence[Record], reference: Sequence[Record]) -> None:
        """Compare records of the same calls, where both have all ids."""
        for one, other in zip(records, reference, strict=True):
            if one.error is None and other.error is None and one.tokens is not None and other.tokens is not None:
                self.compared += 1
                self.equal += one.tokens == other.tokens


def by_label(records: Iterable[Record]) -> Mapping[str, list[Record]]:
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.label, []).append(record)
    return grouped
