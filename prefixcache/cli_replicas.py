"""`prefixcache replicas`: who is there, as Redis knows it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache import terminal
from prefixcache.cli_route import Deployment, Group, Redis, RedisPrefix
from prefixcache.errors import Unavailable
from prefixcache.extras import not_installed
from prefixcache.hints.schema import DEFAULT_PREFIX, Lease
from prefixcache.hints.schema import Group as ReplicaGroup
from prefixcache.options import write_json

if TYPE_CHECKING:
    import asyncio

    from rich.console import RenderableType

    from prefixcache.hints.locator import Locator

Found = list[tuple[ReplicaGroup, list[Lease]]]

INTERVAL = 1.0
TIMEOUT = 2.0
PLAIN_WIDTH = 160


def replicas(
    redis: Redis = "",
    redis_prefix: RedisPrefix = DEFAULT_PREFIX,
    deployment: Deployment = "",
    group: Group = "",
    once: Annotated[bool, typer.Option("--once", help="Look once, also on a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and write one JSON object.")] = False,
) -> None:
    """List the replicas that are registered in Redis, how busy they are and what they hold; live on a terminal.

    A group is replicas with the same deployment, model and block size, which can use each other's hints.
    """
    if not redis:
        raise typer.BadParameter("say where the replicas are registered: --redis URL, or PREFIXCACHE_REDIS")
    import asyncio

    try:
        from prefixcache.hints.locator import Locator
    except ImportError as error:
        raise not_installed(error, "this command", "route") from None
    only = ReplicaGroup.parse(group) if group else None
    with asyncio.Runner() as runner:
        locator = _make(runner, Locator, redis, redis_prefix)
        try:
            found = runner.run(_look(locator, only, deployment))
            if as_json:
                write_json(groups=[{"group": str(name), "replicas": _as_json(leases)} for name, leases in found])
            elif once or not terminal.console().is_terminal:
                _write(found)
            else:
                _watch(runner, locator, only, deployment, found)
        finally:
            runner.run(_close(locator))


def _make(runner: asyncio.Runner, kind: type[Locator], url: str, prefix: str) -> Locator:
    async def make() -> Locator:
        return kind(url, prefix=prefix, timeout=TIMEOUT)

    return runner.run(make())


async def _close(locator: Locator) -> None:
    from prefixcache.hints.connection import NoHints

    with contextlib.suppress(NoHints):
        await locator.close()


async def _look(locator: Locator, only: ReplicaGroup | None, deployment: str) -> Found:
    """Return the groups and their live replicas. Raises Unavailable if Redis cannot be asked."""
    from prefixcache.hints.connection import NoHints

    try:
        groups = [only] if only is not None else await locator.groups()
        return [
            (group, await locator.leases(group))
            for group in sorted(groups, key=str)
            if not deployment or group.deployment == deployment
        ]
    except NoHints as error:
        raise Unavailable(str(error)) from None


def _watch(runner: asyncio.Runner, locator: Locator, only: ReplicaGroup | None, deployment: str, found: Found) -> None:
    """Show them in place until Ctrl+C. A Redis that does not answer is asked again."""
    from rich.console import Group as Lines
    from rich.live import Live
    from rich.text import Text

    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(_view(found), console=terminal.console(), auto_refresh=False) as live,
    ):
        while True:
            live.refresh()
            time.sleep(INTERVAL)
            footer = Text("Ctrl+C ends", "dim")
            try:
                found = runner.run(_look(locator, only, deployment))
            except Unavailable as error:
                footer = Text(f"{error}; trying again", "red")
            live.update(Lines(_view(found), footer))


def _write(found: Found) -> None:
    from rich.console import Console

    console = terminal.console()
    if not console.is_terminal:
        console = Console(width=max(console.width, PLAIN_WIDTH), highlight=False, markup=False, emoji=False)
    console.print(_view(found))


def _view(found: Found) -> RenderableType:
    from rich import box
    from rich.console import Group as Lines
    from rich.table import Table
    from rich.text import Text

    live = [(group, leases) for group, leases in found if leases]
    if not live:
        return Text("no replica is registered: start one with `prefixcache serve --redis URL --advertise HOST:PORT`")
    parts: list[RenderableType] = []
    for group, leases in live:
        count = f"{len(leases)} replica{'' if len(leases) == 1 else 's'}"
        parts.append(Text.assemble((str(group), "bold"), f"  {terminal.safe(leases[0].model)}, {count}"))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("replica", style="bold", no_wrap=True)
        table.add_column("address", no_wrap=True)
        for title in ("seen", "running", "waiting", "tokens", "used", "blocks", "published", "hit rate"):
            table.add_column(title, justify="right")
        table.add_column("")
        for lease in leases:
            table.add_row(*_row(lease))
        parts += [table, Text("")]
    return Lines(*parts[:-1])


def _row(lease: Lease) -> list[RenderableType]:
    from rich.text import Text

    load = lease.load
    used = lease.blocks - load.free
    return [
        terminal.safe(lease.replica_id),
        terminal.safe(lease.address),
        f"{lease.age:.1f} s",
        f"{load.running:,}",
        f"{load.waiting:,}",
        f"{load.waiting_tokens:,}",
        terminal.percent(used, lease.blocks),
        f"{lease.blocks:,}",
        f"{lease.published:,}",
        Text(terminal.percent(load.cached_tokens, load.prompt_tokens), "green"),
        Text("draining", "yellow") if lease.draining else "",
    ]


def _as_json(leases: list[Lease]) -> list[dict[str, object]]:
    listed = []
    for lease in leases:
        fields = dataclasses.asdict(lease)
        del fields["nonce"]
        prompt = lease.load.prompt_tokens
        fields["hit_rate"] = lease.load.cached_tokens / prompt if prompt else None
        listed.append(fields)
    return listed
