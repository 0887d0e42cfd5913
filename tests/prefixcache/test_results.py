"""Usage under the names that other services gave it."""

from __future__ import annotations

import pytest

from prefixcache import explain
from prefixcache.client import Client
from prefixcache.results import Usage
from tests.engine.serving import BLOCK, PaperEngine, RunningServer


def test_usage_under_other_names() -> None:
    """A prompt that is sent, continued and sent again, as OpenAI and Anthropic would report it."""
    prompt = list(range(3 * BLOCK))
    with RunningServer(PaperEngine()) as server, Client(server.address) as client:
        cold = client.generate(prompt, max_tokens=2).usage
        longer = client.generate(prompt + [7] * 5, max_tokens=2, store_cache=False).usage
        warm = client.generate(prompt, max_tokens=2).usage
    assert [usage.as_openai() for usage in (cold, longer, warm)] == [
        {
            "prompt_tokens": tokens,
            "completion_tokens": 2,
            "total_tokens": tokens + 2,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        for tokens, cached in ((48, 0), (53, 48), (48, 47))
    ]
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    expected = [(0, 48, 0, 2), (5, 0, 48, 2), (1, 0, 47, 2)]
    assert [usage.as_anthropic() for usage in (cold, longer, warm)] == [
        dict(zip(names, counts, strict=True)) for counts in expected
    ]


@pytest.mark.parametrize("replica_id", ["", "north"])
def test_a_replica_that_has_a_name_is_named_beside_the_cost(replica_id: str) -> None:
    """Only a server that was given an id has one, and then it is said who answered."""
    with RunningServer(PaperEngine(), replica_id=replica_id) as server, Client(server.address) as client:
        line = explain.cost(client.generate([1, 2, 3], max_tokens=1))
    assert ("answered by replica north" in line) == bool(replica_id)
    assert line.count("replica") == bool(replica_id)


@pytest.mark.parametrize("written", [0, 3, 10, 25])
def test_what_anthropic_calls_input_adds_up_to_the_prompt(written: int) -> None:
    """Read, written and neither are the prompt, also where some of the output was written as well."""
    parts = Usage(30, 20, 10, 15, 0, written).as_anthropic()
    assert parts["input_tokens"] + parts["cache_creation_input_tokens"] + parts["cache_read_input_tokens"] == 30
    assert min(parts.values()) >= 0
