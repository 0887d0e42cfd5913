"""Servers of language models, compared: the same weights, the same token ids, greedy, in one run.

    python -m benchmarks.bench_serving SCENARIO --model tiny|small|DIR --dtype float32|bfloat16
        --target ours --target NAME=http://host:port [--target transformers] [--json out.json] [--plot out.png]

Scenarios: `ttft`, `decode`, `shared`, `sharing`, `agents`, `chat`, `trace`,
`conversations`; `SCENARIO --help` says what each sends. `plot` draws from saved results.

`ours` starts this project's server, `ours=grpc://host:port` uses one that runs. An HTTP
target is anything with OpenAI's completions that takes token ids (vLLM), or
llama-server. `transformers` starts its continuous batching in a process of its own.
The model of a target that runs already is whatever it was started with: give it the
same directory.

For each repeat each target gets the same prompts, which are new to all of them (a server
that has seen a run with the same --seed is not cold any more); targets take turns in
going first. Figures are medians over repeats, ratios those of the same
repeat. The clock runs from handing an encoded request to the connection until a token's
message is read. TTFT is the time to the first token, the time per token is (last -
first) / tokens after the first. Rates count all tokens over the whole phase; total
tokens are prompt and output, cached or not. Goodput counts requests whose first token
came within --ttft-limit. Peak memory is the sum of VmHWM over the processes of whoever
listens on the target's port. *Generator, cores* is how much of a core this program took
from the servers.

A request that fails, or that does not give what was asked, is shown, and the exit code
is 1. Nothing here asserts a time; it reports what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import secrets
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import shapes
from benchmarks.machine import describe, machine, wide_console
from benchmarks.serving import plots, report, traffic
from benchmarks.serving.conversations import Conversations
from benchmarks.serving.drive import Limits, Run, measure
from benchmarks.serving.http_target import HttpServer
from benchmarks.serving.targets import OURS, TRANSFORMERS, Address, Failed, Ours, Target, parse, server_options
from benchmarks.serving.traffic import Scenario, TokenSource
from benchmarks.serving.transformers_target import Transformers

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Count = Annotated[int, typer.Option(min=1)]


@dataclass(frozen=True)
class Settings:
    """What every scenario can be told."""

    model: Annotated[str, typer.Option(help=f"{', '.join(shapes.SHAPES)}, or a directory.")] = "tiny"
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32"
    target: Annotated[
        list[str], typer.Option(help="ours, transformers, NAME=http://host:port or NAME=grpc://host:port. Repeatable.")
    ] = None  # type: ignore[assignment]  # typer makes it a list
    repeats: Annotated[int, typer.Option(help="How often everything is done; medians are shown.", min=1)] = 3
    seed: Annotated[
        int | None,
        typer.Option(help="Of prompts and arrival times; drawn if not given, for a server may know old prompts."),
    ] = None
    ours_options: Annotated[str, typer.Option(help="Options of `prefixcache serve` for a server started here.")] = ""
    transformers_options: Annotated[str, typer.Option(help="Options of benchmarks.serving.transformers_worker.")] = ""
    ttft_limit: Annotated[float, typer.Option(help="Milliseconds to the first token of a good request.")] = 500.0
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0
    result_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None
    plot: Annotated[Path | None, typer.Option(help="Also draw them (ttft, sharing, agents with --rate).")] = None


class Model(NamedTuple):
    """Where it is, and what limits the prompts."""

    path: Path
    vocabulary: int
    longest: int


def scenario(function: Callable[..., Scenario]) -> Callable[..., Scenario]:
    """Make a command of a function that makes a scenario: its options and those of every scenario.

    A first parameter `model` of the function is not an option, but the model.
    """
    own = dict(inspect.signature(function, eval_str=True).parameters)
    wants_model = own.pop("model", None) is not None
    hints = get_type_hints(Settings, include_extras=True)
    shared = {
        field.name: inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Settings)
    }

    def command(**values: Any) -> None:
        settings = Settings(**{name: values.pop(name) for name in shared})
        run(settings, function.__name__, values, function, wants_model)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()]
    command.__signature__ = inspect.Signature([*parameters, *shared.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {name: p.annotation for name, p in [*own.items(), *shared.items()]}
    app.command(function.__name__, help=inspect.getdoc(function))(command)
    return function


# Scenarios


@scenario
def ttft(
    length: Annotated[list[int], typer.Option(help="Prompt tokens. Repeatable.")] = [256, 1024, 4096],  # noqa: B006
    suffix: Annotated[int, typer.Option(help="Tokens that are not cached when warm.", min=1)] = 64,
    pairs: Annotated[int, typer.Option(help="Pairs of a cold and a warm prompt per length and repeat.", min=1)] = 5,
) -> Scenario:
    """Time to first token, one prompt at a time: cold, then with all but the last --suffix tokens cached."""
    return traffic.Ttft(length, suffix, pairs)


@scenario
def decode(prompt: Count = 64, output: Count = 256, sequences: Count = 2) -> Scenario:
    """Tokens per second of one sequence after a short prompt, from first to last token; --sequences per repeat."""
    return traffic.Decode(prompt, output, sequences)


@scenario
def shared(requests: Count = 64, shared: Count = 1024, own: Count = 128, output: Count = 64) -> Scenario:
    """All requests at once; they share their first --shared tokens, of which nothing is cached when they come."""
    return traffic.Shared(requests, shared, own, output)


@scenario
def sharing(
    shared: Count = 4096,
    own: Count = 16,
    output: Count = 64,
    number: Annotated[list[int], typer.Option(help="Requests at once. Repeatable.")] = [1, 2, 4, 8, 16, 32, 64],  # noqa: B006
) -> Scenario:
    """Decoding by 1, 2, 4, ... requests at once that share a cached prefix.

    *Together* are the tokens per second that arrive after the last request has got its first token, up to the
    moment the first request has got its last; n/a if they never all decode at once.
    """
    return traffic.Sharing(number, shared, own, output)


@scenario
def agents(
    requests: Annotated[int, typer.Option(help="Per rate.", min=1)] = 64,
    systems: Annotated[int, typer.Option(help="Different system prompts.", min=1)] = 8,
    system: Annotated[int, typer.Option(help="Tokens of a system prompt.", min=1)] = 2048,
    own: Count = 128,
    output: Count = 64,
    concurrency: Annotated[int, typer.Option(help="Requests kept running, without --rate.", min=1)] = 8,
    rate: Annotated[list[float], typer.Option(help="Requests per second, Poisson. Repeatable.")] = [],  # noqa: B006
) -> Scenario:
    """System prompts chosen by Zipf's law, each with a question of its own."""
    return traffic.Agents(requests, systems, system, own, output, concurrency, rate)


@scenario
def chat(
    conversations: Count = 16,
    turns: Count = 6,
    user: Annotated[int, typer.Option(help="Mean tokens of a question.", min=2)] = 100,
    output: Annotated[int, typer.Option(help="Mean tokens of an answer.", min=2)] = 60,
    concurrency: Count = 8,
) -> Scenario:
    """Conversations that grow; a turn is sent when the answer to the one before has come."""
    return traffic.Chat(conversations, turns, user, output, concurrency)


@scenario
def trace(
    file: Annotated[Path | None, typer.Option(help="JSON lines in the Mooncake format; else generated.")] = None,
    requests: Count = 100,
    scale: Annotated[int, typer.Option(help="Divides all lengths; a power of two up to 512.", min=1)] = 16,
    speed: Annotated[float, typer.Option(help="Divides all arrival times.")] = 1.0,
    max_output: Count = 128,
) -> Scenario:
    """A recorded trace with its own arrival times."""
    return traffic.Trace(file, requests, scale, speed, max_output)


@scenario
def conversations(
    model: Model,
    file: Annotated[Path | None, typer.Option(help="JSON list of runs with messages; else generated.")] = None,
    runs: Annotated[int, typer.Option(help="How many runs of the file, from its beginning.", min=1)] = 16,
    concurrency: Annotated[int, typer.Option(help="Runs at the same time.", min=1)] = 4,
    max_output: Count = 128,
) -> Scenario:
    """Recorded runs of tool-calling agents: every assistant turn is a call with all messages before it as prompt."""
    return Conversations(model.longest, model.vocabulary, file, runs, concurrency, max_output)


@app.command("plot")
def plot_command(
    files: Annotated[list[Path], typer.Argument(help="Results written with --json; a panel for each.", exists=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture.")],
) -> None:
    """Draw saved results."""
    try:
        plots.draw([report.load(file) for file in files], output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


# Running them


def run(settings: Settings, name: str, own: dict[str, Any], make: Callable[..., Scenario], wants_model: bool) -> None:
    """Run a scenario; ends with typer.Exit(1) if a request failed, with 2 if a target does not work."""
    console = wide_console()
    where = machine()
    with tempfile.TemporaryDirectory() as directory:
        try:
            model = find_model(settings.model, settings.dtype, Path(directory))
            made = make(model, **own) if wants_model else make(**own)
            addresses = [parse(text) for text in settings.target or [OURS]]
            if len({address.name for address in addresses}) < len(addresses):
                raise ValueError("two targets have the same name")
            seed = secrets.randbits(31) if settings.seed is None else settings.seed
            source = TokenSource(model.vocabulary, seed)
            options = {"scenario": name, **_plain(own), **_plain(asdict(settings))}
            options |= {"model": Path(settings.model).name, "seed": seed}
            if settings.plot:
                plots.check({"scenario": name, "options": options})
            targets = [make_target(address, settings, model) for address in addresses]
            reference = OURS if any(address.name == OURS for address in addresses) else addresses[0].name
            console.print(f"{describe(where)}; model: {options['model']}, {settings.dtype}")
            if isinstance(made, Conversations) and made.left_out:
                console.print(f"{made.left_out} calls are left out: longer than the model's {model.longest:,} tokens")
            outcome = asyncio.run(_measure(targets, reference, made, source, settings, model, console))
        except (Failed, ValueError, OSError) as error:
            console.print(f"[bold red]{type(error).__name__}:[/] ", end="")
            console.print(str(error), markup=False)
            raise typer.Exit(2) from None
    result = report.build(outcome, reference, where, options)
    if settings.result_file:
        report.save(result, settings.result_file)
    report.show(result, console)
    if settings.plot:
        plots.draw([result], settings.plot)
    if outcome.errors:
        raise typer.Exit(1)


async def _measure(
    targets: list[Target],
    reference: str,
    made: Scenario,
    source: TokenSource,
    settings: Settings,
    model: Model,
    console: Console,
) -> Run:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with contextlib.AsyncExitStack() as stack:
        # Drawn rarely: the cores belong to the servers.
        bar = stack.enter_context(Progress(*columns, console=console, transient=True, refresh_per_second=2))
        task = bar.add_task("", total=None)
        for target in targets:
            bar.update(task, description=f"{target.name}: starting")
            await stack.enter_async_context(target)

        def progress(description: str, ended: int, total: int | None) -> None:
            bar.update(task, description=description, advance=ended, total=total)

        limits = Limits(settings.timeout, settings.ttft_limit / 1000)
        return await measure(targets, reference, made, source, settings.repeats, model.longest, limits, progress)


def make_target(address: Address, settings: Settings, model: Model) -> Target:
    if address.scheme == "grpc":
        return Ours(address.name, f"{address.host}:{address.port}")
    if address.scheme == "http":
        return HttpServer(address.name, address.host, address.port, settings.timeout)
    if address.name == TRANSFORMERS:
        options = ["--model", str(model.path), "--dtype", settings.dtype]
        return Transformers(address.name, [*options, *shlex.split(settings.transformers_options)], settings.timeout)
    return Ours(address.name, None, server_options(str(model.path), settings.dtype, settings.ours_options))


def find_model(name: str, dtype: str, directory: Path) -> Model:
    """The model of a name or directory; a shape is made below `directory`."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: give float32 or bfloat16")
    path = shapes.make(name, directory, dtype) if name in shapes.SHAPES else Path(name)
    if not (path / "config.json").exists():
        raise ValueError(f"model {name!r}: give {', '.join(shapes.SHAPES)}, or a directory with a config.json")
    config = json.loads((path / "config.json").read_text())
    longest = config.get("max_position_embeddings") or config["n_positions"]
    return Model(path, config["vocab_size"], longest)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON takes them; of a file its name only."""
    return {name: value.name if isinstance(value, Path) else value for name, value in values.items()}


if __name__ == "__main__":
    app()
