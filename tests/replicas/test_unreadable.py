"""What Redis has says nothing of prompts, answers and tenants to those who can read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from struct import pack
from typing import Any

import redis as redis_py

from prefixcache.client import Client
from prefixcache.hints.schema import STATE_BYTES, Group, Keys
from prefixcache.hints.table import MARK_BYTES
from tests.engine.hinted import secret_file
from tests.engine.serving import BLOCK, FINGERPRINT
from tests.engine.tenancy import entry, hashed, write
from tests.redis import RedisServer
from tests.replicas.processes import Deployment, leases
from tests.replicas.traffic import TIMEOUT
from tests.waiting import until

TENANT, TOKEN = "acme-rockets", "a-token-of-acme"
OTHER, OTHER_TOKEN = "umbrella-inc", "a-token-of-umbrella"
TEXT = "The launch code of the third rocket is kept in the blue safe, and nobody but Wernher may know of it. " * 2
CHAT = [{"role": "user", "content": "Tell me once more who invented dynamite, and why he was sorry. " * 2}]
WINDOW = 6


def test_nothing_readable_is_in_redis(redis: RedisServer, deployment: Deployment, tmp_path: Path) -> None:
    """Neither text nor token ids nor who sent them, while requests run and afterwards, in keys, tables and leases."""
    options = {
        "tenants": write(tmp_path / "tenants.toml", entry(TENANT, TOKEN), entry(OTHER, OTHER_TOKEN)),
        "secret_file": secret_file(tmp_path),
    }
    replicas = deployment.replicas("first second", redis.url, step_seconds=0.01, **options)
    gateway = deployment.gateway("--redis", redis.url)
    secrets = [TENANT, TOKEN, OTHER, OTHER_TOKEN, hashed(TOKEN).strip('"'), "a-namespace", "a-session", "a-pin"]
    ids: list[list[int]] = []
    with Client(gateway.address, token=TOKEN) as acme, Client(gateway.address, token=OTHER_TOKEN) as umbrella:
        for client in (acme, umbrella):
            for prompt in (TEXT, CHAT):
                with client.stream(
                    prompt, max_tokens=20, namespace="a-namespace", session_id="a-session", timeout=TIMEOUT
                ) as stream:
                    next(stream)
                    assert_nothing_of([TEXT, *(turn["content"] for turn in CHAT)], ids, secrets, everything(redis))
                    ids += [client.tokenize(prompt, timeout=TIMEOUT), stream.result().token_ids]
        acme.pin(TEXT, "a-pin", timeout=TIMEOUT)
        until(lambda: sum(lease.published for lease in leases(redis.url).values()) > 40, "that tables are published")
        assert len(ids) == 8 and all(replica.process.running for replica in replicas)
        seen = list(everything(redis))
        assert any(FINGERPRINT[:16].encode() in piece for piece in seen), "what is looked for is found, if it is there"
        assert any(replicas[0].address.encode() in piece for piece in seen)
        assert_nothing_of([TEXT, *(turn["content"] for turn in CHAT)], ids, secrets, seen)


def test_deployments_with_different_secrets_share_nothing(
    redis: RedisServer, deployment: Deployment, tmp_path: Path
) -> None:
    """The same prompts in two of them have no piece of a name in common; with the same secret, names are the same."""
    prompts = [list(range(seed, 200 + seed)) for seed in range(5)]
    names: dict[str, bytes] = {}
    marks: dict[str, set[bytes]] = {}
    secrets = {"one": "the secret of one", "again": "the secret of one", "other": "the secret of another"}
    for which, secret in secrets.items():
        options = {"secret_file": secret_file(tmp_path, secret), "deployment": which}
        [replica] = deployment.replicas(which, redis.url, **options)
        with Client(replica.address) as client:
            for prompt in prompts:
                client.generate(prompt, max_tokens=1, timeout=TIMEOUT)
        group = Group(which, FINGERPRINT, BLOCK)
        until(partial(is_published, redis, group, 5 * 12), "its table")
        names[which] = b"".join(replica.hashes(prompt) for prompt in prompts)
        marks[which] = set(table(redis, group))
    assert names["one"] == names["again"] and marks["one"] == marks["again"]
    assert windows(names["one"], 8).isdisjoint(windows(names["other"], 8))
    assert marks["one"].isdisjoint(marks["other"])


def is_published(redis: RedisServer, group: Group, blocks: int) -> bool:
    """Whether the one replica of a group says that it has published so many."""
    return sum(lease.published for lease in leases(redis.url, group).values()) == blocks


def table(redis: RedisServer, group: Group) -> Iterator[bytes]:
    """Yield the marks in the table of the one replica of a group."""
    [lease] = leases(redis.url, group).values()
    with redis.client() as client:
        value: Any = client.get(Keys("prefixcache:").table(group, lease.replica_id, lease.nonce))
    for at in range(STATE_BYTES, len(value), MARK_BYTES):
        if any(value[at : at + MARK_BYTES]):
            yield value[at : at + MARK_BYTES]


def everything(redis: RedisServer) -> Iterator[bytes]:
    """Yield every key and every value in Redis."""
    with redis.client() as client:
        for key in client.scan_iter(count=1000):
            yield key
            yield from value_of(client, key)


def value_of(client: redis_py.Redis, key: bytes) -> Iterable[bytes]:
    kind: Any = client.type(key)
    value: Any
    if kind == b"string":
        value = [client.get(key)]
    elif kind == b"hash":
        value = [part for pair in client.hgetall(key).items() for part in pair]
    else:
        assert kind == b"zset", f"{key!r} is of the kind {kind!r}, which nobody has looked at"
        value = client.zrange(key, 0, -1)
    return [part for part in value if part is not None]


def assert_nothing_of(texts: list[str], ids: list[list[int]], names: list[str], places: Iterable[bytes]) -> None:
    """Assert that no place has a piece of a text, three tokens in a row in any writing, or a name."""
    needles = {piece for text in texts for piece in windows(text.encode(), WINDOW)}
    needles |= {name.encode() for name in names}
    for tokens in ids:
        for three in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if all(three):  # empty places are full of zeros
                needles |= {separator.join(map(str, three)).encode() for separator in (",", ", ", " ")}
                needles |= {pack("<III", *three), pack(">III", *three)}
    for place in places:
        found = [needle for needle in needles if needle in place]
        assert not found, f"{found[:5]} can be read in {place[:200]!r}"


def windows(data: bytes, length: int) -> set[bytes]:
    return {data[at : at + length] for at in range(len(data) - length + 1)}
