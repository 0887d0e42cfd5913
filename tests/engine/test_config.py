"""The configuration: where values come from, and what is refused with which words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from engine.config import CLIENT_VARIABLES, EMBEDDED_CACHE_LIMIT, EngineConfig, load
from prefixcache.errors import InvalidArgument


def test_defaults_serve_the_embedded_model_to_this_machine_only() -> None:
    """Nothing need be set to start a server that nobody else can reach."""
    config = load({})
    assert (config.model, config.host, config.port, config.block_size) == ("embedded", "127.0.0.1", 50051, 16)
    assert config.threads >= 1


def test_options_win_over_the_environment() -> None:
    """The environment fills in what is not given; None counts as not given."""
    environment = {"PREFIXCACHE_PORT": "1234", "PREFIXCACHE_MAX_QUEUE": "7", "HOME": "/"}
    environment |= dict.fromkeys(CLIENT_VARIABLES, "the client's")
    config = load(environment, port=99, max_queue=None)
    assert (config.port, config.max_queue) == (99, 7)


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        ({}, {"moedl": "x"}, "there is no option 'moedl'; did you mean model?"),
        ({}, {"zzz": 1}, "there is no option 'zzz'. There are: advertise, allow_plaintext, block_size"),
        ({"PREFIXCACHE_PROT": "1"}, {}, "PREFIXCACHE_PROT is set, but it is no option; did you mean PREFIXCACHE_PORT"),
        ({"PREFIXCACHE_PORT": "many"}, {}, "option port cannot be 'many'"),
        ({}, {"port": 70000}, "option port cannot be 70000: input should be less than or equal to 65535"),
        ({}, {"dtype": "int8"}, "option dtype cannot be 'int8': input should be 'auto', 'float32'"),
        ({}, {"eviction": "magic"}, "option eviction cannot be 'magic': there are the policies lru"),
        ({}, {"cache_memory": "lots"}, "option cache_memory cannot be 'lots': give bytes, such as '512MiB'"),
        ({}, {"cache_memory": "0%"}, "a share of free memory must be above 0%"),
        ({}, {"cache_memory": "0"}, "the size must be above 0"),
        ({}, {"drain_seconds": float("inf")}, "option drain_seconds cannot be inf"),
        ({}, {"max_pause_ms": -1}, "option max_pause_ms cannot be -1: input should be greater than or equal to 0"),
        ({}, {"port": -1, "max_running": 0}, "option port .*; option max_running"),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], options: dict[str, object], words: str) -> None:
    """Unknown and unusable options, from either source, are errors that say what is allowed."""
    with pytest.raises(InvalidArgument, match=words):
        load(environment, **options)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1000", 1000),
        ("10kB", 10_000),
        ("5 MiB", 5 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2g", 2 * 10**9),
        ("40%", 400),
    ],
)
def test_cache_memory_is_bytes_or_a_share(size: str, expected: int) -> None:
    """Decimal and binary units, and a share of what is free."""
    assert load({}, cache_memory=size).cache_bytes(1000) == expected


def test_automatic_cache_memory_is_capped_for_the_embedded_model_only() -> None:
    """A quarter of free memory; the small model does not take more than it can use."""
    assert load({}).cache_bytes(2**40) == EMBEDDED_CACHE_LIMIT
    assert load({}).cache_bytes(1000) == 250
    assert load({}, model="other").cache_bytes(2**40) == 2**38


def test_the_configuration_cannot_be_changed() -> None:
    """What was printed at the start stays true."""
    config = load({})
    with pytest.raises(ValidationError):
        config.port = 1


def test_every_field_is_described() -> None:
    """The command line's help comes from here."""
    assert all(field.description for field in EngineConfig.model_fields.values())
