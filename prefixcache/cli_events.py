"""`prefixcache events`: what the cache stores and removes, as it happens."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache import terminal
from prefixcache.options import DEFAULT_ADDRESS, Address, Timeout, connect, write_json

if TYPE_CHECKING:
    from prefixcache.watch import CacheEvent, Position

SHORT_HASH = 12


def events(
    after: Annotated[
        str | None,
        typer.Option(
            metavar="STREAM:SEQUENCE",
            help="Go on after this event, as --json names it, instead of beginning with what is stored.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many events.", show_default=False)] = None,
    timeout: Timeout = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON object per event, one per line.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show what is stored in the cache, then every change, until Ctrl+C.

    Blocks are shown by the hash of the last one of a run, which names all tokens up to its end.
    """
    position = _position(after)
    with (
        connect(address) as client,
        contextlib.suppress(KeyboardInterrupt),
        client.watch_events(after=position, timeout=timeout) as watch,
    ):
        for event in islice(watch, count):
            if as_json:
                _write(event, watch.position)
            else:
                typer.echo(terminal.safe(_line(event)))


def _position(after: str | None) -> Position | None:
    from prefixcache.watch import Position

    if after is None:
        return None
    stream, _, sequence = after.rpartition(":")
    if not stream or not sequence.isdecimal():
        raise typer.BadParameter("--after takes STREAM:SEQUENCE, such as 9f0c3d2a6b1e4f57:120")
    return Position(stream, int(sequence))


def _line(event: CacheEvent) -> str:
    from prefixcache.watch import BlocksStored, SnapshotEnd

    if isinstance(event, SnapshotEnd):
        return f"{event.sequence:>8,}  = {_blocks(event.blocks)} are stored; what follows are changes"
    sign, last = ("+", event.hashes[-1]) if isinstance(event, BlocksStored) else ("-", event.hashes[0])
    what = f"{sign} {_blocks(len(event.hashes))}"
    number = "" if isinstance(event, BlocksStored) and event.snapshot else f"{event.sequence:,}"
    return f"{number:>8}  {what:<14}  up to {last.hex()[:SHORT_HASH]}  {event.namespace}".rstrip()


def _blocks(count: int) -> str:
    return f"{count:,} block{'' if count == 1 else 's'}"


def _write(event: CacheEvent, position: Position | None) -> None:
    from prefixcache.watch import BlocksStored, SnapshotEnd

    stream = {"stream_id": position.stream_id if position else None, "sequence": event.sequence}
    if isinstance(event, SnapshotEnd):
        write_json(event="snapshot_end", **stream, blocks=event.blocks)
        return
    hashes = [block.hex() for block in event.hashes]
    if isinstance(event, BlocksStored):
        kind = "snapshot" if event.snapshot else "stored"
        write_json(event=kind, **stream, namespace=event.namespace, parent=event.parent.hex(), hashes=hashes)
    else:
        write_json(event="removed", **stream, namespace=event.namespace, hashes=hashes)
