"""Sampling against a plain implementation that goes through one row, token by token."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import sampler
from engine.request import SamplingParams
from engine.sampler import Row, sample, uniform


def row(seed: int = 0, tokens: list[int] | None = None, prompt: int = 1, **params: Any) -> Row:
    """A row after a prompt of `prompt` tokens."""
    return Row(SamplingParams(**params), seed, tokens or [0], prompt)


def reference_logits(logits: list[float], row: Row) -> list[float]:
    """Penalties and bias, one token at a time."""
    params = row.params
    result = list(logits)
    for token in set(row.tokens):
        penalty = params.repetition_penalty
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token, count in Counter(row.tokens[row.prompt :]).items():
        result[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        result[token] += bias
    return result


def reference_distribution(logits: list[float], row: Row) -> dict[int, float]:
    """The kept tokens and their probabilities, in the order of ids."""
    params = row.params
    scaled = [logit / params.temperature for logit in reference_logits(logits, row)]
    top = max(scaled)
    weights = {token: math.exp(logit - top) for token, logit in enumerate(scaled)}
    ranking = sorted(weights, key=lambda token: (-scaled[token], token))
    if params.top_k:
        ranking = ranking[: params.top_k]
    total, reached, front = sum(weights[token] for token in ranking), 0.0, []
    for token in ranking:
        front.append(token)
        reached += weights[token] / total
        if params.top_p < 1 and reached >= params.top_p:
            break
    front = [token for token in front if weights[token] >= params.min_p * weights[ranking[0]]]
    total = sum(weights[token] for token in front)
    return {token: weights[token] / total for token in sorted(front)}


def reference_token(logits: list[float], row: Row) -> tuple[int, bool]:
    """The token, and whether rounding could have made it another one."""
    if row.params.temperature == 0:
        changed = reference_logits(logits, row)
        best, *others = sorted(changed, reverse=True)
        return changed.index(best), best - others[0] < 1e-5
    number, reached = uniform(row.seed, row.index), 0.0
    close = False
    for token, probability in (distribution := reference_distribution(logits, row)).items():
        reached += probability
        close = close or abs(reached - number) < 1e-5
        if reached > number:
            return token, close
    return list(distribution)[-1], True


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], list[Row]]:
    """Rows with any parameters; logits with many ties, as half precision makes them."""
    size, count = draw(st.sampled_from([3, 17, 60])), draw(st.integers(1, 5))
    generator = random.Random(draw(st.integers(0, 10**6)))
    logits = [[round(generator.gauss(0, 3) * 4) / 4 for _ in range(size)] for _ in range(count)]
    rows = []
    for _ in range(count):
        tokens = generator.choices(range(size), k=generator.randint(1, 12))
        params = {
            "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
            "top_k": draw(st.sampled_from([0, 1, 2, 5, 1000])),
            "top_p": draw(st.sampled_from([1.0, 0.05, 0.5, 0.9])),
            "min_p": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.5, 0.7])),
            "presence_penalty": draw(st.sampled_from([0.0, 0.0, 1.2])),
            "frequency_penalty": draw(st.sampled_from([0.0, 0.0, -0.4])),
            "logit_bias": draw(st.sampled_from([{}, {}, {0: 3.0, 2: -100.0}])),
            "logprobs": draw(st.sampled_from([None, None, 0, 3])),
        }
        rows.append(row(generator.randint(0, 2**64 - 1), tokens, generator.randint(1, len(tokens)), **params))
    return logits, rows


@settings(max_examples=500, deadline=None)
@given(cases())
def test_any_parameters_together(case: tuple[list[list[float]], list[Row]]) -> None:
    """Every row of a mixed batch gets the token of the plain implementation."""
    logits, rows = case
    sampled = sample(torch.tensor(logits), rows)
    for one, row_logits, its_row in zip(sampled, logits, rows, strict=True):
        token, close = reference_token(row_logits, its_row)
        assert one.token == token or close
        if its_row.params.temperature:
            assert one.token in reference_distribution(row_logits, its_row) or close


@settings(max_examples=200, deadline=None)
@given(cases())
def test_company_changes_nothing(case: tuple[list[list[float]], list[Row]]) -> None:
    """Alone, or among rows with other parameters: the same token and the same report."""
    logits, rows = case
    together = sample(torch.tensor(logits), rows)
    for place, its_row in enumerate(rows):
        assert sample(torch.tensor(logits[place : place + 1]), [its_row]) == [together[place]]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    """Temperature 0 ignores the filters and the seed."""
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]] * 3)
    rows = [row(seed, top_k=2, top_p=0.1, min_p=0.5) for seed in range(3)]
    assert [one.token for one in sample(logits, rows)] == [1, 1, 1]


def test_one_kept_token_is_the_greedy_one() -> None:
    """top_k 1, a tiny top_p and min_p 1 all leave the most probable one, ties or not."""
    torch.manual_seed(0)
    logits = torch.randn(1, 50).mul(2).round()
    greedy = sample(logits.clone(), [row()])
    for filters in ({"top_k": 1}, {"top_p": 1e-6}):
        for seed in range(50):
            assert sample(logits.clone(), [row(seed, temperature=1.0, **filters)]) == greedy
    distinct = torch.arange(50.0)[None]
    assert sample(distinct, [row(3, temperature=5.0, min_p=1.0)])[0].token == 49


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}]
)
def test_frequencies_follow_the_distribution(filters: dict[str, Any]) -> None:
    """Over 20,000 seeds, Pearson's chi-square stays within what chance allows, and nothing else is drawn."""
    count = 20_000
    generator = random.Random(5)
    logits = [generator.gauss(0, 1.5) for _ in range(24)]
    rows = [row(seed, temperature=0.8, **filters) for seed in range(count)]
    drawn = Counter(one.token for one in sample(torch.tensor([logits] * count), rows))
    expected = reference_distribution(logits, rows[0])
    assert drawn.keys() <= expected.keys()
    statistic = sum((drawn[token] - count * p) ** 2 / (count * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_numbers_are_uniform_and_depend_on_seed_and_index() -> None:
    """In [0, 1), spread evenly over seeds and over indices, all different."""
    for numbers in ([uniform(seed, 0) for seed in range(10_000)], [uniform(3, index) for index in range(10_000)]):
        assert len(set(numbers)) == 10_000
        assert all(0 <= number < 1 for number in numbers)
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert abs(counts - 500).max() < 5 * math.sqrt(500)
    assert uniform(2**64 - 1, 0) != uniform(0, 0)
    assert uniform(7, 5) == 0.8487439202735212


def test_the_index_is_that_of_the_generated_token() -> None:
    """The same seed goes on with other numbers, and starts at the end of the prompt."""
    rows = [row(1, [0] * (5 + i), prompt=5) for i in range(3)]
    assert [one.index for one in rows] == [0, 1, 2]
    logits = torch.zeros(1, 1000)
    tokens = [sample(logits.clone(), [row(1, [0] * (5 + i), 5, temperature=1.0)])[0].token for i in range(8)]
    assert len(set(tokens)) == 8
    other_prompt = [sample(logits.clone(), [row(1, [0] * (9 + i), 9, temperature=1.0)])[0].token for i in range(8)]
    assert other_prompt == tokens


@pytest.mark.parametrize("size", [sampler.RANKED - 1, sampler.RANKED, 5000])
def test_a_flat_distribution_over_a_large_vocabulary(size: int) -> None:
    """top_p that keeps more tokens than are ranked at first is still exact."""
    generator = random.Random(1)
    logits = [generator.gauss(0, 0.01) for _ in range(size)]
    sharp = [0.0] * (size - 1) + [50.0]
    rows = [row(seed, temperature=1.0, top_p=0.9) for seed in range(40)]
    sampled = sample(torch.tensor([logits] * 40 + [sharp]), rows + [row(0, temperature=1.0, top_p=0.9)])
    kept = reference_distribution(logits, rows[0])
    assert len(kept) > 0.8 * size
    for one, its_row in zip(sampled, rows, strict=False):
        token, close = reference_token(logits, its_row)
        assert one.token == token or close
    assert sampled[-1].token == size - 1


def test_extreme_logits() -> None:
    """Huge and infinitely small logits, and temperatures at both ends, draw only what can be drawn."""
    logits = torch.tensor([[-torch.inf, 3e38, -torch.inf, 3e38], [0.0, 0.0, -torch.inf, -torch.inf]])
    for temperature in (1e-45, 0.01, 1.0, 100.0):
        for seed in range(20):
            first, second = sample(logits.clone(), [row(seed, temperature=temperature)] * 2)
            assert first.token in (1, 3) and second.token in (0, 1)


def test_log_probabilities_are_those_of_the_model() -> None:
    """Before temperature, penalties and bias; the chosen token's and the best ones, best first."""
    torch.manual_seed(0)
    logits = torch.randn(4, 30)
    expected = logits.double().log_softmax(-1)
    rows = [
        row(0, logprobs=3, logit_bias={4: 100.0}),
        row(0, temperature=2.0, repetition_penalty=2.0, logprobs=20),
        row(0),
        row(0, logprobs=0),
    ]
    sampled = sample(logits.clone(), rows)
    assert sampled[0].token == 4
    assert (sampled[2].logprob, sampled[2].top) == (None, ())
    assert sampled[3].top == ()
    for place, count in ((0, 3), (1, 20), (3, 0)):
        one = sampled[place]
        assert one.logprob == pytest.approx(float(expected[place, one.token]), abs=1e-5)
        best, ids = expected[place].topk(count)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.tolist(), abs=1e-5)


def test_more_log_probabilities_than_tokens() -> None:
    """A vocabulary smaller than what is asked for is reported whole."""
    (one,) = sample(torch.zeros(1, 3), [row(logprobs=20)])
    assert [token for token, _ in one.top] == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu() -> None:
    """The same tokens as on the CPU."""
    torch.manual_seed(0)
    logits = torch.randn(40, 100)
    rows = [row(seed, temperature=seed % 3 / 2, top_k=seed % 5 * 10, top_p=0.9, logprobs=2) for seed in range(40)]
    here, there = sample(logits.clone(), rows), sample(logits.cuda(), rows)
    assert [one.token for one in here] == [one.token for one in there]
