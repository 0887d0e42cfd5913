"""The `prefixcache` command.

Output goes to stdout, what is said about it to stderr. Exit codes: 0 done, 1 the
server or this machine could not do it, 2 the command line makes no sense, 130 Ctrl+C.
What a command needs is imported when it runs, so that `--help` and completion answer
at once; only `serve` needs the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from prefixcache import terminal
from prefixcache.cli_doctor import doctor
from prefixcache.cli_events import events
from prefixcache.cli_keep import end_session, invalidate, pin, pins, unpin
from prefixcache.cli_replicas import replicas
from prefixcache.cli_route import route
from prefixcache.cli_token import token
from prefixcache.cli_warm import warm
from prefixcache.cli_why import why
from prefixcache.errors import PrefixCacheError
from prefixcache.options import (
    DEFAULT_ADDRESS,
    DEFAULT_MAX_TOKENS,
    Address,
    File,
    Json,
    MaxTokens,
    Namespace,
    Priority,
    Prompt,
    Seed,
    Temperature,
    Timeout,
    TimeToLive,
    connect,
    connection_parameters,
    read_prompt,
    write_json,
)

if TYPE_CHECKING:
    from prefixcache.client import Client
    from prefixcache.requests import GenerateOptions

INTERRUPTED = 130

# Under these headings `--help` lists the commands.
SERVER, ASK, LOOK, KEEP = "Server", "Ask", "Look", "Keep and forget"


class Commands(TyperGroup):
    """Loads the options of `serve` when it is used, adds those of a connection, and turns errors into one line."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        names = {parameter.name for parameter in command.params} if command is not None else set()
        if "address" in names and "ca" not in names:
            command.params += connection_parameters()
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name == "serve":
            from prefixcache.serve import command as load

            command = load(serve.__doc__ or "")
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PrefixCacheError as error:
            terminal.error(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 it could not be done, 2 the command line makes no sense, 130 Ctrl+C.",
)


def main() -> None:
    app(prog_name="prefixcache")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("prefixcache")
        except PackageNotFoundError:
            number = "(not installed, run from its source)"
        typer.echo(f"prefixcache {number}")
        raise typer.Exit


@app.callback()
def prefixcache(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prefix caching for language models: a prompt pays only for the tokens that are new."""


@app.command(rich_help_panel=SERVER)
def serve() -> None:
    """Start a server.

    Ctrl+C or SIGTERM ends it: requests in progress may finish, new ones are refused. A second one ends it at once.
    """


@app.command(rich_help_panel=ASK)
def generate(
    prompt: Prompt = None,
    file: File = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: Temperature = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; can be given again.")] = None,
    namespace: Namespace = "",
    no_read: Annotated[bool, typer.Option("--no-read", help="Compute the whole prompt, whatever is cached.")] = False,
    no_store: Annotated[bool, typer.Option("--no-store", help="Keep nothing for later requests.")] = False,
    ttl: TimeToLive = None,
    priority: Priority = None,
    session: Annotated[str | None, typer.Option(help="The session it belongs to.", show_default=False)] = None,
    timeout: Timeout = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Continue a prompt, and say what the cache saved."""
    from prefixcache.explain import cost, sentence

    text = read_prompt(prompt, file)
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop": stop,
        "namespace": namespace,
        "read_cache": not no_read,
        "store_cache": not no_store,
        "ttl": ttl,
        "priority": priority,
        "session_id": session,
        "timeout": timeout,
    }
    with connect(address) as client, client.stream(text, **options) as stream:
        if not as_json:
            terminal.write(stream)
        completion = stream.result()
    if as_json:
        write_json(
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            stopped_by=completion.stopped_by,
            request_id=completion.request_id,
            **dataclasses.asdict(completion.usage),
            miss_reason=completion.miss_reason,
            miss_position=completion.miss_position,
            explanation=sentence(completion),
            ttft_seconds=completion.ttft,
            total_seconds=completion.elapsed,
        )
    else:
        terminal.note(cost(completion))


@app.command(rich_help_panel=ASK)
def chat(
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: Temperature = None,
    seed: Seed = None,
    namespace: Namespace = "",
    timeout: Timeout = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Talk to the model, and see what each turn costs.

    Lines that are piped in are the turns.
    """
    from prefixcache.chat import chat as talk

    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "namespace": namespace,
        "timeout": timeout,
    }
    with connect(address) as client:
        talk(client, system, options)


@app.command(rich_help_panel=LOOK)
def lookup(
    prompt: Prompt = None,
    file: File = None,
    namespace: Namespace = "",
    timeout: Timeout = 30,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Say how much of a prompt is cached, and why not more.

    Nothing is computed, and nothing in the cache changes.
    """
    from prefixcache.explain import around, elsewhere, sentence
    from prefixcache.reasons import MissReason

    text = read_prompt(prompt, file)
    with connect(address) as client:
        found = client.lookup(text, namespace=namespace, with_text=True, timeout=timeout)
    if as_json:
        fields = dataclasses.asdict(found)
        del fields["text"]
        write_json(**fields, explanation=sentence(found))
        return
    cached, total = found.cached_tokens, found.prompt_tokens
    typer.echo(f"{cached:,} of {total:,} prompt tokens are cached ({terminal.percent(cached, total)})")
    typer.echo(sentence(found))
    if found.miss_reason is not MissReason.NONE and found.text and found.cached_characters:
        place = around(found.text, found.cached_characters)
        before, after = (terminal.safe(json.dumps(part, ensure_ascii=False)[1:-1]) for part in place)
        typer.echo(f"the place: ...{before} <-- cached | not cached --> {after}...")
    for other in elsewhere(found):
        typer.echo(terminal.safe(other))


@app.command(rich_help_panel=LOOK)
def stats(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl+C, with rates.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --watch.")] = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="End --watch after this many looks.")] = None,
    timeout: Timeout = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON object instead, one per line.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show what the cache holds and what it has saved."""
    with connect(address) as client:
        if as_json:
            for _ in _ticks(interval, count if watch else 1):
                snapshot = dataclasses.asdict(client.stats(timeout=timeout))
                write_json(**snapshot, address=address)
        elif watch:
            _watch(client, interval, count, timeout)
        else:
            terminal.console().print(terminal.stats_view(client.stats(timeout=timeout)))


def _watch(client: Client, interval: float, count: int | None, timeout: float | None) -> None:
    """Show the statistics in place. A server that stops answering is asked again; it may be restarting."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    console = terminal.console()
    if not console.is_terminal:
        raise typer.BadParameter("there is no terminal to draw on; --watch --json writes one object per line")
    meter = terminal.RateMeter()
    view = terminal.stats_view(client.stats(timeout=timeout))
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        for _ in _ticks(interval, count):
            try:
                snapshot = client.stats(timeout=timeout)
            except PrefixCacheError as error:
                footer = Text(f"{client.target} does not answer, trying again: {error}", "red")
            else:
                view = terminal.stats_view(snapshot, meter.add(snapshot))
                footer = Text(f"{client.target}, up {snapshot.uptime:,.0f} s; Ctrl+C ends", "dim")
            live.update(Group(view, footer), refresh=True)


def _ticks(interval: float, count: int | None) -> Iterator[None]:
    """Yield at once and then every `interval` seconds, `count` times or for ever."""
    done = 0
    while True:
        yield
        done += 1
        if count is not None and done >= count:
            return
        time.sleep(interval)


for panel, commands in (
    (LOOK, (why, doctor, events, replicas)),
    (KEEP, (warm, pin, unpin, pins, invalidate, end_session)),
    (SERVER, (route, token)),
):
    for command in commands:
        app.command(rich_help_panel=panel)(command)
