"""`prefixcache doctor`: what keeps prompts from sharing their beginnings, and what changing it would save.

Prompts come from files or, as shapes without text, from a server that is followed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from prefixcache import terminal
from prefixcache.errors import DeadlineExceeded, InvalidArgument
from prefixcache.options import DEFAULT_ADDRESS, Address, Json, connect, write_json

if TYPE_CHECKING:
    from prefixcache.client import Client
    from prefixcache.doctor import Example, Finding, Pieces, Prompt, Report, Share

BAR_CELLS = 30
TOKENIZED_AT_ONCE = 8
MEASURED_TOKENS = 2048


class Tokenizer(StrEnum):
    """Who counts tokens."""

    ESTIMATE = "estimate"
    SERVER = "server"


def doctor(
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PROMPTS",
            help="Files with a prompt per line (.jsonl), files that are a prompt each, directories of them, or -.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Look at the prompts that the server gets from now on instead.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="End --follow after so long; Ctrl+C does, too.", show_default=False)
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="End --follow after so many prompts.", show_default=False)
    ] = None,
    one_in: Annotated[int, typer.Option(min=1, help="With --follow: look at one in so many prompts.")] = 1,
    tokenizer: Annotated[
        Tokenizer, typer.Option(help="Count four characters as a token, or let the server tokenize the prompts.")
    ] = Tokenizer.ESTIMATE,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per cache block.", show_default="the server's, or 16")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the cache has room for.", show_default="all")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="The prefill rate, to say what is saved in seconds.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Let the server compute a prompt once, to learn its prefill rate.")
    ] = False,
    fail_under: Annotated[
        float | None,
        typer.Option(min=0, max=100, metavar="PERCENT", help="Exit code 1 if less can be reused today."),
    ] = None,
    rewrite: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the prompts as advised to this file, one per line.")
    ] = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Find what keeps prompts from sharing their beginnings: clocks, ids, names, unsorted keys and the like.

    Says how much of them a cache can reuse, today and as advised. With --follow the server tells hashes, never text.
    """
    from prefixcache.doctor import DEFAULT_BLOCK_SIZE, Diagnosis, Pieces

    _check(prompts, follow, rewrite, tokenizer)
    pieces = Pieces()
    asking = follow or measure or tokenizer is Tokenizer.SERVER
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(address)) if asking else None
        if client is not None and follow:
            found = _follow(client, pieces, seconds, count, one_in)
        else:
            found = list(_read(prompts or [], pieces))
        if client is not None:
            block_size = block_size or client.model().block_size
            if measure:
                tokens_per_second = _measured_rate(client)
        size = block_size or DEFAULT_BLOCK_SIZE
        diagnosis = Diagnosis(
            found,
            pieces,
            block_size=size,
            blocks=None if cache_tokens is None else max(cache_tokens // size, 1),
            tokenize=_tokenize(client) if client is not None and tokenizer is Tokenizer.SERVER else None,
            tokens_per_second=tokens_per_second,
        )
        report = diagnosis.report
    if rewrite is not None:
        _write(rewrite, diagnosis.rewritten())
    if as_json:
        write_json(**_as_dict(report))
    else:
        _show(terminal.console(), report)
    if fail_under is not None and report.today.share * 100 < fail_under:
        terminal.note(f"{report.today.share:.1%} can be reused today, less than the {fail_under:g}% asked for", "red")
        raise typer.Exit(1)


def _check(prompts: list[Path] | None, follow: bool, rewrite: Path | None, tokenizer: Tokenizer) -> None:
    if follow == bool(prompts):
        raise typer.BadParameter("name files of prompts, or - for stdin; or --follow a server")
    if follow and (rewrite is not None or tokenizer is Tokenizer.SERVER):
        option = "--rewrite" if rewrite is not None else "--tokenizer server"
        raise typer.BadParameter(f"{option} needs the text of prompts, which a server that is followed does not tell")
    for place in prompts or []:
        if str(place) != "-" and not place.exists():
            raise typer.BadParameter(f"there is no file {str(place)!r}")
        if rewrite is not None and place.exists() and rewrite.exists() and rewrite.samefile(place):
            raise typer.BadParameter(f"--rewrite would overwrite {str(place)!r}; name another file")


# Where prompts come from


def _read(places: Iterable[Path], pieces: Pieces) -> Iterator[Prompt]:
    from prefixcache.doctor import read_prompts

    for place in places:
        try:
            if str(place) == "-":
                yield from read_prompts(None, sys.stdin.buffer.read(), pieces)
                continue
            files = [place]
            if place.is_dir():
                files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
            for file in files:
                yield from read_prompts(file, file.read_bytes(), pieces)
        except InvalidArgument as error:
            raise typer.BadParameter(str(error)) from None
        except OSError as error:
            raise typer.BadParameter(f"{place} cannot be read: {error.strerror}") from None


def _follow(client: Client, pieces: Pieces, seconds: float | None, count: int | None, one_in: int) -> list[Prompt]:
    """Return what comes until there are `count`, the time is up, or Ctrl+C."""
    from prefixcache.doctor import prompt_from_shape

    found: list[Prompt] = []
    console = terminal.console(stderr=True)
    status = console.status("") if console.is_terminal else contextlib.nullcontext()
    with (
        contextlib.suppress(KeyboardInterrupt, DeadlineExceeded),
        client.watch_prompts(one_in=one_in, timeout=seconds) as watch,
        status as line,
    ):
        while count is None or len(found) < count:
            if line is not None:
                line.update(f"{_count(len(found), 'prompt')} at {client.target}; Ctrl+C for the report")
            shape = next(watch)
            prompt = prompt_from_shape(shape.pieces, pieces, f"prompt {len(found) + 1}", shape.namespace)
            prompt.prompt_tokens, prompt.cached_tokens = shape.prompt_tokens, shape.cached_tokens
            found.append(prompt)
    if not found:
        raise DeadlineExceeded(f"no prompt came to {client.target} while it was followed")
    return found


# What a server is asked


def _tokenize(client: Client) -> Any:
    from prefixcache.doctor import sendable

    def tokenize(source: Any) -> Sequence[int]:
        prompt, tools = sendable(source)
        return client.tokenize(prompt, tools=tools)

    def all_of(sources: Iterable[Any]) -> Iterator[Sequence[int]]:
        with ThreadPoolExecutor(TOKENIZED_AT_ONCE) as threads:
            yield from threads.map(tokenize, sources)

    return all_of


def _measured_rate(client: Client) -> float:
    """Return how many tokens per second the server computes, of a prompt that means nothing and is not kept."""
    model = client.model()
    tokens = [index * 7 % model.vocab_size for index in range(min(MEASURED_TOKENS, model.max_length - 1))]
    done = client.generate(tokens, max_tokens=1, read_cache=False, store_cache=False, ignore_eos=True)
    return done.usage.computed_tokens / max(done.timings.prefill, 1e-6)


# What is written


def _write(path: Path, prompts: Iterable[Any]) -> None:
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a character, as JSON has it
            for prompt in prompts:
                file.write(json.dumps(prompt, ensure_ascii=False) + "\n")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}") from None


def _as_dict(report: Report) -> dict[str, Any]:
    fields = dataclasses.asdict(report)
    for name in ("today", "after", "measured"):
        share: Share | None = getattr(report, name)
        fields[name] = share and {"tokens": share.tokens, "cached": share.cached, "share": round(share.share, 4)}
    return fields


def _show(console: Console, report: Report) -> None:
    _print(console, _heading(report))
    console.print()
    _print(console, _bar("today", report.today, "can be reused"))
    if report.findings:
        saved = f"{report.saved_tokens:,} tokens{_seconds(report.saved_seconds)} less to compute"
        _print(console, _bar("as advised", report.after, saved))
    if report.measured is not None:
        _print(console, _bar("measured", report.measured, "is what the server found in its cache"))
    for number, finding in enumerate(report.findings, start=1):
        console.print()
        _show_finding(console, number, finding, report)
    console.print()
    _print(console, Text(_remark(report), "dim"))


def _print(console: Console, text: Text, indent: int = 0) -> None:
    """Print a line; a long one is broken on a terminal only."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent).append_text(text), soft_wrap=True)


def _heading(report: Report) -> Text:
    about = "about " if report.counted == "estimate" and report.measured is None else ""
    text = Text().append(f"{_count(report.prompts, 'prompt')}, {about}{report.today.tokens:,} tokens", "bold")
    if report.groups:
        text.append(f" in {_count(report.groups, 'group')} of prompts that are alike")
    if report.ungrouped:
        text.append(f"{', and' if report.groups else ':'} {report.ungrouped:,} like no other")
    return text


def _bar(name: str, share: Share, words: str) -> Text:
    filled = round(BAR_CELLS * share.share)
    bar = Text(f"{name:<11}").append("█" * filled, "green").append("░" * (BAR_CELLS - filled), "dim")
    return bar.append(f" {terminal.percent(share.cached, share.tokens):>4}", "bold").append(f"  {words}")


def _show_finding(console: Console, number: int, finding: Finding, report: Report) -> None:
    place = finding.place
    where = f"{place.part}, line {place.line}" if place.part else f"line {place.line}"
    _print(
        console,
        Text()
        .append(f"{number}. ", "bold")
        .append(finding.title, "bold yellow")
        .append(f": {where}, column {place.column} (token {place.token:,})"),
    )
    lines = [_example(example) for example in finding.examples]
    where = "all prompts" if finding.prompts == report.prompts else f"{finding.prompts:,} of {report.prompts:,} prompts"
    if finding.places > 1:
        where += f", up to {finding.places:,} places in each"
    if finding.groups > 1:
        where += f" of {finding.groups:,} groups"
    first = terminal.safe(place.prompt)
    lines.append(Text(f"in {where}, {finding.variants:,} different; the first is {first}", "dim"))
    lines.append(Text(finding.advice))
    lines.append(Text(_saving(finding), "green"))
    for line in lines:
        _print(console, line, indent=3)


def _example(example: Example) -> Text:
    before, value, after = (
        terminal.safe(part.replace("\n", "↵").replace("\t", "→")) for part in dataclasses.astuple(example)
    )
    return (
        Text()
        .append(before, "dim")
        .append("▸", "yellow")
        .append(value, "yellow")
        .append("◂", "yellow")
        .append(after, "dim")
    )


def _saving(finding: Finding) -> str:
    saved = f"saves {finding.saved_tokens:,} tokens{_seconds(finding.saved_seconds)}"
    if finding.saved_alone * 2 < finding.saved_tokens:
        return f"{saved} together with the other advice, {finding.saved_alone:,} alone"
    return saved


def _remark(report: Report) -> str:
    remarks = []
    if not report.findings:
        remarks.append("Nothing was found that changes in front of what these prompts have in common.")
    if report.counted == "estimate":
        remarks.append(
            "Tokens are estimated from the characters"
            + ("." if report.measured is not None else "; --tokenizer server counts them.")
        )
    if report.findings:
        remarks.append(
            "As advised: what moves goes to the end of a text or of the last user message, what has no order is sorted."
        )
    return " ".join(remarks)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f" ({seconds:,.1f} s)"


def _count(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
