"""Published prompts over real gRPC: shared at the beginning, one's own behind it, and exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixcache.client import Client
from prefixcache.errors import InvalidArgument, NotFound, PermissionDenied
from prefixcache.reasons import MissReason
from tests.engine.serving import PaperEngine, RunningServer
from tests.engine.tenancy import entry, write

SYSTEM = [(7 * number) % 251 for number in range(100)]  # 96 of them are whole blocks


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """Tenants a and b, and an administrator."""
    file = write(tmp_path / "tenants.toml", entry("a"), entry("b"), entry("boss", admin="true"))
    with RunningServer(PaperEngine(), tenants=file) as server:
        yield server


def test_all_tenants_begin_with_what_an_administrator_published(server: RunningServer) -> None:
    """The first request of each finds it; what they go on with is not found by the other."""
    with (
        Client(server.address, token="boss") as boss,
        Client(server.address, token="a") as a,
        Client(server.address, token="b") as b,
    ):
        published = boss.pin(SYSTEM, "support", published=True)
        assert (published.pinned_tokens, published.limited_by) == (96, "")
        chat = [*SYSTEM, *range(60)]
        assert a.generate(chat, max_tokens=1).usage.cached_tokens == 96
        assert a.generate(chat, max_tokens=1).usage.cached_tokens == 159
        found = b.lookup(chat)
        assert (found.cached_tokens, found.miss_reason) == (96, MissReason.NEVER_SEEN)
        assert b.generate(chat, max_tokens=1, session_id="s", keep_for=60).kept_tokens == 160
        assert b.invalidate(everything=True).freed_blocks > 0
        assert a.lookup(chat).cached_tokens == 159
        server.check()


def test_only_administrators_publish_and_see_what_is_published(server: RunningServer) -> None:
    """Others get PERMISSION_DENIED, also for ending it, and do not find it among their pins."""
    with Client(server.address, token="boss") as boss, Client(server.address, token="a") as a:
        for publish in (lambda: a.pin(SYSTEM, "p", published=True), lambda: a.unpin("p", published=True)):
            with pytest.raises(PermissionDenied, match="tenant 'a' may not publish prompts"):
                publish()
        boss.pin(SYSTEM, "p", published=True)
        assert [(pin.pin_id, pin.published) for pin in boss.pins().pins] == [("p", True)]
        assert a.pins().pins == () and a.pins().pinned_blocks == 0
        boss.unpin("p", published=True)
        with pytest.raises(NotFound):
            boss.unpin("p", published=True)
        assert a.lookup([*SYSTEM, 1]).cached_tokens == 0
        with pytest.raises(InvalidArgument, match="neither namespace nor ttl"):
            boss.pin(SYSTEM, "p", published=True, ttl=5)


def test_answers_behind_a_published_prompt_are_those_of_a_cold_one() -> None:
    """With a real model: greedy tokens agree while nearly all of the prompt comes from the cache."""
    system = "You are the clerk of a small harbour. Boats that come at night wait at the outer wall. " * 10
    with RunningServer(model="embedded", cache_memory="16MiB") as server, Client(server.address) as client:
        client.pin(system, "clerk", published=True)
        for namespace in ("", "team"):
            for question in ("When may I come in?", "Who pays?"):
                prompt = f"{system}{question}"
                cold = client.generate(prompt, max_tokens=24, read_cache=False, store_cache=False, ignore_eos=True)
                for _ in range(2):
                    warm = client.generate(prompt, max_tokens=24, namespace=namespace, ignore_eos=True)
                    assert warm.token_ids == cold.token_ids
                    assert warm.usage.cached_tokens >= 256
        server.check()
