"""Quotas: what is let in, what is owed, and when it is paid."""

from __future__ import annotations

import random

import pytest

from engine.authentication import Limits
from engine.quotas import Quota
from prefixcache.errors import ResourceExhausted


def test_without_limits_everything_is_let_in() -> None:
    """However much is going on, and whatever it costs."""
    quota = Quota()
    for _ in range(1000):
        quota.enter(0.0)
        quota.charge(10**9, 0.0)
    assert quota.in_flight == 1000


def test_what_was_used_comes_back_with_time() -> None:
    """A minute's worth can be used at once; a debt is paid off before the next request may begin."""
    quota = Quota(Limits(tokens_per_minute=600))
    quota.enter(0.0)
    quota.charge(1200, 0.0)
    with pytest.raises(
        ResourceExhausted, match=r"used your 600 computed tokens .* try again in 60\.1 seconds"
    ) as caught:
        quota.enter(0.0)
    assert caught.value.retry_after == pytest.approx(60.1)
    with pytest.raises(ResourceExhausted):
        quota.enter(60.0)
    quota.enter(60.11)


def test_coming_back_when_told_is_early_enough() -> None:
    """Whatever was used, a caller who waits as long as it was told is let in."""
    dice = random.Random(3)
    quota = Quota(Limits(tokens_per_minute=7))
    now = 0.0
    for _ in range(200):
        try:
            quota.enter(now)
        except ResourceExhausted as error:
            now += (error.retry_after or 0.0) * (1 + 1e-9)
            quota.enter(now)
        quota.charge(dice.randrange(50), now)
        now += dice.random() * 100


def test_nobody_gets_more_than_its_rate_over_time() -> None:
    """Pushing at every chance, with requests of any size, gives the rate and the first minute's worth at most."""
    dice = random.Random(5)
    quota = Quota(Limits(tokens_per_minute=6000))
    computed, largest = 0, 500
    for tick in range(36_000):  # an hour in tenths of a second
        try:
            quota.enter(tick / 10)
        except ResourceExhausted:
            continue
        tokens = dice.randrange(largest)
        quota.charge(tokens, tick / 10)
        computed += tokens
    assert 6000 * 60 * 0.99 < computed <= 6000 * 61 + largest


def test_what_is_refused_costs_nothing() -> None:
    """Neither a place nor time: asking often does not push the moment away."""
    quota = Quota(Limits(max_in_flight=1, tokens_per_minute=60))
    quota.enter(0.0)
    for _ in range(10):
        with pytest.raises(ResourceExhausted, match="in flight"):
            quota.enter(0.0)
    quota.leave()
    assert quota.in_flight == 0
    quota.enter(0.0)


def test_new_limits_keep_what_is_owed() -> None:
    """A lower rate holds at once, a higher one is a faster way out of debt, none at all is none."""
    quota = Quota(Limits(tokens_per_minute=60))
    quota.charge(120, 0.0)
    quota.limit(Limits(tokens_per_minute=6000))
    with pytest.raises(ResourceExhausted):
        quota.enter(0.1)
    quota.enter(1.0)
    quota.limit(Limits(tokens_per_minute=1))
    quota.enter(1.0)
    quota.charge(1, 1.0)
    with pytest.raises(ResourceExhausted):
        quota.enter(2.0)
    quota.limit(Limits())
    quota.enter(2.0)
    quota.limit(Limits(tokens_per_minute=60))
    quota.enter(2.0)
