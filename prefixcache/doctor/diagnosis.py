"""From prompts to a report, and to the prompts as the report would have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from prefixcache.doctor.alignment import Stream
from prefixcache.doctor.orders import Collection, Orders, Range, arrange, find_collections
from prefixcache.doctor.pieces import CHARACTERS_PER_TOKEN, TOKEN, Piece, Pieces
from prefixcache.doctor.places import example, line_and_column, part_of
from prefixcache.doctor.prompts import Prompt
from prefixcache.doctor.report import Counted, Example, Finding, Place, Report, Share, advice, title
from prefixcache.doctor.rewriting import Plan, Rewriter
from prefixcache.doctor.simulation import Outcome, simulate
from prefixcache.doctor.spots import SPACES, VARYING, Spot, View, find_spots
from prefixcache.errors import InvalidArgument
from prefixcache.tokens import TOKEN_BYTES, common_tokens, pack

Tokenize = Callable[[Iterable[Any]], Iterable[Sequence[int]]]
"""Returns the token ids of prompts in the form in which they were read from a file."""

Estimate = Callable[[Iterable[int], frozenset[int]], Outcome]
"""Returns what the cache would make of some prompts with some of the advice followed."""

DEFAULT_BLOCK_SIZE = 16
LEAST_SHARE = 0.005
"""Advice that saves less of all tokens is not given."""
SMALL_SHARE = 0.05
"""What saves less of all tokens is looked at together with others of its kind."""

_CANDIDATES = 24
# What a piece of advice saves is estimated from so many prompts of the groups it concerns.
_ESTIMATED_FROM = 1000
# So many prompts are kept ready; those beyond are prepared again whenever they are looked at.
_KEPT = 8192
# Stands in for a value, to find the token at which it begins; hardly a value begins with it.
_OTHER = "\u00a7"


@dataclass(slots=True)
class _Candidate:
    """Something that could be changed.

    `ranges` is where it is first in each prompt that has it, `bound` is how many ids of
    tokens come behind it: it cannot save more.
    """

    number: int
    kinds: tuple[str, ...]
    ranges: dict[int, Range] = field(default_factory=dict)
    variants: int = 0
    bound: int = 0
    depth: int = 0
    saved: float = 0.0
    alone: float = 0.0


class Diagnosis:
    """What keeps prompts, in the order given, from sharing their beginnings.

    `blocks` is the size of the cache; without it nothing is ever evicted. `tokenize`
    counts exactly, but what single findings save is always estimated. Raises
    InvalidArgument if there are no prompts.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        pieces: Pieces,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        blocks: int | None = None,
        tokenize: Tokenize | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        if not prompts:
            raise InvalidArgument("there are no prompts to look at")
        self._prompts = prompts
        self._pieces = pieces
        self._cache = block_size, blocks
        self._tokenize = tokenize
        self._speed = tokens_per_second
        self._views: dict[int, View] = {}
        self._plans = [Plan() for _ in prompts]
        self._ids = sum(_ids_in(prompt.pieces) for prompt in prompts)
        self._fixed, self._collections = self._find_orders()
        candidates = self._orders()
        self._groups, spots = find_spots(self._look, len(prompts))
        candidates += self._spots(spots, len(candidates))
        self._views.clear()
        self._rewriter = Rewriter(pieces, _names(candidates), self._fixed)
        least = LEAST_SHARE * self._ids
        self._chosen = _Choice(self._estimate, self._groups, least).among(candidates)
        self._today = self._after = self._outcome(frozenset())
        self._followed = _numbers(self._chosen)
        if self._chosen:
            self._after = self._outcome(self._followed)
        if self._after.computed >= self._today.computed:  # what was estimated is not so
            self._chosen, self._followed, self._after = [], frozenset(), self._today

    @cached_property
    def report(self) -> Report:
        """Everything found, best advice first."""
        today, after = self._today, self._after
        exact = self._tokenize is not None
        scale = today.tokens / self._ids if exact else self._scale
        findings = [self._finding(candidate, scale) for candidate in self._chosen]
        findings.sort(key=lambda finding: -finding.saved_tokens)
        saved = round((today.computed - after.computed) * (1 if exact else scale))
        return Report(
            prompts=len(self._prompts),
            groups=sum(1 for group in self._groups if len(group) > 1),
            ungrouped=sum(1 for group in self._groups if len(group) == 1),
            counted=self._counted(),
            block_size=self._cache[0],
            today=_share(today, 1 if exact else scale),
            after=_share(after, 1 if exact else scale),
            saved_tokens=saved,
            saved_seconds=self._seconds(saved),
            findings=findings,
            measured=self._measured(),
        )

    def rewritten(self) -> Iterator[Any]:
        """Yield every prompt as it would be with all advice followed, in the form in which it was read."""
        return self._sources(self._followed)

    def _sources(self, followed: frozenset[int]) -> Iterator[Any]:
        for index, prompt in enumerate(self._prompts):
            pieces = self._rewritten(index, followed)
            yield prompt.source if pieces is prompt.pieces else prompt.rewritten(pieces)

    def _rewritten(self, index: int, followed: frozenset[int]) -> Sequence[Piece]:
        """Return the pieces of a prompt with the advice of these numbers followed."""
        return self._rewriter.rewrite(self._prompts[index].pieces, self._plans[index], followed)

    def _estimate(self, indexes: Iterable[int], followed: frozenset[int]) -> Outcome:
        """Return what the cache would make of these prompts; pieces stand for tokens."""
        prompts = (
            (self._prompts[index].namespace, b"".join([piece.tokens for piece in self._rewritten(index, followed)]))
            for index in indexes
        )
        size, blocks = self._cache
        return simulate(prompts, size, None if blocks is None else round(blocks / self._scale))

    # Finding

    def _find_orders(self) -> tuple[dict[int, Range], dict[int, list[Collection]]]:
        """Return the collections whose order varies, and where they are in the prompts that have them."""
        orders = Orders()
        found: list[list[int]] = []
        for prompt in self._prompts:
            collections = find_collections(prompt.pieces)
            orders.add(collections)
            found.append([collection.identity for collection in collections])
        fixed = orders.varying()
        return fixed, {
            index: [one for one in find_collections(self._prompts[index].pieces) if one.identity in fixed]
            for index, identities in enumerate(found)
            if not fixed.keys().isdisjoint(identities)
        }

    def _look(self, index: int) -> View:
        view = self._views.get(index)
        if view is None:
            pieces = self._prompts[index].pieces
            collections = self._collections.get(index)
            everything = range(len(pieces))
            order = arrange(pieces, collections, self._fixed) if collections else everything
            view = View(pieces, Stream.of(pieces, order), order is not everything and order != list(everything))
            if len(self._views) < _KEPT:
                self._views[index] = view
        return view

    def _orders(self) -> list[_Candidate]:
        """Return a candidate for each kind of collection; the plans of the prompts say where they are."""
        candidates: dict[str, _Candidate] = {}
        seen: dict[int, set[tuple[int, ...]]] = {}
        for index, collections in self._collections.items():
            for collection in collections:
                new = _Candidate(len(candidates), (collection.kind,))
                candidate = candidates.setdefault(collection.kind, new)
                if index not in candidate.ranges:
                    candidate.ranges[index] = (collection.start, collection.end)
                    candidate.bound += _ids_in(self._prompts[index].pieces[collection.start :])
                self._plans[index].collections.append((candidate.number, collection))
                orders = seen.setdefault(collection.identity, set())
                orders.add(collection.order)
                candidate.variants = max(candidate.variants, len(orders))
        return list(candidates.values())

    def _spots(self, spots: Iterable[Spot], first: int) -> list[_Candidate]:
        """Return the spots that matter most as candidates; the plans of the prompts say where they are.

        Those of the same kind behind the same words are one: the scores of some documents,
        say. So are small ones of the same kind in different groups: the clocks of many agents.
        """
        merged: dict[Hashable, list[Spot]] = {}
        times: Counter[tuple[tuple[str, ...], int]] = Counter()
        for spot in spots:
            in_first = spot.kinds, min(spot.edits)
            small = spot.bound < SMALL_SHARE * self._ids
            merged.setdefault((spot.depth, spot.kinds, times[in_first] if small else spot.after), []).append(spot)
            times[in_first] += 1
        worthy = [alike for alike in merged.values() if sum(spot.bound for spot in alike) >= LEAST_SHARE * self._ids]
        worthy.sort(key=lambda alike: -sum(spot.bound for spot in alike))
        return [self._candidate(number, alike) for number, alike in enumerate(worthy[:_CANDIDATES], start=first)]

    def _candidate(self, number: int, spots: Sequence[Spot]) -> _Candidate:
        candidate = _Candidate(number, spots[0].kinds, depth=spots[0].depth)
        for spot in spots:
            candidate.variants += spot.values
            candidate.bound += spot.bound
            for index, edits in spot.edits.items():
                first = edits[0].start, edits[0].end
                candidate.ranges[index] = min(candidate.ranges.get(index, first), first)
                entries = self._plans[index].spaces if spot.kinds == (SPACES,) else self._plans[index].moves
                entries += [(number, edit) for edit in edits]
        return candidate

    # Counting

    def _outcome(self, followed: frozenset[int]) -> Outcome:
        """Return what the cache would make of all prompts; in real tokens if somebody can tell them."""
        if self._tokenize is None:
            return self._estimate(range(len(self._prompts)), followed)
        tokens = iter(self._tokenize(self._sources(followed)))
        return simulate([(prompt.namespace, self._next(tokens, prompt)) for prompt in self._prompts], *self._cache)

    def _next(self, tokens: Iterator[Sequence[int]], prompt: Prompt) -> bytes:
        try:
            return pack(next(tokens))
        except InvalidArgument as error:
            raise InvalidArgument(f"{prompt.name}: {error}") from None

    def _counted(self) -> Counted:
        if self._tokenize is not None:
            return "server"
        return "given" if all(prompt.pieces[0].kind == TOKEN for prompt in self._prompts) else "estimate"

    @cached_property
    def _scale(self) -> float:
        """How many tokens an id of a piece stands for, as far as that is known without asking."""
        counts = [prompt.prompt_tokens for prompt in self._prompts]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            known = [_estimated_tokens(prompt) for prompt in self._prompts]
        return sum(known) / self._ids

    def _measured(self) -> Share | None:
        tokens = [prompt.prompt_tokens for prompt in self._prompts if prompt.prompt_tokens is not None]
        cached = [prompt.cached_tokens for prompt in self._prompts if prompt.cached_tokens is not None]
        return Share(sum(tokens), sum(cached)) if len(tokens) == len(cached) == len(self._prompts) else None

    def _seconds(self, tokens: int) -> float | None:
        return None if self._speed is None else tokens / self._speed

    # Describing

    def _finding(self, candidate: _Candidate, scale: float) -> Finding:
        saved = round(candidate.saved * scale)
        first = min(candidate.ranges)
        return Finding(
            kind="+".join(candidate.kinds),
            title=title(candidate.kinds),
            place=self._place(first, candidate.ranges[first], scale),
            examples=tuple(self._examples(candidate)),
            prompts=len(candidate.ranges),
            places=self._places(candidate),
            groups=sum(1 for group in self._groups if not candidate.ranges.keys().isdisjoint(group)),
            variants=candidate.variants,
            advice=advice(candidate.kinds),
            saved_tokens=saved,
            saved_alone=max(round(candidate.alone * scale), 0),
            saved_seconds=self._seconds(saved),
        )

    def _places(self, candidate: _Candidate) -> int:
        """Return at how many places a prompt has it, at most."""
        plans = (self._plans[index] for index in candidate.ranges)
        return max(sum(number == candidate.number for number, _ in plan.moves) for plan in plans) or 1

    def _place(self, index: int, where: Range, scale: float) -> Place:
        prompt, (start, end) = self._prompts[index], where
        part = part_of(prompt.pieces, start)
        line, column = line_and_column(prompt.pieces, start)
        token = round(_ids_in(prompt.pieces[:start]) * scale)
        if self._tokenize is not None and prompt.pieces[0].kind != TOKEN and not part.startswith("tool"):
            # Where the tokens change if something else stands there. Of a tool it would have to be JSON.
            end = start + 1 if start < end else start
            other = [*prompt.pieces[:start], *self._pieces.of_text(_OTHER), *prompt.pieces[end:]]
            tokens = iter(self._tokenize([prompt.source, prompt.rewritten(other)]))
            token = common_tokens(self._next(tokens, prompt), self._next(tokens, prompt))
        return Place(prompt.name, part, line, column, token)

    def _examples(self, candidate: _Candidate) -> Iterator[Example]:
        """Yield what two prompts have there that differ, if their text is known."""
        shown: list[Example] = []
        for index in sorted(candidate.ranges):
            found = example(self._prompts[index].pieces, candidate.ranges[index])
            if found is None or len(shown) == 2:
                return
            if all(found.value != other.value for other in shown):
                shown.append(found)
                yield found


class _Choice:
    """Chooses which advice to give, by leaving out one piece of it after another.

    What one saves depends on the others: of two clocks in a row, moving one alone saves
    nothing. So each is worth what is lost if it alone is not followed.
    """

    def __init__(self, estimate: Estimate, groups: Sequence[Sequence[int]], least: float) -> None:
        self._estimate = estimate
        self._groups = groups
        self._group_of = {prompt: number for number, group in enumerate(groups) for prompt in group}
        self._least = least
        self._computed: dict[tuple[tuple[int, ...], frozenset[int]], int] = {}

    def among(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Return those that save much, and note what they save."""
        chosen = sorted(
            (candidate for candidate in candidates if candidate.bound >= self._least),
            key=lambda candidate: (candidate.depth, candidate.bound),
        )
        dropped = True
        while dropped:  # without one, another may be worth less
            dropped = False
            for candidate in list(chosen):
                if self._saved(candidate, _numbers(chosen)) < self._least:
                    chosen.remove(candidate)
                    dropped = True
        for candidate in chosen:
            candidate.saved = self._saved(candidate, _numbers(chosen))
            candidate.alone = self._saved(candidate, frozenset([candidate.number]))
        return chosen

    def _saved(self, candidate: _Candidate, followed: frozenset[int]) -> float:
        """Return how many ids of tokens fewer are computed than if of `followed` this one were left out."""
        groups = tuple(sorted({self._group_of[prompt] for prompt in candidate.ranges}))
        computed = self._computed_with(groups, followed - {candidate.number}) - self._computed_with(groups, followed)
        concerned = sum(len(self._groups[group]) for group in groups)
        return computed * max(concerned / _ESTIMATED_FROM, 1.0)

    def _computed_with(self, groups: tuple[int, ...], followed: frozenset[int]) -> int:
        if (groups, followed) not in self._computed:
            prompts = sorted(prompt for group in groups for prompt in self._groups[group])[:_ESTIMATED_FROM]
            self._computed[groups, followed] = self._estimate(prompts, followed).computed
        return self._computed[groups, followed]


def _numbers(candidates: Iterable[_Candidate]) -> frozenset[int]:
    return frozenset(candidate.number for candidate in candidates)


def _names(candidates: Iterable[_Candidate]) -> dict[int, str]:
    """Return what each is called in a prompt that it is moved in; no two have the same name."""
    names: dict[int, str] = {}
    times: Counter[str] = Counter()
    for candidate in candidates:
        name = "text" if candidate.kinds == (VARYING,) else title(candidate.kinds)
        times[name] += 1
        names[candidate.number] = name if times[name] == 1 else f"{name} {times[name]}"
    return names


def _share(outcome: Outcome, scale: float) -> Share:
    return Share(round(outcome.tokens * scale), round(outcome.cached * scale))


def _ids_in(pieces: Iterable[Piece]) -> int:
    return len(b"".join([piece.tokens for piece in pieces])) // TOKEN_BYTES


def _estimated_tokens(prompt: Prompt) -> int:
    if prompt.pieces[0].kind == TOKEN:
        return len(prompt.pieces)
    return max(1, round(prompt.characters / CHARACTERS_PER_TOKEN))
