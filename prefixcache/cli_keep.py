"""`prefixcache pin`, `unpin`, `pins`, `invalidate` and `end-session`: what stays in the cache, and what goes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache import terminal
from prefixcache.options import (
    DEFAULT_ADDRESS,
    Address,
    File,
    Json,
    Namespace,
    Prompt,
    Timeout,
    connect,
    read_prompt,
    write_json,
)

if TYPE_CHECKING:
    from prefixcache.results import Invalidated

PinName = Annotated[str, typer.Argument(metavar="NAME", help="A name for the pin.", show_default=False)]
SessionName = Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.", show_default=False)]


def pin(
    name: PinName,
    prompt: Prompt = None,
    file: File = None,
    ttl: Annotated[
        float | None, typer.Option(min=0.001, help="How many seconds it holds.", show_default="until unpin")
    ] = None,
    cached_only: Annotated[bool, typer.Option("--cached-only", help="Compute nothing that is not cached yet.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Let every tenant's prompts begin with it; for administrators.")
    ] = False,
    namespace: Namespace = "",
    timeout: Timeout = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Keep a prompt in the cache, whatever room others need.

    What is not cached is computed first. The same name again moves the pin. Exit code 1 if not all could be pinned.
    """
    text = read_prompt(prompt, file)
    with connect(address) as client:
        pinned = client.pin(
            text,
            name,
            ttl=ttl,
            cached_only=cached_only,
            published=published,
            namespace=namespace,
            timeout=timeout,
        )
    if as_json:
        write_json(**dataclasses.asdict(pinned))
    else:
        typer.echo(f"{pinned.pinned_tokens:,} of {pinned.prompt_tokens:,} prompt tokens are pinned (whole blocks only)")
        typer.echo(f"pins hold {pinned.pinned_blocks:,} of the {pinned.budget_blocks:,} blocks they may")
        if pinned.limited_by:
            terminal.error(pinned.limited_by)
    if pinned.limited_by:
        raise typer.Exit(1)


def unpin(
    name: PinName,
    published: Annotated[bool, typer.Option("--published", help="It is one that is published.")] = False,
    namespace: Namespace = "",
    timeout: Timeout = 30,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """End a pin; what it held can be evicted again."""
    with connect(address) as client:
        client.unpin(name, published=published, namespace=namespace, timeout=timeout)


def pins(timeout: Timeout = 30, as_json: Json = False, address: Address = DEFAULT_ADDRESS) -> None:
    """List your pins."""
    with connect(address) as client:
        listed = client.pins(timeout=timeout)
    if as_json:
        write_json(**dataclasses.asdict(listed))
        return
    if listed.pins:
        from rich.table import Table

        table = Table("name", "namespace", "tokens", "ends in")
        for entry in listed.pins:
            ends = "-" if entry.expires_in is None else f"{entry.expires_in:,.0f} s"
            where = "(published)" if entry.published else terminal.safe(entry.namespace)
            table.add_row(terminal.safe(entry.pin_id), where, f"{entry.tokens:,}", ends)
        terminal.console().print(table)
    typer.echo(f"pins hold {listed.pinned_blocks:,} of the {listed.budget_blocks:,} blocks they may")


def invalidate(
    prompt: Prompt = None,
    file: File = None,
    session: Annotated[str | None, typer.Option(help="Forget what only this session has used.")] = None,
    whole_namespace: Annotated[
        bool, typer.Option("--whole-namespace", help="Forget all of the namespace named by --namespace.")
    ] = False,
    everything: Annotated[bool, typer.Option("--everything", help="Forget all that is yours.")] = False,
    namespace: Namespace = "",
    timeout: Timeout = 30,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Forget prompts: all that begin with PROMPT, or what an option names.

    Nothing of it is reused from that moment on; requests that are running finish with what they have.
    """
    named = [prompt is not None or file is not None, session is not None, whole_namespace, everything]
    if sum(named) != 1:
        raise typer.BadParameter("name one thing to forget: a PROMPT, --session, --whole-namespace or --everything")
    prefix = read_prompt(prompt, file) if named[0] else None
    with connect(address) as client:
        done = client.invalidate(
            prefix,
            session_id=session,
            namespace=namespace,
            whole_namespace=whole_namespace,
            everything=everything,
            timeout=timeout,
        )
    if as_json:
        write_json(**dataclasses.asdict(done))
    else:
        typer.echo(_forgotten(done))


def end_session(
    session: SessionName, namespace: Namespace = "", timeout: Timeout = 30, address: Address = DEFAULT_ADDRESS
) -> None:
    """End a session: what only it has used is given up before anything else when room is needed."""
    with connect(address) as client:
        blocks = client.end_session(session, namespace=namespace, timeout=timeout)
    typer.echo(f"{blocks:,} blocks go first from now on")


def _forgotten(done: Invalidated) -> str:
    if not done.freed_blocks and not done.in_use_blocks:
        return "nothing of that was cached"
    used = f"; {done.in_use_blocks:,} are still in use by running requests and go when these end"
    return f"{done.freed_blocks:,} blocks are free now" + (used if done.in_use_blocks else "")
