"""Are the answers right, and are they the same from the cache? Held-out dialogues with the embedded model.

    python -m benchmarks.bench_quality [--dialogues 20] [--cache-memory 2GiB] [--serve "--dtype bfloat16"] [--quick]

Sheets and questions are those that the model was trained on in kind; their names and
values never were (engine/embedded/values.py). Every turn is one request whose prompt is
everything before it, with the right answers in it, so that one mistake counts once. It
is answered twice: *cold*, computing all of its prompt, and *warm*, from the cache. All
other options of the server go into `--serve`: what changes how keys and values are kept
(precision, tiers) is judged by what changes here.

Perplexity is that of the right answers' tokens, given the whole prompt: each is asked
for by itself, so its context is read from the cache like any other.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import describe, machine, wide_console
from engine.embedded.dialogues import Conversation, Sheet, Turn, draw_sheet, messages_of
from engine.embedded.values import Source
from prefixcache.client import Client
from prefixcache.local import LocalServer

LENGTHS = (250, 500, 900, 1300, 1700)
"""Tokens of a sheet, about; turns come on top."""
BUCKET = 500
"""Prompts are told apart by their length in steps of so many tokens."""
TURNS = 8
CHARACTERS_PER_TOKEN = 3.2
CERTAIN = 100.0
"""A bias that decides which token comes; log-probabilities are of before it is added."""


@dataclass(frozen=True)
class Question:
    """A turn of a dialogue, with the conversation before it."""

    sheet: Sheet
    turn: Turn
    messages: list[dict[str, str]]

    @property
    def quarter(self) -> str:
        """Where on the sheet the thing stands that the question is about."""
        place = self.sheet.text.find(self.turn.thing) if self.turn.thing else -1
        if place < 0:
            return "not on the sheet"
        return ("1st", "2nd", "3rd", "4th")[4 * place // len(self.sheet.text)] + " quarter"


@dataclass(frozen=True)
class Answer:
    """What came back, cold and warm, and the log-probabilities of the right answer's tokens."""

    question: Question
    prompt_tokens: int
    cached_tokens: int
    cold: str
    warm: str
    logprobs: list[float]

    @property
    def right(self) -> bool:
        return self.cold == self.question.turn.answer


def questions(length: int, dialogues: int, turns: int, seed: str) -> Iterator[list[Question]]:
    """Yield the turns of each held-out dialogue."""
    for number in range(dialogues):
        source = Source(Random(f"{seed} {length} {number}"), held_out=True)
        sheet = draw_sheet(source, int(length * CHARACTERS_PER_TOKEN))
        drawn = Conversation(source, sheet).turns(turns)
        before = [messages_of(sheet, drawn[:index]) for index in range(turns)]
        yield [
            Question(sheet, turn, [*messages, *turn.messages[:-1]])
            for turn, messages in zip(drawn, before, strict=True)
        ]


def ask(client: Client, question: Question, namespace: str, perplexity: bool) -> Answer:
    """Ask cold, then warm; the warm one finds all but its last token of the prompt cached."""
    tools: dict[str, Any] = {"tools": question.sheet.tools} if question.sheet.tools else {}
    prompt = client.tokenize(question.messages, **tools)
    answer = [*question.messages, {"role": "assistant", "content": question.turn.answer}]
    *whole, _ = client.tokenize(answer, **tools)  # without the header of a turn that is not asked for
    limit = len(whole) - len(prompt) + 8
    cold = client.generate(prompt, max_tokens=limit, namespace=namespace, read_cache=False)
    warm = client.generate(prompt, max_tokens=limit, namespace=namespace)
    if perplexity:
        logprobs = [logprob(client, whole[:place], whole[place], namespace) for place in range(len(prompt), len(whole))]
    else:
        logprobs = []
    return Answer(question, len(prompt), warm.usage.cached_tokens, cold.text, warm.text, logprobs)


def logprob(client: Client, prompt: list[int], token: int, namespace: str) -> float:
    """Return how probable a token was after a prompt, which is read from the cache."""
    completion = client.generate(
        prompt, max_tokens=1, logprobs=0, logit_bias={token: CERTAIN}, ignore_eos=True, namespace=namespace
    )
    return completion.logprobs[0].logprob


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """What the tables show of some answers."""
    logprobs = [logprob for answer in answers for logprob in answer.logprobs]
    return {
        "questions": len(answers),
        "prompt tokens": round(sum(answer.prompt_tokens for answer in answers) / len(answers)),
        "right": sum(answer.right for answer in answers) / len(answers),
        "right warm": sum(answer.warm == answer.question.turn.answer for answer in answers) / len(answers),
        "same": sum(answer.warm == answer.cold for answer in answers),
        "cached": sum(answer.cached_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers),
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)) if logprobs else None,
    }


GROUPS: dict[str, Callable[[Answer], str]] = {
    "prompt of at most": lambda answer: f"{math.ceil(answer.prompt_tokens / BUCKET) * BUCKET:5,} tokens",
    "the thing stands in the": lambda answer: answer.question.quarter,
    "layout": lambda answer: answer.question.sheet.layout,
    "question": lambda answer: answer.question.turn.kind,
}


def _grouped(answers: Sequence[Answer], key: Callable[[Answer], str]) -> dict[str, list[Answer]]:
    ordered = sorted(answers, key=key)
    return {name: list(group) for name, group in groupby(ordered, key)}


def tables(answers: Sequence[Answer], console: Console) -> None:
    for title, key in GROUPS.items():
        table = Table()
        columns = (title, "questions", "prompt", "right cold", "right warm", "same", "cached warm", "perplexity")
        for name in columns:
            table.add_column(name, justify="left" if name == title else "right")
        groups = {**_grouped(answers, key), "all": list(answers)}
        for name, group in groups.items():
            found = summary(group)
            perplexity = found["perplexity"]
            table.add_row(
                name,
                f"{found['questions']:,}",
                f"{found['prompt tokens']:,}",
                f"{found['right']:.1%}",
                f"{found['right warm']:.1%}",
                f"{found['same']:,}",
                f"{found['cached']:.1%}",
                "" if perplexity is None else f"{perplexity:.3f}",
                end_section=name == list(groups)[-2],
            )
        console.print(table)


def main(
    dialogues: Annotated[int, typer.Option(help="Dialogues of each length.", min=1)] = 25,
    turns: Annotated[int, typer.Option(help="Questions of each.", min=1)] = TURNS,
    cache_memory: Annotated[str, typer.Option(help="The server's --cache-memory.")] = "512MiB",
    serve: Annotated[str, typer.Option(help="More options of the server, as one would type them.")] = "",
    address: Annotated[str | None, typer.Option(help="A running server instead of one of its own.")] = None,
    perplexity: Annotated[bool, typer.Option(help="Also ask for every token of the right answers.")] = True,
    mistakes: Annotated[int, typer.Option(help="Show so many wrong answers.", min=0)] = 5,
    result_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Little of everything, to see that it runs.")] = False,
) -> None:
    """Examine the served model, cold and warm. Exits with 1 if an answer from the cache is another one."""
    if quick:
        dialogues, turns = 2, 3
    console, where = wide_console(), machine()
    console.print(f"{describe(where)}; server: {address or serve or 'its defaults'}")
    drawn = [asked for length in LENGTHS for asked in questions(length, dialogues, turns, "examination")]
    answers: list[Answer] = []
    with ExitStack() as stack:
        if address is None:
            server = LocalServer("--cache-memory", cache_memory, *shlex.split(serve))
            address = stack.enter_context(server).address
        client = stack.enter_context(Client(address))
        progress = stack.enter_context(Progress(console=console, transient=True))
        for number, dialogue in enumerate(progress.track(drawn, description="asking")):
            answers += [ask(client, question, f"quality-{number}", perplexity) for question in dialogue]
    tables(answers, console)
    for answer in [answer for answer in answers if not answer.right][:mistakes]:
        console.print(f"[dim]{answer.question.sheet.layout}, {answer.prompt_tokens:,} tokens[/]", end=" ")
        console.print(
            f"{answer.question.messages[-1]['content']}\n  right: {answer.question.turn.answer}\n  said:  ", end=""
        )
        console.print(answer.cold, markup=False)
    if result_file:
        report = {
            "machine": where,
            "server": serve,
            "all": summary(answers),
            **{
                title: {name: summary(group) for name, group in _grouped(answers, key).items()}
                for title, key in GROUPS.items()
            },
        }
        result_file.write_text(json.dumps(report, indent=2) + "\n")
    if any(answer.cold != answer.warm for answer in answers):
        console.print("An answer from the cache is not the one that was computed.", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
