"""`prefixcache why`: a prompt as the model reads it, where its cached part ends, why there, and what to do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console

from prefixcache import terminal
from prefixcache.options import DEFAULT_ADDRESS, Address, Json, Namespace, Timeout, connect, read_prompt, write_json

if TYPE_CHECKING:
    from prefixcache.explain import Place, Varying
    from prefixcache.prompt_files import FilePrompt
    from prefixcache.results import Lookup


class Part(NamedTuple):
    """How much is shown at most of one end of a text."""

    characters: int
    lines: int


# The beginning and the end of what is cached and of what is not: together about a screen.
CACHED_SHOWN = Part(400, 4), Part(800, 10)
REST_SHOWN = Part(800, 10), Part(200, 2)
MIN_LEFT_OUT = 100
RULE_COLUMNS = 80

CACHED, REST, MARK, NOTE = "dim", "", "bold yellow", "cyan"


def why(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The file of the prompt's text, or - for stdin.", show_default=False),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            "--messages",
            "-m",
            metavar="FILE",
            help='A JSON file instead: {"messages": [...], "tools": [...]}, or a list of messages or token ids.',
            show_default=False,
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Leave nothing of a long prompt out.")] = False,
    namespace: Namespace = "",
    timeout: Timeout = 30,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show a prompt, where its cached part ends, why there, and what to do about it.

    Nothing is computed, and nothing in the cache changes.
    """
    from prefixcache.explain import advice, elsewhere, place_in, sentence, varying_at
    from prefixcache.reasons import MissReason

    prompt = _read(file, messages)
    with connect(address) as client:
        found = client.lookup(
            prompt.prompt,
            tools=prompt.tools,
            add_generation_prompt=prompt.add_generation_prompt,
            namespace=namespace or prompt.namespace,
            with_text=True,
            timeout=timeout,
        )
    place = varying = None
    if found.text is not None and found.cached_characters is not None and found.miss_reason is not MissReason.NONE:
        place = place_in(found.text, found.cached_characters)
        if found.miss_reason is MissReason.DIVERGED:
            varying = varying_at(found.text, place.characters)
    what_to_do = advice(found, varying.what if varying else "")
    if as_json:
        write_json(
            **dataclasses.asdict(found),
            line=place and place.line,
            column=place and place.column,
            varying=varying and varying._asdict(),
            explanation=sentence(found),
            advice=what_to_do,
        )
        return
    console = terminal.console()
    if found.text is not None:
        _show(console, found, place, varying, full)
        console.print()
    cached, total = found.cached_tokens, found.prompt_tokens
    share = terminal.percent(cached, total)
    console.print(f"{cached:,} of {total:,} prompt tokens are cached ({share}).", style="bold", soft_wrap=True)
    console.print(_as_sentence(sentence(found)), soft_wrap=True)
    for other in elsewhere(found):
        console.print(terminal.safe(_as_sentence(other)), soft_wrap=True)
    if varying is not None and found.text is not None:
        shown = terminal.safe(found.text[varying.start : varying.end])
        console.print(f"What stands there tends to change: {shown} ({varying.what})", soft_wrap=True)
    console.print(f"What to do: {what_to_do}.", soft_wrap=True)


def _read(file: Path | None, messages: Path | None) -> FilePrompt:
    """Return the prompt from wherever it is. Raises BadParameter if it is nowhere, or none."""
    from prefixcache.prompt_files import BadLine, FilePrompt, read_prompts

    if (file is None) == (messages is None):
        raise typer.BadParameter("give the prompt as a FILE of text, or - to read it from stdin, or with --messages")
    path = file or messages
    assert path is not None
    if str(path) == "-":
        text = read_prompt("-", None)
    elif path.is_file():
        text = read_prompt(None, path)
    else:
        raise typer.BadParameter(f"there is no file {str(path)!r}; `prefixcache lookup` takes text itself")
    if file is not None:
        return FilePrompt(1, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}") from None
    line = json.dumps({"prompt": value} if isinstance(value, list) else value).encode()
    for prompt in read_prompts([line], ignore_others=True):
        if isinstance(prompt, BadLine):
            raise typer.BadParameter(f"{path} is no prompt: {prompt.reason}")
        return prompt
    raise typer.BadParameter(f"{path} is no prompt")


def _show(console: Console, found: Lookup, place: Place | None, varying: Varying | None, full: bool) -> None:
    """Print the text with the place marked; all of it is cached if there is none."""
    text = found.text
    assert text is not None
    if place is None:
        _print(console, text, CACHED, CACHED_SHOWN, full)
        return
    _print(console, text[: place.characters], CACHED, CACHED_SHOWN, full)
    _mark(console, place, found.miss_position)
    end = varying.end if varying is not None else place.characters
    console.out(terminal.safe(text[place.characters : end]), style=MARK, end="")
    _print(console, text[end:], REST, REST_SHOWN, full)


def _print(console: Console, text: str, style: str, shown: tuple[Part, Part], full: bool) -> None:
    """Print text and end its line; of a long one the middle is left out."""
    if not full:
        head, tail = shown
        begin, end = _beginning(text, head), len(text) - _ending(text, tail)
        if end - begin > MIN_LEFT_OUT:
            _end_line(console, text[:begin], style)
            note = f"[... {end - begin:,} characters are left out here; --full shows them ...]"
            console.print(note, style=NOTE, soft_wrap=True)
            text = text[end:]
    _end_line(console, text, style)


def _beginning(text: str, part: Part) -> int:
    """Return how many characters of a text its first part has: whole lines, unless the first is longer."""
    lines = text[: part.characters].splitlines(keepends=True)
    if len(lines) > 1 and len(text) > part.characters:
        lines.pop()
    return sum(map(len, lines[: part.lines]))


def _ending(text: str, part: Part) -> int:
    """Return how many characters of a text its last part has: whole lines, unless the last is longer."""
    lines = text[-part.characters :].splitlines(keepends=True)
    if len(lines) > 1 and len(text) > part.characters:
        del lines[0]
    return sum(map(len, lines[-part.lines :]))


def _end_line(console: Console, text: str, style: str) -> None:
    if text:
        console.out(terminal.safe(text), style=style, end="" if text.endswith("\n") else "\n")


def _mark(console: Console, place: Place, position: int) -> None:
    above = "▲ cached   " if place.characters else ""
    line = f"{above}▼ not cached: line {place.line:,}, column {place.column:,} (token {position:,}) "
    width = min(console.width, RULE_COLUMNS)
    console.print(f"── {line}".ljust(width, "─"), style=MARK, soft_wrap=True)


def _as_sentence(clause: str) -> str:
    return clause[:1].upper() + clause[1:] + "."
