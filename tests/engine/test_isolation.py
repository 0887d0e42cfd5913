"""Isolation: a tenant learns nothing of another, whatever it calls, and can change nothing of it.

Two worlds: in one, tenant a has lived (prompts, sessions, pins, watchers), in the other it
never came. Tenant b makes the same calls in both, with all that a has: its prompts, ids
and names, and names made to collide with its namespaces. What comes back must be the same,
and so must what the engine computes for it. That the calls are sharp is shown by a itself:
it makes them too, and sees the difference.

Every method of the services has its calls here; one that is added and has none fails.
"""

from __future__ import annotations

import base64
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from engine.scheduler import Step
from prefixcache.client import Client
from prefixcache.tokens import HASH_BYTES
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc, prompt_pb2
from tests.engine.hinted import publishes_exactly, secret_file
from tests.engine.paper import PaperRunner
from tests.engine.serving import BLOCK, GatedRunner, PaperEngine, RunningServer
from tests.engine.tenancy import entry, write
from tests.redis import RedisServer

BLOCKS = 1024
SERVICES = (generation_pb2.DESCRIPTOR, cache_pb2.DESCRIPTOR)

# What a has, and b knows all of it.
GUIDE = "You answer for the support of a bicycle hire. Say where things are and what they cost. " * 3
IDS = list(range(100))
CHAT = [("system", GUIDE), ("user", "Where is the next station?"), ("assistant", "At the harbour.")]
SESSIONS = ("chat-1", "agent-7")
PINS = ("guide", "kept")
NOTES = "notes"
# Names of namespaces below b's own that would reach a's if keys were put together carelessly.
COLLISIONS = (
    *("", NOTES, "a", "a/", "/a", "../a", "..", "*", "\0", "a\0", ",0:", "0:", "1:a", "1:a,0:", "1:a,5:notes"),
    *("1:b,0:", "0:,1:a,0:", "0:,1:a,5:notes", ",1:a,0:", "b,0:,1:a"),
)

# What may differ between any two servers or moments, and says nothing of anybody's prompts.
PASSING = ("timings", "uptime", "requestId", "streamId", "expiresIn", "hash")

Transcript = list[Any]


# Worlds


class CountingRunner(PaperRunner):
    """Remembers how many tokens each step computed."""

    def __init__(self) -> None:
        super().__init__(BLOCKS, BLOCK, 256)
        self.steps: list[int] = []

    def run(self, step: Step) -> list[Any]:
        self.steps.append(sum(len(chunk.tokens) for chunk in step.chunks))
        return super().run(step)


class World:
    """A server of the tenants a and b; `lived`: a has been there, and still watches.

    `admin`: b is an administrator. `published`: a third one has published the beginning of
    a's prompt.
    """

    def __init__(
        self, directory: Path, *, lived: bool, admin: bool = False, published: bool = False, **options: object
    ) -> None:
        rights = {"admin": "true"} if admin else {}
        file = write(directory / "tenants.toml", entry("a"), entry("b", **rights), entry("publisher", admin="true"))
        self.runner = CountingRunner()
        self.lived = lived
        self._published = published
        self.stolen_stream = ("0123456789abcdef", 0)
        self.server = RunningServer(PaperEngine(blocks=BLOCKS, runner=self.runner), tenants=file, **options)
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._exits.enter_context(self.server)
        self._channel = self._exits.enter_context(grpc.insecure_channel(self.server.address))
        if self._published:
            request = cache_pb2.PinRequest(prompt=text(GUIDE[:100]), pin_id="beginning", published=True)
            assert self.call("publisher", "Pin", request)[0]["pinnedTokens"] == 96
        if self.lived:
            self._live()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.server.check()
        self._exits.close()

    def call(self, tenant: str, method: str, request: Any) -> Transcript:
        """Make a call to its end and return all that came back, without what is passing."""
        try:
            answer = self.begin(tenant, method, request)
            return joined([told(message) for message in (answer if hasattr(answer, "__next__") else [answer])])
        except grpc.RpcError as error:
            return [failure(error)]

    def begin(self, tenant: str, method: str, request: Any) -> Any:
        """Make a call and return what the stub returns."""
        stub: Any
        for stub in (generation_pb2_grpc.GenerationServiceStub, cache_pb2_grpc.CacheServiceStub):
            call = getattr(stub(self._channel), method, None)
            if call is not None:
                return call(request, metadata=(("authorization", f"Bearer {tenant}"),), timeout=20)
        raise AssertionError(method)

    def act(self) -> None:
        """Let a, where it lives, do something new and forget something while b looks on."""
        if self.lived:
            self._generate("a", text("News of a. " + GUIDE))
            self.call("a", "Invalidate", cache_pb2.InvalidateRequest(prefix=text("News of a. ")))

    def belongings(self) -> Transcript:
        """What a has, as a sees it."""
        lookups = [cache_pb2.LookupRequest(prompt=prompt, namespace=name) for prompt in PROMPTS for name in ("", NOTES)]
        stats = self.call("a", "GetStats", cache_pb2.GetStatsRequest())[0]
        held = {key: stats["blocks"].get(key) for key in ("total", "cached", "pinned", "leased", "evicted", "expired")}
        return [
            *(self.call("a", "Lookup", request) for request in lookups),
            self.call("a", "ListPins", cache_pb2.ListPinsRequest()),
            (held, stats.get("sessions")),
        ]

    def _live(self) -> None:
        for number, prompt in enumerate(PROMPTS):
            for name in ("", NOTES):
                control = prompt_pb2.CacheControl(namespace=name, session_id=SESSIONS[number % 2], priority=70)
                if number == 0:
                    control.keep_for.CopyFrom(Duration(seconds=600))
                self._generate("a", prompt, control)
        for name in PINS:
            request = cache_pb2.PinRequest(prompt=text(GUIDE), pin_id=name, ttl=Duration(seconds=600))
            assert "code" not in self.call("a", "Pin", request)[0]
        watching = self.begin("a", "WatchEvents", cache_pb2.WatchEventsRequest())
        first = next(watching)
        self.stolen_stream = (first.stream_id, first.sequence)
        self._exits.callback(watching.cancel)

    def _generate(self, tenant: str, prompt: prompt_pb2.Prompt, control: prompt_pb2.CacheControl | None = None) -> None:
        assert "finished" in self.call(tenant, "Generate", generate(prompt, control))[1]


def told(message: Message) -> Any:
    """Return a message as plain data; hashes as their lengths."""
    return without_passing(MessageToDict(message))


def without_passing(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: len(part) if key in ("hashes", "parent") else without_passing(part)
            for key, part in value.items()
            if key not in PASSING
        }
    return [without_passing(part) for part in value] if isinstance(value, list) else value


def joined(messages: Transcript) -> Transcript:
    """Return the messages with the pieces of an output as one: which tokens share a message is a matter of time."""
    pieces = [message["delta"] for message in messages if "delta" in message]
    output = {"tokenIds": [token for piece in pieces for token in piece.get("tokenIds", [])]} if pieces else {}
    return [*(message for message in messages if "delta" not in message), *([output] if output else [])]


def failure(error: Any) -> dict[str, str]:
    return {"code": error.code().name, "details": error.details()}


def text(value: str) -> prompt_pb2.Prompt:
    return prompt_pb2.Prompt(text=value)


def ids(values: Iterable[int]) -> prompt_pb2.Prompt:
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=values))


def chat() -> prompt_pb2.Prompt:
    turns = [prompt_pb2.Message(role=role, content=content) for role, content in CHAT]
    return prompt_pb2.Prompt(messages=prompt_pb2.Chat(messages=turns, add_generation_prompt=False))


PROMPTS = (text(GUIDE), ids(IDS), chat())


def generate(prompt: prompt_pb2.Prompt, control: prompt_pb2.CacheControl | None = None) -> Any:
    return generation_pb2.GenerateRequest(prompt=prompt, cache=control, sampling=generation_pb2.Sampling(max_tokens=3))


# What b tries, by method

Attack = Callable[[World, str], Transcript]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    """Register the calls of the method that the function is named after."""
    ATTACKS["".join(part.title() for part in function.__name__.split("_"))] = function
    return function


@attack
def generate_(world: World, me: str) -> Transcript:
    """The other's prompts, in every namespace and session: is anything cached, and why not?"""
    controls = [
        *(prompt_pb2.CacheControl(namespace=name) for name in COLLISIONS),
        *(prompt_pb2.CacheControl(session_id=name, end_session_on_disconnect=True) for name in SESSIONS),
        prompt_pb2.CacheControl(session_id=SESSIONS[0], keep_for=Duration(seconds=600), priority=100),
        prompt_pb2.CacheControl(read=False, store=False),
    ]
    return [world.call(me, "Generate", generate(prompt, control)) for prompt in PROMPTS for control in controls]


@attack
def tokenize(world: World, me: str) -> Transcript:
    """The other's prompts and their hashes, in every namespace."""
    return [
        world.call(
            me, "Tokenize", generation_pb2.TokenizeRequest(prompt=prompt, namespace=name, with_block_hashes=True)
        )
        for prompt in PROMPTS
        for name in COLLISIONS
    ]


@attack
def get_model(world: World, me: str) -> Transcript:
    """Nothing to ask for."""
    return world.call(me, "GetModel", generation_pb2.GetModelRequest())


@attack
def lookup(world: World, me: str) -> Transcript:
    """The other's prompts and their beginnings, in every namespace: where do they leave the cached path?"""
    beginnings = [text(GUIDE[:100]), text(GUIDE[:100] + "!"), ids(IDS[:50]), ids([*IDS[:50], 7])]
    return [
        world.call(me, "Lookup", cache_pb2.LookupRequest(prompt=prompt, namespace=name, with_text=True))
        for prompt in (*PROMPTS, *beginnings)
        for name in COLLISIONS
    ]


@attack
def warm(world: World, me: str) -> Transcript:
    """The other's prompts: were they cached before?"""
    requests = [
        cache_pb2.WarmRequest(prompt=prompt, cache=prompt_pb2.CacheControl(namespace=name), id=f"{number} {name}")
        for name in COLLISIONS
        for number, prompt in enumerate(PROMPTS)
    ]
    return sorted(world.call(me, "Warm", iter(requests)), key=str)


@attack
def pin(world: World, me: str) -> Transcript:
    """The other's prompts, if they are cached; and its pins, by their names."""
    asked = [
        world.call(me, "Pin", cache_pb2.PinRequest(prompt=prompt, namespace=name, pin_id="x", cached_only=True))
        for prompt in PROMPTS
        for name in COLLISIONS
    ]
    taken = [world.call(me, "Pin", cache_pb2.PinRequest(prompt=text("short"), pin_id=name)) for name in PINS]
    return [*asked, *taken]


@attack
def unpin(world: World, me: str) -> Transcript:
    """The other's pins, by their names."""
    return [
        world.call(me, "Unpin", cache_pb2.UnpinRequest(pin_id=pin_id, namespace=name))
        for pin_id in PINS
        for name in COLLISIONS
    ]


@attack
def list_pins(world: World, me: str) -> Transcript:
    """Before and after making one's own of the same name."""
    before = world.call(me, "ListPins", cache_pb2.ListPinsRequest())
    world.call(me, "Pin", cache_pb2.PinRequest(prompt=text("a prompt of two blocks, of my own"), pin_id=PINS[0]))
    return [before, world.call(me, "ListPins", cache_pb2.ListPinsRequest())]


@attack
def end_session(world: World, me: str) -> Transcript:
    """The other's sessions, by their names."""
    return [
        world.call(me, "EndSession", cache_pb2.EndSessionRequest(session_id=session, namespace=name))
        for session in SESSIONS
        for name in COLLISIONS
    ]


@attack
def invalidate(world: World, me: str) -> Transcript:
    """The other's prompts, sessions, namespaces, everything: does anything go?"""
    what = [
        *({"prefix": prompt} for prompt in PROMPTS),
        {"prefix": ids(IDS[:1])},
        *({"session_id": session} for session in SESSIONS),
        {"whole_namespace": True},
    ]
    requests: list[Any] = [
        cache_pb2.InvalidateRequest(namespace=name, **part)  # type: ignore[arg-type]  # one of several types
        for part in what
        for name in COLLISIONS
    ]
    requests.append(cache_pb2.InvalidateRequest(everything=True))
    return [world.call(me, "Invalidate", request) for request in requests]


@attack
def get_stats(world: World, me: str) -> Transcript:
    """Before and after doing something, and after the other did."""
    before = world.call(me, "GetStats", cache_pb2.GetStatsRequest())
    world.call(me, "Generate", generate(text(GUIDE)))
    own = world.call(me, "GetStats", cache_pb2.GetStatsRequest())
    world.act()
    return [before, own, world.call(me, "GetStats", cache_pb2.GetStatsRequest())]


@attack
def watch_events(world: World, me: str) -> Transcript:
    """From a snapshot on, while the other does something; and from where the other's own watching is."""
    watching = world.begin(me, "WatchEvents", cache_pb2.WatchEventsRequest())
    seen = list(until(watching, lambda event: event.HasField("snapshot_end")))
    world.act()
    world.call(me, "Generate", generate(ids(IDS[:32]), prompt_pb2.CacheControl(namespace="marker")))
    seen += until(watching, lambda event: event.stored.namespace == "marker")
    watching.cancel()
    stream_id, sequence = world.stolen_stream
    stolen = cache_pb2.WatchEventsRequest(stream_id=stream_id, sequence=sequence)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listening = world.begin(me, "WatchEvents", stolen)
    threading.Thread(target=lambda: answers.put(first_of(listening))).start()
    world.act()
    world.call(me, "Generate", generate(ids(IDS[:32]), prompt_pb2.CacheControl(namespace="marker 2")))
    answer = answers.get(timeout=20)
    listening.cancel()
    return [[told(event) for event in seen], answer]


@attack
def watch_prompts(world: World, me: str) -> Transcript:
    """While the other sends something, and oneself the other's prompt."""
    seen = [told(shape) for shape in shapes(world, me)]
    return [shape for shape in seen if shape.get("namespace") != "begun"]


def shapes(world: World, me: str) -> Iterator[cache_pb2.WatchPromptsResponse]:
    """Yield the shapes that one sees while the other acts and then oneself sends the other's prompt."""
    watching = world.begin(me, "WatchPrompts", cache_pb2.WatchPromptsRequest())
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=lambda: arrived.put(next(watching))).start()
    while arrived.empty():  # nothing else says that the watching has begun
        world.call(me, "Generate", generate(ids(IDS[:2]), prompt_pb2.CacheControl(namespace="begun")))
    arrived.get()
    world.act()
    world.call(me, "Generate", generate(text(GUIDE), prompt_pb2.CacheControl(namespace="marker")))
    yield from until(watching, lambda shape: shape.namespace == "marker")
    watching.cancel()


def until(stream: Iterator[Any], last: Callable[[Any], bool]) -> Iterator[Any]:
    """Yield the messages of a stream up to the one that `last` says is it."""
    for message in stream:
        yield message
        if last(message):
            return


def first_of(stream: Iterator[Any]) -> Any:
    try:
        return told(next(stream))
    except grpc.RpcError as error:
        return failure(error)


# The tests


METHODS = [method.name for file in SERVICES for service in file.services_by_name.values() for method in service.methods]


@pytest.mark.parametrize("published", [False, True], ids=["", "published"])
@pytest.mark.parametrize("method", METHODS)
def test_a_tenant_learns_nothing_and_changes_nothing_of_another(tmp_path: Path, method: str, published: bool) -> None:
    """What comes back, and how much is computed for it, is the same as if the other had never been.

    Also where both may begin with the same published prompt: what follows is each one's own.
    """
    transcripts, work = [], []
    for lived in (False, True):
        with World(tmp_path, lived=lived, published=published) as world:
            before, computed = world.belongings(), world.runner.computed_tokens
            transcripts.append(ATTACKS[method](world, "b"))
            work.append(world.runner.computed_tokens - computed)
            assert world.belongings() == before
    assert not unexpected(transcripts)
    assert transcripts[0] == transcripts[1]
    assert work[0] == work[1] or method in ("GetStats", "WatchEvents", "WatchPrompts")  # where a acts meanwhile


def unexpected(transcripts: Any) -> list[Any]:
    """Return the answers that say that a call was not carried out at all."""
    if isinstance(transcripts, dict):
        return [transcripts] if transcripts.get("code") in ("INTERNAL", "UNIMPLEMENTED", "UNAUTHENTICATED") else []
    return [found for part in transcripts for found in unexpected(part)] if isinstance(transcripts, list) else []


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"Tokenize", "GetModel"}))
def test_the_same_calls_tell_the_owner(tmp_path: Path, method: str) -> None:
    """So what the other tenant did not learn was there to be learned."""
    transcripts = []
    for lived in (False, True):
        with World(tmp_path, lived=lived) as world:
            transcripts.append(ATTACKS[method](world, "a"))
    assert transcripts[0] != transcripts[1]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"GetStats", "WatchPrompts"}))
def test_an_administrator_sees_sums_and_shapes_and_nothing_else(tmp_path: Path, method: str) -> None:
    """GetStats, WatchPrompts and the sum of all pins are of the whole server; what is in prompts it does not learn."""
    transcripts = []
    for lived in (False, True):
        with World(tmp_path, lived=lived, admin=True) as world:
            before = world.belongings()
            transcripts.append(without_sums(ATTACKS[method](world, "b")))
            assert world.belongings() == before
    assert not unexpected(transcripts)
    assert transcripts[0] == transcripts[1]


def without_sums(value: Any) -> Any:
    """Return what was told without the blocks that all pins hold, which an administrator may know."""
    if isinstance(value, dict):
        return {key: without_sums(part) for key, part in value.items() if key != "pinnedBlocks"}
    return [without_sums(part) for part in value] if isinstance(value, list) else value


def test_an_administrator_cannot_find_out_the_words_of_a_shape(tmp_path: Path) -> None:
    """Who sends the words that another tenant may have sent gets other hashes for them."""
    with World(tmp_path, lived=True, admin=True) as world:
        hashes: dict[str, set[int]] = {"a/": set(), "marker": set()}
        for shape in shapes(world, "b"):
            if shape.namespace in hashes:
                hashes[shape.namespace] |= {piece.hash for piece in shape.pieces}
        assert all(hashes.values())
        assert not hashes["a/"] & hashes["marker"]


def test_hashes_of_the_same_prompts_are_others_for_another(tmp_path: Path) -> None:
    """What b is told of a's prompts, in whatever namespace, names none of the blocks that a has, nor of each other."""
    with World(tmp_path, lived=True) as world:
        hashes = {tenant: [block_hashes(answer) for answer in ATTACKS["Tokenize"](world, tenant)] for tenant in "ab"}
        watching = world.begin("a", "WatchEvents", cache_pb2.WatchEventsRequest())
        kept = {
            value
            for event in until(watching, lambda event: event.HasField("snapshot_end"))
            for value in split(event.snapshot.hashes)
        }
        watching.cancel()
    of_a, of_b = ({value for answer in hashes[tenant] for value in answer} for tenant in "ab")
    assert kept & of_a  # so that there was something to be met
    assert not kept & of_b
    assert not of_a & of_b
    assert len(of_b) == sum(map(len, hashes["b"]))


def block_hashes(answer: Transcript) -> list[bytes]:
    return split(base64.b64decode(answer[0]["blockHashes"]))


def split(hashes: bytes) -> list[bytes]:
    return [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]


@pytest.mark.parametrize("published", [False, True], ids=["", "published"])
def test_what_other_replicas_hold_is_told_to_the_owner_only(tmp_path: Path, published: bool) -> None:
    """b asks one replica, in every namespace, for what a has on another; a itself is told, and b what is published."""
    prompts = [PROMPTS[0], PROMPTS[1], text(GUIDE[:100])]
    with RedisServer() as redis, ExitStack() as exits:
        options: dict[str, Any] = {"redis": redis.url, "secret_file": secret_file(tmp_path)}
        here = exits.enter_context(World(tmp_path, lived=False, published=published, **options))
        there = exits.enter_context(World(tmp_path, lived=True, published=published, **options))

        def told_to(tenant: str, prompt: prompt_pb2.Prompt, name: str) -> list[int]:
            request = cache_pb2.LookupRequest(prompt=prompt, namespace=name)
            (found,) = here.call(tenant, "Lookup", request)
            return [holder["cachedTokens"] for holder in found.get("elsewhere", [])]

        wait_until(lambda: publishes_exactly(redis, there.server))
        wait_until(lambda: told_to("a", PROMPTS[1], "") == [96])
        for name in ("", NOTES):
            assert told_to("a", PROMPTS[0], name) == [len(GUIDE) // BLOCK * BLOCK]
        for prompt in prompts:
            for name in COLLISIONS:
                begun = published and prompt != PROMPTS[1]
                assert told_to("b", prompt, name) == ([96] if begun else [])


def test_a_first_request_takes_the_steps_of_a_cold_prompt(tmp_path: Path) -> None:
    """Timing: for what another tenant has cached, the engine computes as much, in as many steps, as for nothing."""
    steps = []
    for lived in (False, True):
        with World(tmp_path, lived=lived) as world:
            for prompt in PROMPTS:
                before = len(world.runner.steps)
                assert "finished" in world.call("b", "Generate", generate(prompt))[1]
                steps.append(world.runner.steps[before:])
    cold, after_another = steps[: len(PROMPTS)], steps[len(PROMPTS) :]
    assert cold == after_another
    assert [sum(step) for step in cold] == [len(GUIDE) + 1 + 2, len(IDS) + 2, sum(cold[2])]
    assert len(cold[0]) > 2


def test_what_is_computed_for_another_right_now_is_not_seen(tmp_path: Path) -> None:
    """The owner hears that its prompt is in flight and running, another tenant that it is not known."""
    prompt = list(range(100)) * 15
    runner = GatedRunner()
    file = write(tmp_path / "tenants.toml", entry("a"), entry("b"))
    with (
        RunningServer(PaperEngine(runner=runner), tenants=file) as server,
        runner,
        ThreadPoolExecutor(4) as pool,
        Client(server.address, token="a") as a,
        Client(server.address, token="b") as b,
    ):
        computing = a.stream(prompt, max_tokens=1, timeout=20)
        runner.permits.release()
        wait_until(lambda: runner.computed_tokens > 0)
        lookups = [pool.submit(client.lookup, prompt, timeout=20) for client in (a, b)]
        stats = [pool.submit(client.stats, timeout=20) for client in (a, b)]
        wait_until(lambda: server.server.front.engine.loop._inbox.qsize() == 4)  # nobody is told before a step ends
        runner.permits.release()
        assert [lookup.result().miss_reason for lookup in lookups] == ["in_flight", "never_seen"]
        assert [(stat.result().requests.running, stat.result().tokens.prompt) for stat in stats] == [(1, 1500), (0, 0)]
        own = pool.submit(b.generate, prompt, max_tokens=1, timeout=20)
        runner.open()
        assert computing.result().usage.cached_tokens == own.result().usage.cached_tokens == 0
        assert own.result().miss_reason == "never_seen"
        server.check()


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)
