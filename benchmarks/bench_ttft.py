"""Time to first token, cold and warm, through the real server; and what a KV cache is worth at all.

    python -m benchmarks.bench_ttft [--shape tiny|small] [--dtype float32|bfloat16] [--json out.json] [--quick]

A *cold* prompt shares nothing with any before it. A *warm* one shares all but its last
64 tokens. Each is sent over gRPC by the client library to a server in a process of its
own, one at a time, cold and warm in turn; the clock runs from sending to the first
token at the client. *Overhead* is that time minus the forward passes that the server
reports: protocol, validation, queueing, scheduling, sampling, delivery.

The second table is the classic comparison on GPT-2 medium's shape: transformers'
`generate` without and with its KV cache, and this server with a cold and a warm prompt,
on the same weights in the same run.

Nothing here asserts a time; it reports what it finds.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import shapes
from benchmarks.machine import describe, machine, wide_console
from prefixcache.client import Client
from prefixcache.local import LocalServer

SUFFIX = 64
LENGTHS = (256, 1024, 4096)
VOCAB = 4000  # ids that every shape has


class Prompts:
    """Random token ids; no two sequences begin with the same one."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._first = itertools.count(300)

    def sequence(self, length: int) -> list[int]:
        return [next(self._first), *self._random.choices(range(300, VOCAB), k=length - 1)]


def first_tokens(client: Client, length: int, repeats: int, prompts: Prompts) -> dict[str, list[float]]:
    """Send `repeats` pairs of a cold and a warm prompt; returns seconds by name."""
    seconds: dict[str, list[float]] = {name: [] for name in ("cold", "cold forward", "warm", "warm forward")}
    for _ in range(repeats):
        prefix = prompts.sequence(length - SUFFIX)
        for name, cached in (("cold", 0), ("warm", length - SUFFIX)):
            completion = client.generate(prefix + prompts.sequence(SUFFIX), max_tokens=1, ignore_eos=True)
            if completion.usage.cached_tokens != cached:
                raise RuntimeError(f"{completion.usage.cached_tokens} tokens were cached, expected {cached}")
            if completion.ttft is None:
                raise RuntimeError("no token came")
            seconds[name].append(completion.ttft)
            seconds[f"{name} forward"].append(completion.timings.prefill)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians in milliseconds; overheads are medians of differences."""
    result = {f"{name} ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    for name in ("cold", "warm"):
        pairs = zip(seconds[name], seconds[f"{name} forward"], strict=True)
        result[f"{name} overhead ms"] = 1e3 * statistics.median(total - forward for total, forward in pairs)
    result["cold/warm"] = result["cold ms"] / result["warm ms"]
    return result


def generations(path: Path, address: str, prompt: int, output: int, repeats: int) -> dict[str, float]:
    """Median seconds for `output` greedy tokens after a prompt of `prompt` tokens, by way of generating them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = Prompts().sequence(prompt)
    tokens: dict[str, list[int]] = {}

    def transformers(use_cache: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                made = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, prompt, dtype=torch.long),
                    max_new_tokens=output,
                    min_new_tokens=output,
                    do_sample=False,
                    use_cache=use_cache,
                    pad_token_id=0,
                )
            tokens[f"use_cache={use_cache}"] = made[0, prompt:].tolist()

        return run

    with Client(address) as client:

        def served(name: str, read: bool) -> Callable[[], None]:
            def run() -> None:
                completion = client.generate(ids, max_tokens=output, ignore_eos=True, read_cache=read)
                tokens[name] = completion.token_ids

            return run

        ways = {
            "transformers, use_cache=False": transformers(False),
            "transformers, use_cache=True": transformers(True),
            "this server, cold prompt": served("cold", False),
            "this server, warm prompt": served("warm", True),
        }
        ways["this server, cold prompt"]()  # so that the warm one is warm in every round
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, run in ways.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
    if len({tuple(made) for made in tokens.values()}) > 1:
        agreed = min(_agreement(tokens["use_cache=True"], made) for made in tokens.values())
        raise RuntimeError(f"the ways disagree after {agreed} tokens")
    return {name: statistics.median(values) for name, values in seconds.items()}


def _agreement(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def main(
    shape: Annotated[str, typer.Option(help=f"The model: {', '.join(shapes.SHAPES)}.")] = "tiny",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Pairs of a cold and a warm prompt per length.", min=1)] = 15,
    output: Annotated[int, typer.Option(help="Tokens to generate in the second comparison.", min=1)] = 200,
    result_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Few repeats, to see that everything runs.")] = False,
) -> None:
    """Measure the time to first token, cold and warm, and the server's overhead."""
    if quick:
        repeats, output = 3, 32
    console = wide_console()
    where = machine()
    console.print(f"{describe(where)}; model: {shape}, {dtype}; medians of {repeats}")
    report: dict[str, Any] = {"machine": where, "shape": shape, "dtype": dtype, "repeats": repeats}
    with tempfile.TemporaryDirectory() as directory, Progress(console=console, transient=True) as progress:
        task = progress.add_task("making the model", total=len(LENGTHS) + 3)
        path = shapes.make(shape, Path(directory), dtype)
        progress.update(task, description="starting the server", advance=1)
        options = ("--dtype", dtype, "--cache-memory", "1GiB")
        with LocalServer("--model", str(path), *options) as server, Client(server.address) as client:
            prompts = Prompts()
            for length in LENGTHS:  # every size of step once, so that none is the first
                first_tokens(client, length, 1, prompts)
            report["ttft"] = {}
            for length in LENGTHS:
                progress.update(task, description=f"{length} tokens", advance=1)
                report["ttft"][length] = summarize(first_tokens(client, length, repeats, prompts))
        progress.update(task, description=f"GPT-2 medium, {output} tokens", advance=1)
        path = shapes.make("gpt2-medium", Path(directory))
        with LocalServer("--model", str(path), "--dtype", "float32", "--cache-memory", "1GiB") as server:
            report["generate"] = generations(path, server.address, 64, output, 1 if quick else 2)
    show(report, output, console)
    if result_file:
        result_file.write_text(json.dumps(report, indent=2) + "\n")


def show(report: dict[str, Any], output: int, console: Console) -> None:
    table = Table(title=f"Time to first token, ms ({SUFFIX} tokens new when warm)")
    for column in ("prompt", "cold", "warm", "cold / warm", "cold overhead", "warm overhead"):
        table.add_column(column, justify="right")
    for length, row in report["ttft"].items():
        values = (row[name] for name in ("cold ms", "warm ms", "cold/warm", "cold overhead ms", "warm overhead ms"))
        table.add_row(f"{length:,}", *(f"{value:.1f}" for value in values))
    console.print(table)
    table = Table(title=f"GPT-2 medium's shape, float32: {output} tokens after 64")
    for column in ("", "seconds", "tokens/s", "times as fast as no cache"):
        table.add_column(column, justify="right" if column else "left")
    slowest = max(report["generate"].values())
    for name, seconds in report["generate"].items():
        table.add_row(name, f"{seconds:.2f}", f"{output / seconds:.1f}", f"{slowest / seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
