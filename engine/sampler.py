"""Picks the next token of every row that is at its end.

In this order: penalties and bias change the logits (repetition, then presence and
frequency, then bias); temperature 0 takes the largest, the lowest id among equals.
Otherwise the logits are divided by the temperature, and what is kept is found one
filter after the other: the `top_k` most probable, of these the most probable that
together reach `top_p`, of these those at least `min_p` as probable as the first. All
three keep the front of the same ranking (probability, then lower id), so the kept set
is one length and one threshold per row.

The choice inverts the cumulative distribution of the kept tokens in the order of their
ids, at one number in [0, 1) that is a hash of the request's seed and the index of the
token. Nothing is drawn from a shared generator, so a row's token does not depend on
which other rows are there.

Log-probabilities are those of the model: of the logits as they came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from engine.request import Sampled, SamplingParams

COLDEST = 1e-30
"""Temperatures below this are it: they would vanish in float32."""

RANKED = 1024
"""How many of the most probable tokens are ranked at first when `top_p` alone says how many are kept."""


@dataclass(frozen=True, slots=True)
class Row:
    """Whose token is sampled: `tokens` is prompt and output so far, of which the first `prompt` are the prompt."""

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    prompt: int

    @property
    def index(self) -> int:
        """How many tokens were generated before."""
        return len(self.tokens) - self.prompt


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Return a token for each row of `logits` `[rows, vocabulary]` (float32), which may be changed."""
    wanted = [row.params.logprobs for row in rows]
    asked = [place for place, count in enumerate(wanted) if count is not None]
    reports = _logprobs(logits, asked, max(count for count in wanted if count is not None)) if asked else None
    for place, row in enumerate(rows):
        if _changes_logits(row.params):
            _change_logits(logits[place], row)
    tokens = logits.argmax(-1)
    drawn = [place for place, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        if len(drawn) == len(rows):
            tokens = _draw(logits, rows)
        else:
            places = torch.tensor(drawn, device=logits.device)
            tokens[places] = _draw(logits[places], [rows[place] for place in drawn])
    if reports is None:
        return [Sampled(token) for token in tokens.tolist()]
    return reports.complete(tokens, wanted)


def uniform(seed: int, index: int) -> float:
    """Return the number in [0, 1) that decides the `index`-th generated token under `seed`."""
    key = (seed % 2**64).to_bytes(8, "little") + index.to_bytes(8, "little")
    return (xxh3_64_intdigest(key) >> 11) * 2.0**-53


# Penalties and bias


def _changes_logits(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
    )


def _change_logits(logits: Tensor, row: Row) -> None:
    """Apply penalties and bias to one row `[vocabulary]`, in place."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array(row.tokens, dtype=np.int64))).to(logits.device)
        some = logits[seen]
        logits[seen] = torch.where(some > 0, some / params.repetition_penalty, some * params.repetition_penalty)
    added: dict[int, float] = {}
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(row.tokens[row.prompt :]).items():
            added[token] = -params.presence_penalty - params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        added[token] = added.get(token, 0.0) + bias
    if added:
        places = torch.tensor(list(added), dtype=torch.int64, device=logits.device)
        logits[places] += torch.tensor(list(added.values()), dtype=logits.dtype, device=logits.device)


# Drawing


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return a drawn token `[rows]` for each row, all of them with a temperature above 0."""
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # The largest becomes 0 first, so that a small temperature cannot make it infinite.
    logits = logits - logits.amax(-1, keepdim=True)
    logits /= column([max(row.params.temperature, COLDEST) for row in rows])
    weights = logits.exp()
    if any(row.params.top_k or row.params.top_p < 1 for row in rows):
        weights *= _front(logits, weights, rows)
    if any(row.params.min_p for row in rows):
        weights *= weights >= column([row.params.min_p for row in rows])
    distribution = weights.cumsum(-1, dtype=torch.float64)
    number = torch.tensor([uniform(row.seed, row.index) for row in rows], dtype=torch.float64, device=device)
    # The first place whose sum is above: never one of weight 0. Rounding may reach the very end.
    chosen = torch.searchsorted(distribution, number[:, None] * distribution[:, -1:], right=True)
    last = (distribution < distribution[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(chosen, last)[:, 0]


def _front(logits: Tensor, weights: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return which tokens `[rows, vocabulary]` `top_k` and then `top_p` keep."""
    size = logits.shape[1]
    limits = [min(row.params.top_k, size) or size for row in rows]
    depth = max((limit for limit in limits if limit < size), default=1)
    shares = [row.params.top_p for row in rows]
    open_ended = [limit == size and share < 1 for limit, share in zip(limits, shares, strict=True)]
    if any(open_ended):
        depth = max(depth, min(RANKED, size))
    limit = torch.tensor(limits, device=logits.device)[:, None]
    share = torch.tensor(shares, dtype=torch.float64, device=logits.device)[:, None]
    whole = weights.sum(-1, keepdim=True, dtype=torch.float64)
    ranked = logits.topk(depth, dim=-1).values
    sums = ranked.exp().cumsum(-1, dtype=torch.float64)
    if any(open_ended) and depth < size:
        short = (sums[:, -1:] < share * whole)[:, 0].tolist()
        if any(is_open and is_short for is_open, is_short in zip(open_ended, short, strict=True)):
            ranked = logits.sort(dim=-1, descending=True).values
            sums = ranked.exp().cumsum(-1, dtype=torch.float64)
            depth = size
    total = torch.where(limit < size, sums.gather(1, limit.clamp(max=depth) - 1), whole)
    reaching = (sums < share * total).sum(-1, keepdim=True) + 1
    kept = torch.where(share < 1, torch.minimum(limit, reaching), limit)
    # Tokens above the last kept one's logit are kept, and of those equal to it the lowest ids.
    threshold = ranked.gather(1, kept.clamp(max=depth) - 1)
    above = logits > threshold
    equal = logits == threshold
    room = kept - above.sum(-1, keepdim=True)
    front = above | (equal & (equal.cumsum(-1) <= room))
    return front | (kept >= size)


# Log-probabilities


@dataclass(frozen=True, slots=True)
class _Reports:
    """Of the rows at `places`: log-probabilities of all tokens, and the most probable ones, best first."""

    places: list[int]
    logprobs: Tensor
    best: Tensor
    ids: Tensor

    def complete(self, tokens: Tensor, wanted: Sequence[int | None]) -> list[Sampled]:
        """Return the samples of all rows, with reports where they are `wanted`."""
        chosen = self.logprobs.gather(1, tokens[self.places][:, None])
        # float64 holds ids and float32 exactly, so that everything crosses to the host at once.
        numbers = torch.cat((chosen.double(), self.best.double(), self.ids.double()), 1)
        flat = torch.cat((tokens.double(), numbers.flatten())).tolist()
        samples = [Sampled(int(token)) for token in flat[: len(wanted)]]
        width, count = numbers.shape[1], self.best.shape[1]
        for row, place in enumerate(self.places):
            report = flat[len(wanted) + row * width : len(wanted) + (row + 1) * width]
            pairs = zip((int(token) for token in report[1 + count :]), report[1 : 1 + count], strict=True)
            samples[place] = Sampled(samples[place].token, report[0], tuple(pairs)[: wanted[place]])
        return samples


def _logprobs(logits: Tensor, places: list[int], count: int) -> _Reports:
    logprobs = logits[places].log_softmax(-1)
    best, ids = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    return _Reports(places, logprobs, best, ids)
