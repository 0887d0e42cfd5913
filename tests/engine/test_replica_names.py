"""How replicas know blocks and one another: the hashes of a prompt, and the name that signs an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from engine.tenants import namespace_key
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import Unauthenticated
from prefixcache.results import REPLICA
from prefixcache.tokens import HASH_BYTES
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc, prompt_pb2
from prefixcache.watch import BlocksStored, SnapshotEnd
from tests.engine.serving import BLOCK, PAPER_LENGTH, GatedRunner, PaperEngine, RunningServer
from tests.engine.tenancy import entry, write

PROMPT = [(7 * number) % 251 for number in range(100)]  # 96 of them are whole blocks
TEXT = "The harbour opens at six. Boats that come in the night wait at the outer wall."


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """Tenants a and b, and an administrator."""
    file = write(tmp_path / "tenants.toml", entry("a"), entry("b"), entry("boss", admin="true"))
    with RunningServer(PaperEngine(), tenants=file, replica_id="replica-1") as server:
        yield server


def tokenize(server: RunningServer, token: str = "", **fields: Any) -> generation_pb2.TokenizeResponse:
    with grpc.insecure_channel(server.address) as channel:
        request = generation_pb2.TokenizeRequest(**fields)
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        return generation_pb2_grpc.GenerationServiceStub(channel).Tokenize(request, metadata=metadata, timeout=20)


def ids(values: list[int]) -> prompt_pb2.Prompt:
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=values))


def hashes_of(server: RunningServer, tenant: str, namespace: str = "", prompt: list[int] = PROMPT) -> list[bytes]:
    """Return the hashes of a prompt's blocks as a tenant is told."""
    told = tokenize(server, tenant, prompt=ids(prompt), namespace=namespace, with_block_hashes=True).block_hashes
    return split(told)


def split(hashes: bytes) -> list[bytes]:
    return [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]


def stored(server: RunningServer, account: str, namespace: str = "") -> list[bytes]:
    """Return the hashes of the blocks that the cache has for a namespace, parents first."""
    events = server.server.front.engine.loop.call(lambda scheduler: list(scheduler.cache.stored(account))).result(30)
    wanted = namespace_key(account, namespace) if account else events[0].namespace
    return [value for event in events if event.namespace == wanted for value in split(event.hashes)]


def watched(client: Client) -> dict[str, set[bytes]]:
    """Return the hashes that a caller's events begin with, by namespace."""
    found: dict[str, set[bytes]] = {}
    with client.watch_events() as watch:
        for event in watch:
            if isinstance(event, SnapshotEnd):
                return found
            assert isinstance(event, BlocksStored)
            found.setdefault(event.namespace, set()).update(event.hashes)
    raise AssertionError


# Hashes


def test_hashes_are_those_of_events_and_of_what_is_published(server: RunningServer) -> None:
    """For every tenant and namespace, in order; each has its own."""
    seen: set[bytes] = set()
    for tenant in ("a", "b"):
        with Client(server.address, token=tenant) as client:
            for namespace in ("", "notes"):
                before = hashes_of(server, tenant, namespace)
                client.generate(PROMPT, max_tokens=1, namespace=namespace)
                hashes = hashes_of(server, tenant, namespace)
                assert len(hashes) == 6 and before == hashes
                assert hashes == stored(server, tenant, namespace)
                assert watched(client)[namespace] == set(hashes)
                assert not seen & set(hashes)
                seen |= set(hashes)


def test_hashes_behind_a_published_prompt_are_those_of_the_cache(server: RunningServer) -> None:
    """The beginning is everybody's, the rest each one's own, until it is published no more."""
    with Client(server.address, token="boss") as boss:
        boss.pin(PROMPT[:64], "beginning", published=True)
        shared = stored(server, "")
        assert len(shared) == 4
        behind = []
        for tenant in ("a", "b"):
            with Client(server.address, token=tenant) as client:
                for namespace in ("", "notes"):
                    client.generate(PROMPT, max_tokens=1, namespace=namespace)
                    hashes = hashes_of(server, tenant, namespace)
                    assert hashes[:4] == shared
                    assert hashes[4:] == stored(server, tenant, namespace)
                    assert watched(client)[namespace] == set(hashes[4:])
                    behind += hashes[4:]
        assert len(set(behind)) == len(behind) == 8
        assert hashes_of(server, "a", prompt=PROMPT[:65]) == shared
        assert not set(hashes_of(server, "a", prompt=PROMPT[:64])) & set(shared)  # the last token is never reused
        boss.unpin("beginning", published=True)
        assert not set(hashes_of(server, "a")) & {*shared, *behind}


def test_hashes_of_a_long_prompt_are_the_same(server: RunningServer) -> None:
    """Also where they are not computed on the event loop."""
    long = PROMPT * 40
    assert len(hashes_of(server, "a", prompt=long)) == len(long) // BLOCK - (len(long) % BLOCK == 0)
    assert hashes_of(server, "a", prompt=long)[:6] == hashes_of(server, "a")


@pytest.mark.parametrize(("length", "blocks"), [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_only_blocks_that_a_request_could_reuse_are_named(server: RunningServer, length: int, blocks: int) -> None:
    """The last token is always computed, and what is not a whole block has no name."""
    assert len(hashes_of(server, "a", prompt=PROMPT[:length])) == blocks


def test_tokens_and_hashes_come_as_asked_for(server: RunningServer) -> None:
    """Both, either or neither, and always the length."""
    for with_hashes in (False, True):
        for without_ids in (False, True):
            told = tokenize(
                server, "a", prompt=ids(PROMPT), with_block_hashes=with_hashes, without_token_ids=without_ids
            )
            assert list(told.token_ids) == ([] if without_ids else PROMPT)
            assert (len(told.block_hashes), told.prompt_tokens) == (6 * HASH_BYTES * with_hashes, 100)


def test_a_namespace_that_is_too_long_is_refused(server: RunningServer) -> None:
    """As everywhere else."""
    with pytest.raises(grpc.RpcError, match="namespace must have at most 256 bytes"):
        tokenize(server, "a", prompt=ids(PROMPT), namespace="x" * 257, with_block_hashes=True)


# Signatures


def signature(call: Any) -> str | None:
    return dict(call.trailing_metadata()).get(REPLICA)


def test_every_answer_is_signed(server: RunningServer) -> None:
    """One message or many, an answer or an error, also to those who may not call and to health checks."""
    metadata = (("authorization", "Bearer a"),)
    with grpc.insecure_channel(server.address) as channel:
        generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        cache: Any = cache_pb2_grpc.CacheServiceStub(channel)
        health: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        request = generation_pb2.GenerateRequest(prompt=ids(PROMPT))
        request.sampling.max_tokens = 2
        calls: list[Any] = [
            generation.Tokenize.with_call(generation_pb2.TokenizeRequest(prompt=ids([1])), metadata=metadata)[1],
            health.with_call(b"")[1],
        ]
        stream = generation.Generate(request, metadata=metadata)
        assert [*stream][-1].HasField("finished")
        calls.append(stream)
        too_long = generation_pb2.GenerateRequest(prompt=ids([1] * PAPER_LENGTH))
        for failing in (
            lambda: list(generation.Generate(too_long, metadata=metadata)),
            lambda: list(generation.Generate(request)),
            lambda: generation.Tokenize(generation_pb2.TokenizeRequest(), metadata=metadata),
            lambda: cache.Unpin(cache_pb2.UnpinRequest(), metadata=metadata),
            lambda: health(b"\x0a\x04none"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                failing()
            calls.append(caught.value)
        assert [signature(call) for call in calls] == ["replica-1"] * len(calls)


def test_a_signature_leaves_the_retry_information() -> None:
    """Both are in the trailing metadata of a refusal."""
    runner = GatedRunner()
    options = {"replica_id": "replica-1", "max_queue": 1}
    with RunningServer(PaperEngine(max_running=1, runner=runner), **options) as server, runner:
        with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
            streams = [client.stream("first"), client.stream("second")]
            server.wait_until_active(2)
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(generation_pb2.GenerateRequest(prompt=ids([1]))))
            for stream in streams:
                stream.close()
        error: Any = caught.value
        trailing = dict(error.trailing_metadata())
        status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
        assert status.details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)
        assert trailing[REPLICA] == "replica-1"
        runner.open()


async def test_clients_say_which_replica_has_answered(server: RunningServer) -> None:
    """In the completion, and on the stream once it has ended."""
    with Client(server.address, token="a") as client:
        assert client.generate(TEXT, max_tokens=3).replica == "replica-1"
        with client.stream(TEXT, max_tokens=3) as stream:
            next(stream)
            early = stream.replica
            assert stream.result().replica == stream.replica == "replica-1"
            assert early is None
    async with AsyncClient(server.address, token="a") as other, other.stream(TEXT, max_tokens=3) as answer:
        assert [text async for text in answer] and answer.replica == "replica-1"
        assert (await answer.result()).replica == "replica-1"
    with Client(server.address, token="nobody") as stranger, pytest.raises(Unauthenticated):
        stranger.generate(TEXT)


def test_a_server_without_a_name_signs_nothing() -> None:
    """What a client is not told is None; with Redis there is always a name, of the machine and the port."""
    with RunningServer(PaperEngine()) as server, Client(server.address) as client:
        assert client.generate(TEXT, max_tokens=1).replica is None
    with RunningServer(PaperEngine(), redis="redis://127.0.0.1:1") as server, Client(server.address) as client:
        name = client.generate(TEXT, max_tokens=1).replica
        assert name is not None and name.endswith(f"-{server.server.port}")
