"""Several replicas behind a gateway, each a process: prompts land where their prefix lies, answers are one engine's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from prefixcache.client import Client, RoutingClient
from prefixcache.results import Completion
from tests.redis import RedisServer
from tests.replicas.processes import Deployment, complete
from tests.replicas.traffic import TIMEOUT, asked, beginning

SMALL = {"model": "embedded", "cache_memory": "32MiB"}
WORTH_IT = 100
"""Blocks of a prefix so long that its replica gets all of its requests, though some run there already."""


@pytest.mark.parametrize("names", ["a b", "a b c"])
def test_agents_that_share_a_prompt_land_where_it_lies(names: str, redis: RedisServer, deployment: Deployment) -> None:
    """Prompts spread over the replicas; what begins like one of them goes where that one went, and computes its end."""
    replicas = deployment.replicas(names, redis.url, blocks=512)
    gateway = deployment.gateway("--redis", redis.url).wait_for(*replicas)
    prompts = [beginning(seed, WORTH_IT) for seed in range(2 * len(replicas))]
    with Client(gateway.address) as client:
        home = [asked(client, prompt).replica for prompt in prompts]
        assert set(home) == {replica.id for replica in replicas}

        def agent(number: int) -> tuple[int, Completion]:
            which = number % len(prompts)
            return which, asked(client, [*prompts[which], number, number, number], 5)

        with ThreadPoolExecutor(3) as agents:
            for which, completion in agents.map(agent, range(8 * len(prompts))):
                assert completion.replica == home[which]
                assert completion.usage.cached_tokens >= len(prompts[which])
    assert complete(redis.url, replicas, prompts)


def test_what_others_hold_is_told_and_used(redis: RedisServer, deployment: Deployment) -> None:
    """A prompt sent to one replica directly is known to the other, to a gateway, and to a client that routes."""
    a, b = deployment.replicas("a b", redis.url)
    prompt = beginning(1)
    with Client(b.address) as direct:
        asked(direct, prompt)
    gateway = deployment.gateway("--redis", redis.url).wait_for(a, b)
    assert complete(redis.url, [a, b], [prompt])
    with Client(a.address) as direct:
        [elsewhere] = direct.lookup([*prompt, 1], timeout=TIMEOUT).elsewhere
    assert (elsewhere.replica_id, elsewhere.address, elsewhere.cached_tokens) == ("b", b.address, len(prompt))
    with Client(gateway.address) as client, RoutingClient(redis.url) as routing:
        for number, one in enumerate((client, routing, client, routing)):
            completion = asked(one, [*prompt, number])
            assert (completion.replica, completion.usage.cached_tokens) == ("b", len(prompt))


def test_a_real_model_answers_as_one_engine(redis: RedisServer, deployment: Deployment) -> None:
    """Two `prefixcache serve` behind a gateway give the tokens of a single one without a cache, twice."""
    [single] = deployment.replicas("single", "", **SMALL)
    replicas = deployment.replicas("a b", redis.url, **SMALL)
    gateway = deployment.gateway("--redis", redis.url).wait_for(*replicas)
    systems = [f"You are agent {name}. " + "Answer in one line, kindly. " * 12 for name in ("red", "blue")]
    prompts = [f"{system}Question {number}: what next?" for number in range(4) for system in systems]
    with Client(gateway.address) as client, Client(single.address) as alone:
        with ThreadPoolExecutor(2) as agents:
            given = list(agents.map(lambda prompt: client.generate(prompt, max_tokens=8, timeout=TIMEOUT), prompts))
        for prompt, completion in zip(prompts, given, strict=True):
            expected = alone.generate(prompt, max_tokens=8, read_cache=False, store_cache=False, timeout=TIMEOUT)
            assert completion.token_ids == expected.token_ids
    for replica in replicas:
        own = [index for index, completion in enumerate(given) if completion.replica == replica.id]
        with Client(replica.address) as direct:
            for index in own:
                after = direct.generate(prompts[index], max_tokens=8, timeout=TIMEOUT)
                assert after.token_ids == given[index].token_ids
                assert after.usage.cached_tokens == after.usage.prompt_tokens - 1
