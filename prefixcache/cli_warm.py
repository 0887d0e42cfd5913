"""`prefixcache warm`: computes the prompts of a file ahead of time, with progress."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from prefixcache import terminal
from prefixcache.options import (
    DEFAULT_ADDRESS,
    Address,
    Namespace,
    Priority,
    Timeout,
    TimeToLive,
    connect,
    write_json,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from prefixcache.prompt_files import FilePrompt
    from prefixcache.warming import Warmed, WarmPrompt


def _how_many(replicas: str) -> str:
    if replicas != "all" and not (replicas.isdecimal() and 1 <= int(replicas) < 2**32):
        raise typer.BadParameter("give a number of replicas, such as 2, or all")
    return replicas


def warm(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="The file of prompts, or - for stdin.", show_default=False)
    ],
    namespace: Namespace = "",
    ttl: TimeToLive = None,
    priority: Priority = None,
    replicas: Annotated[
        str,
        typer.Option(
            metavar="N|all", help="Through a gateway: on how many replicas each is warmed.", callback=_how_many
        ),
    ] = "1",
    timeout: Timeout = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write a JSON object per prompt instead, one per line.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Compute prompts ahead of time, so that requests find them in the cache.

    Requests that somebody waits for go first. What is cached already costs nothing, so after an interruption the same
    command goes on where it was. Exit code 1 if any prompt could not be warmed.

    FILE holds a JSON value per line: a string, or an object with "prompt" (text, token ids or messages), or with
    "messages" and maybe "tools" and "add_generation_prompt"; and with any of "id", "namespace", "ttl_seconds",
    "priority" and "session".
    """
    from prefixcache.warming import ALL_REPLICAS

    tally = Tally()
    with _open(file) as source, connect(address) as client:
        prompts = Prompts(source)
        with (
            client.warm(
                prompts,
                namespace=namespace,
                ttl=ttl,
                priority=priority,
                replicas=ALL_REPLICAS if replicas == "all" else int(replicas),
                timeout=timeout,
            ) as warming,
            _bar(_count(file), hidden=as_json) as bar,
        ):
            try:
                for warmed in warming:
                    _report([*prompts.refused(), prompts.done(warmed)], tally, bar, as_json)
                _report(prompts.refused(), tally, bar, as_json)
            finally:
                if bar is not None:
                    bar.stop()
                if tally.states and not as_json:
                    typer.echo(tally.sentence())
    if not tally.states and not as_json:
        typer.echo("there are no prompts")
    if tally.states["failed"]:
        raise typer.Exit(1)


class Done(NamedTuple):
    """What became of a line."""

    line: int
    name: str
    warmed: Warmed


class Prompts:
    """The prompts of a file as they are to be sent, named by their lines; read in another thread."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = lines
        self._names: dict[int, str] = {}
        self._refused: deque[Done] = deque()

    def __iter__(self) -> Iterator[WarmPrompt]:
        from prefixcache.prompt_files import BadLine, read_prompts

        for entry in read_prompts(self._lines):
            if isinstance(entry, BadLine):
                self._refuse(entry.line, entry.id, entry.reason)
            elif entry.tenant:
                self._refuse(entry.line, entry.id, '"tenant" is for a server\'s own file (serve --warm): leave it out')
            else:
                if entry.id:
                    self._names[entry.line] = entry.id
                yield _prompt(entry)

    def refused(self) -> list[Done]:
        """Lines that were read since the last call and are no prompts."""
        return [self._refused.popleft() for _ in range(len(self._refused))]

    def done(self, warmed: Warmed) -> Done:
        line = int(warmed.id)
        return Done(line, self._names.pop(line, ""), warmed)

    def _refuse(self, line: int, name: str, reason: str) -> None:
        from prefixcache.warming import Warmed

        self._refused.append(Done(line, name, Warmed(str(line), "failed", error=reason)))


class Tally:
    """Counts what became of prompts."""

    def __init__(self) -> None:
        self.states: Counter[str] = Counter()
        self.tokens = 0
        self._begun = time.monotonic()

    def add(self, warmed: Warmed) -> None:
        self.states[warmed.state] += 1
        if warmed.state != "failed":
            self.tokens += warmed.computed_tokens or 0

    @property
    def rate(self) -> float:
        """Tokens computed per second."""
        return self.tokens / max(time.monotonic() - self._begun, 1e-3)

    def sentence(self) -> str:
        tokens = f" ({self.tokens:,} tokens, {self.rate:,.0f} per second)" if self.tokens else ""
        words = {"computed": f"computed{tokens}", "cached": "cached already", "failed": "failed"}
        total = self.states.total()
        parts = [f"{self.states[state]:,} {text}" for state, text in words.items() if self.states[state]]
        return f"{total:,} prompt{'' if total == 1 else 's'}: {', '.join(parts)}"


def _prompt(entry: FilePrompt) -> WarmPrompt:
    return {
        "prompt": entry.prompt,
        "tools": entry.tools,
        "add_generation_prompt": entry.add_generation_prompt,
        "id": str(entry.line),
        "namespace": entry.namespace or None,
        "ttl": entry.ttl,
        "priority": entry.priority,
        "session_id": entry.session or None,
    }


def _report(results: Iterable[Done], tally: Tally, bar: Progress | None, as_json: bool) -> None:
    for line, name, warmed in results:
        tally.add(warmed)
        if as_json:
            write_json(
                line=line,
                id=name or None,
                state=warmed.state,
                prompt_tokens=warmed.prompt_tokens,
                cached_tokens=warmed.cached_tokens,
                computed_tokens=warmed.computed_tokens,
                error=warmed.error,
                replicas=warmed.replicas,
            )
        elif warmed.error:
            which = f"line {line} ({name})" if name else f"line {line}"
            console = terminal.console(stderr=True) if bar is None else bar.console  # which draws around it
            console.print(terminal.safe(f"{which} failed: {warmed.error}"), style="red", soft_wrap=True)
        if bar is not None:
            bar.update(bar.task_ids[0], advance=1, **_fields(tally))


def _fields(tally: Tally) -> dict[str, Any]:
    states = tally.states
    failed = f", {states['failed']:,} failed" if states["failed"] else ""
    return {
        "counts": f"{states['computed']:,} computed, {states['cached']:,} cached{failed}",
        "rate": f"{tally.rate:,.0f} tokens/s",
    }


def _bar(total: int | None, *, hidden: bool) -> AbstractContextManager[Progress | None]:
    """A progress bar if there is a terminal for it; `total` is None where the end is not known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = terminal.console(stderr=True)
    if hidden or not console.is_terminal:
        return nullcontext()
    bar = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[counts]}"),
        TextColumn("{task.fields[rate]}", style="dim"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    bar.add_task("", total=total, **_fields(Tally()))
    return bar


def _open(file: str) -> AbstractContextManager[Iterable[bytes]]:
    if file == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(file, "rb")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None


def _count(file: str) -> int | None:
    """Return how many lines of a file say something; None if it is no regular file, which can be read but once."""
    if file == "-" or not os.path.isfile(file):
        return None
    with open(file, "rb") as lines:
        return sum(bool(line.strip()) for line in lines)
