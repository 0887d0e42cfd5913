"""One nursery for all tests here, and a Redis and a deployment for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis import RedisServer
from tests.replicas.processes import Deployment, Nursery


@pytest.fixture(scope="package")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as redis:
        yield redis


@pytest.fixture
def deployment(nursery: Nursery, tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(nursery, tmp_path) as deployment:
        yield deployment
