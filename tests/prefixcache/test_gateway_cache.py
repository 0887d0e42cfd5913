"""CacheService through a gateway: to one replica, to several, to all, and one answer from theirs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from prefixcache.client import AsyncClient, Client
from prefixcache.errors import DeadlineExceeded, InvalidArgument, NotFound, PermissionDenied, Unavailable
from prefixcache.routing import merging
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, prompt_pb2
from prefixcache.warming import ALL_REPLICAS
from tests.engine.serving import GatedRunner, PaperEngine, RunningServer
from tests.engine.tenancy import entry, write
from tests.prefixcache.gateways import RunningGateway
from tests.waiting import until

PROMPT = "The harbour opens at six. Boats that come in the night wait at the outer wall. "
ENDED = cache_pb2.WARM_STATE_FAILED


class World:
    """Replicas by their names, behind a gateway."""

    def __init__(self, servers: dict[str, RunningServer], gateway: RunningGateway) -> None:
        self.servers = servers
        self.gateway = gateway

    @property
    def address(self) -> str:
        return self.gateway.address

    def cached(self, prompt: str, **options: Any) -> dict[str, int]:
        """Ask every replica itself how many tokens of a prompt it has cached."""
        found = {}
        for name, server in self.servers.items():
            with Client(server.address) as client:
                found[name] = client.lookup(prompt, timeout=10, **options).cached_tokens
        return found

    def holders(self, prompt: str, **options: Any) -> set[str]:
        """The replicas that have cached a block of it, or more."""
        return {name for name, tokens in self.cached(prompt, **options).items() if tokens >= 16}


@contextlib.contextmanager
def world(names: str = "abc", **options: Any) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(RunningServer(PaperEngine(), replica_id=name, **options)) for name in names
        }
        gateway = RunningGateway(*(server.address for server in servers.values()))
        stack.enter_context(gateway)
        until(lambda: gateway.serving() == list(names), "replicas that serve")
        yield World(servers, gateway)


@pytest.fixture(scope="module")
def three() -> Iterator[World]:
    with world() as three:
        yield three


@pytest.fixture
def client(three: World) -> Iterator[Client]:
    with Client(three.address) as client:
        client.invalidate(everything=True, timeout=10)
        yield client
        client.invalidate(everything=True, timeout=10)


# One replica


def test_lookup_answers_for_the_replica_that_would_generate(three: World, client: Client) -> None:
    """What it says is cached is what a request then finds."""
    completion = client.generate(PROMPT, max_tokens=1, timeout=10)
    assert three.holders(PROMPT) == {completion.replica}
    found = client.lookup(PROMPT, timeout=10)
    again = client.generate(PROMPT, max_tokens=1, timeout=10)
    assert (found.cached_tokens, again.replica) == (again.usage.cached_tokens, completion.replica)


def test_a_pin_is_where_the_prefix_lies(three: World, client: Client) -> None:
    """In one replica, where requests with that prefix go; the list shows it, and unpinning finds it."""
    where = client.generate(PROMPT, max_tokens=1, timeout=10).replica
    assert client.pin(PROMPT, "harbour", timeout=10).pinned_tokens > 0
    assert [pin.pin_id for pin in client.pins(timeout=10).pins] == ["harbour"]
    for name, server in three.servers.items():
        assert bool(server.stats().cache.pinned) is (name == where)
    client.unpin("harbour", timeout=10)
    assert client.pins(timeout=10).pins == ()
    with pytest.raises(NotFound, match="there is no pin 'harbour'"):
        client.unpin("harbour", timeout=10)


def test_a_pin_that_moves_to_another_prompt_moves_to_another_replica(three: World, client: Client) -> None:
    """Under one name there is one pin, wherever it was before."""
    places = set()
    for number in range(12):
        assert client.pin(f"{chr(65 + number)} {PROMPT}", "moving", timeout=10).pinned_tokens > 0
        assert len(client.pins(timeout=10).pins) == 1
        (place,) = [name for name, server in three.servers.items() if server.stats().cache.pinned]
        places.add(place)
    assert len(places) > 1
    client.unpin("moving", timeout=10)


# Several


def test_prompts_are_warmed_where_they_belong(three: World, client: Client) -> None:
    """Each on one replica, confirmed under its own name, and found there by requests."""
    prompts = [{"prompt": f"{chr(65 + number)} {PROMPT}", "id": f"prompt {number}"} for number in range(12)]
    with client.warm(prompts, timeout=20) as warming:  # type: ignore[arg-type]  # a list of dicts, not of WarmPrompts
        warmed = {entry.id: entry for entry in warming}
    assert warmed.keys() == {f"prompt {number}" for number in range(12)}
    assert {(entry.state, entry.replicas) for entry in warmed.values()} == {("computed", 1)}
    holders = [three.holders(f"{chr(65 + number)} {PROMPT}") for number in range(12)]
    assert all(len(holder) == 1 for holder in holders)
    assert len(set.union(*holders)) > 1
    for number, holder in enumerate(holders):
        assert {client.generate(f"{chr(65 + number)} {PROMPT}", max_tokens=1, timeout=10).replica} == holder


@pytest.mark.parametrize(("wanted", "expected"), [(2, 2), (3, 3), (7, 3), (ALL_REPLICAS, 3)])
def test_a_prompt_can_be_warmed_on_several(three: World, client: Client, wanted: int, expected: int) -> None:
    """One confirmation, when it is cached on all of them; the counts are those of the one that did most."""
    with client.warm([PROMPT], replicas=wanted, timeout=20) as warming:
        assert [(entry.state, entry.replicas, entry.cached_tokens) for entry in warming] == [("computed", expected, 0)]
    assert len(three.holders(PROMPT)) == expected
    with client.warm([PROMPT], replicas=wanted, timeout=20) as warming:
        assert [(entry.state, entry.replicas) for entry in warming] == [("cached", expected)]


def test_what_cannot_be_warmed_is_named(three: World, client: Client) -> None:
    """By its name, or its position if that is of no use; the others are warmed."""
    requests = [
        cache_pb2.WarmRequest(prompt=prompt_pb2.Prompt(text=PROMPT), id="x" * 200),
        cache_pb2.WarmRequest(prompt=prompt_pb2.Prompt(text=f"1 {PROMPT}")),
        cache_pb2.WarmRequest(prompt=prompt_pb2.Prompt(text=""), id="empty", replicas=2),
        cache_pb2.WarmRequest(prompt=prompt_pb2.Prompt(text=f"2 {PROMPT}"), id="good"),
    ]
    with grpc.insecure_channel(three.address) as channel:
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        answers = {answer.id: answer for answer in stub.Warm(iter(requests), timeout=10)}
    assert answers.keys() == {"0", "1", "empty", "good"}
    assert answers["0"].state == ENDED and "id must have at most 128 bytes" in answers["0"].error
    assert answers["empty"].state == ENDED and "prompt.text is empty" in answers["empty"].error
    assert answers["empty"].replicas == 0
    assert {answers[name].state for name in ("1", "good")} == {cache_pb2.WARM_STATE_COMPUTED}


def test_a_request_to_warm_that_cannot_be_read(three: World) -> None:
    """The call ends with what is wrong."""
    with grpc.insecure_channel(three.address) as channel:
        warm: Any = channel.stream_stream("/prefixcache.v1.CacheService/Warm")
        with pytest.raises(grpc.RpcError, match="the WarmRequest cannot be read") as caught:
            list(warm(iter([b"\x0a\x7f"]), timeout=10))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_no_more_is_read_than_is_worked_on() -> None:
    """Whoever sends without end has to wait, and leaves nothing behind when it leaves."""
    runner, taken = GatedRunner(), itertools.count()

    def endless() -> Iterator[str]:
        while True:
            yield f"{next(taken)} {'x' * 500}"

    with (
        RunningServer(PaperEngine(runner=runner), replica_id="a") as a,
        runner,
        RunningGateway(a.address) as gateway,
        Client(gateway.address) as client,
    ):
        with client.warm(endless(), timeout=60) as warming:
            for _ in range(5):
                runner.permits.release(50)  # more steps than one prompt takes
                warmed = next(warming)
                assert warmed.state == "computed", warmed.error
        assert next(taken) < 1000, "what two streams buffer is a few dozen of such prompts"
        until(lambda: gateway.gateway.active == 0, "the end of the call")
        runner.open()
        a.wait_until_idle()


def test_a_replica_that_goes_while_it_warms_is_replaced() -> None:
    """What it had not confirmed is warmed by another."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(), replica_id="b") as b,
        RunningServer(PaperEngine(runner=runner), replica_id="a") as a,
        runner,
        RunningGateway(a.address, b.address, policy="round-robin") as gateway,
        Client(gateway.address) as client,
    ):
        until(lambda: gateway.serving() == ["a", "b"], "both")
        with client.warm([f"{chr(65 + number)} {PROMPT}" for number in range(4)], timeout=20) as warming:
            a.wait_until_warming(1)
            runner.failure = RuntimeError("the model is gone")
            runner.open()
            assert {(entry.state, entry.replicas) for entry in warming} == {("computed", 1)}
        with Client(b.address) as direct:
            assert all(direct.lookup(f"{chr(65 + n)} {PROMPT}", timeout=10).cached_tokens > 1 for n in range(4))


def test_a_replica_that_is_gone_is_not_counted_as_warm() -> None:
    """The confirmation says on how many a prompt is cached and, as long as it is counted on, which one failed."""
    with world("ab") as two, Client(two.address) as client:
        two.servers["b"].__exit__(None, None, None)
        with client.warm([PROMPT], replicas=2, timeout=20) as warming:
            (first,) = warming
        assert first.replicas == 1
        assert (first.state == "failed") is ("replica b cannot be reached" in first.error)
        assert client.lookup(PROMPT, timeout=10).cached_tokens > 1


async def test_a_deadline_ends_warming() -> None:
    """Also while a replica does not get on with it."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(runner=runner), replica_id="a") as a,
        runner,
        RunningGateway(a.address) as gateway,
    ):
        async with AsyncClient(gateway.address) as client:
            with pytest.raises(DeadlineExceeded):
                async for _ in client.warm([PROMPT], timeout=0.3):
                    pass
        runner.open()
        a.wait_until_idle()


# All of them


def test_what_is_forgotten_is_forgotten_everywhere(three: World, client: Client) -> None:
    """Blocks are summed; nobody has any of it afterwards."""
    with client.warm([PROMPT], replicas=3, timeout=20) as warming:
        assert [entry.replicas for entry in warming] == [3]
    blocks = sum(server.stats().cache.cached for server in three.servers.values())
    assert client.invalidate(PROMPT[:40], timeout=10).freed_blocks == blocks
    assert three.holders(PROMPT) == set()


def test_a_session_ends_everywhere(three: World, client: Client) -> None:
    """Wherever it has been; the blocks are summed."""
    for server in three.servers.values():
        with Client(server.address) as direct:
            direct.generate(PROMPT, max_tokens=1, session_id="s", timeout=10)
    assert client.stats(timeout=10).sessions == 3
    assert client.end_session("s", timeout=10) == 3 * 5
    assert client.stats(timeout=10).sessions == 0


def test_a_replica_that_cannot_be_reached_has_not_forgotten() -> None:
    """UNAVAILABLE names it; the others have done it. What only reads leaves it out."""
    with world("ab") as two, Client(two.address) as client:
        with client.warm([PROMPT], replicas=2, timeout=20) as warming:
            list(warming)
        client.pin(PROMPT, "kept", timeout=10)
        two.servers.pop("b").__exit__(None, None, None)
        with pytest.raises(Unavailable, match="replica b cannot be reached, so what it holds is not forgotten"):
            client.invalidate(everything=True, timeout=10)
        assert two.holders(PROMPT) == set()
        with pytest.raises(Unavailable, match="replica b cannot be reached, so the session has not ended there"):
            client.end_session("s", timeout=10)
        with pytest.raises(Unavailable, match="replica b cannot be reached, so it may still be pinned there"):
            client.unpin("nowhere", timeout=10)
        assert client.stats(timeout=10).blocks.total == 256
        client.pins(timeout=10)


def test_statistics_are_sums(three: World, client: Client) -> None:
    """Of blocks, requests, tokens and reasons; the time is the youngest's."""
    for number in range(6):
        client.generate(f"{chr(65 + number)} {PROMPT}", max_tokens=2, timeout=10)
    stats, parts = client.stats(timeout=10), [server.stats() for server in three.servers.values()]
    assert stats.blocks.total == 3 * 256
    assert stats.blocks.cached == sum(part.cache.cached for part in parts)
    assert stats.blocks.block_size == 16
    assert stats.requests.admitted == sum(part.totals.admitted for part in parts)
    assert stats.tokens.prompt == sum(part.totals.prompt_tokens for part in parts)
    assert sum(stats.miss_reasons.values()) == stats.requests.admitted
    assert stats.uptime <= min(server.server.front.uptime for server in three.servers.values())


def test_what_is_published_is_published_everywhere(tmp_path: Any) -> None:
    """By an administrator; every tenant's prompts begin with it, whichever replica they go to."""
    tenants = write(tmp_path / "tenants.toml", entry("root", admin="true"), entry("red"))
    with world("ab", tenants=tenants) as two, Client(two.address, token="root") as root:
        with Client(two.address, token="red") as red, pytest.raises(PermissionDenied, match="may not publish"):
            red.pin(PROMPT, "intro", published=True, timeout=10)
        pinned = root.pin(PROMPT, "intro", published=True, timeout=10)
        assert pinned.pinned_tokens == 80 and pinned.limited_by == ""
        assert [(pin.pin_id, pin.published) for pin in root.pins(timeout=10).pins] == [("intro", True)]
        for server in two.servers.values():
            with Client(server.address, token="red") as red:
                assert red.lookup(PROMPT + "more", timeout=10).cached_tokens >= 80
        root.unpin("intro", published=True, timeout=10)
        assert root.pins(timeout=10).pins == ()


@pytest.mark.parametrize("method", ["Lookup", "Pin", "Unpin"])
def test_bytes_that_are_no_message_are_refused(three: World, method: str) -> None:
    """INVALID_ARGUMENT, by the gateway itself where it has to read."""
    with grpc.insecure_channel(three.address) as channel:
        call: Any = channel.unary_unary(f"/prefixcache.v1.CacheService/{method}")
        with pytest.raises(grpc.RpcError, match="cannot be read") as caught:
            call(b"\x0a\x7f", timeout=10)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_refusal_by_all_is_told_as_one(three: World, client: Client) -> None:
    """In the replicas' own words."""
    with pytest.raises(InvalidArgument, match="session_id is empty; give a name"):
        client.end_session("", timeout=10)
    with pytest.raises(InvalidArgument, match="pin_id is empty"):
        client.unpin("", timeout=10)


# Merging


def test_statistics_of_those_that_publish_are_merged() -> None:
    """Names, sums, and the first error; quotas are summed where there are any."""
    parts = [
        cache_pb2.GetStatsResponse(
            uptime=Duration(seconds=9),
            hints=cache_pb2.HintStats(replica_id="b", current=True, blocks=3, republished=1),
            blocks=cache_pb2.BlockStats(total=4, quota=2, block_size=16),
            miss_reasons={"none": 1, "evicted": 2},
        ),
        cache_pb2.GetStatsResponse(
            uptime=Duration(seconds=5),
            hints=cache_pb2.HintStats(replica_id="a", blocks=4, error="Redis is gone"),
            blocks=cache_pb2.BlockStats(total=5, quota=3, block_size=16),
            miss_reasons={"none": 4},
        ),
        cache_pb2.GetStatsResponse(uptime=Duration(seconds=7)),
    ]
    merged = merging.merged_stats(parts)
    assert merged.hints == cache_pb2.HintStats(replica_id="a, b", blocks=7, republished=1, error="Redis is gone")
    assert (merged.blocks.total, merged.blocks.quota, merged.blocks.block_size) == (9, 5, 16)
    assert dict(merged.miss_reasons) == {"none": 5, "evicted": 2}
    assert merged.uptime.seconds == 5


def test_what_is_pinned_everywhere_is_the_least_of_any() -> None:
    """With the reason of the one that could not pin more."""
    parts = [
        cache_pb2.PinResponse(prompt_tokens=50, pinned_tokens=48, pinned_blocks=3, budget_blocks=64),
        cache_pb2.PinResponse(
            prompt_tokens=50, pinned_tokens=16, pinned_blocks=1, budget_blocks=1, limited_by="budget"
        ),
    ]
    expected = cache_pb2.PinResponse(
        prompt_tokens=50, pinned_tokens=16, pinned_blocks=4, budget_blocks=65, limited_by="budget"
    )
    assert merging.merged_pinned(parts) == expected
