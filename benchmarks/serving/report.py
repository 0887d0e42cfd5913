"""The results of one run: as JSON, and as tables."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.serving.drive import Run
from benchmarks.serving.measure import medians, ratios
from benchmarks.serving.traffic import Ttft

Report = dict[str, Any]
SHOWN_ERRORS = 20  # the rest is in the JSON

# Figure, heading, how it is shown.
Column = tuple[str, str, Callable[[float], str]]


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


_FIRST: Sequence[Column] = (
    ("ttft p50 ms", "TTFT p50 ms", _plain(1)),
    ("ttft p90 ms", "p90", _plain(1)),
    ("ttft p99 ms", "p99", _plain(1)),
)
_EACH: Sequence[Column] = (
    ("tpot p50 ms", "per token p50 ms", _plain(1)),
    ("tpot p90 ms", "p90", _plain(1)),
    ("tpot p99 ms", "p99", _plain(1)),
)
_RATES: Sequence[Column] = (
    ("output tokens/s", "output tok/s", _plain(0)),
    ("total tokens/s", "total tok/s", _plain(0)),
    ("goodput/s", "goodput/s", _plain(1)),
    ("wall s", "seconds", _plain(2)),
)
_REUSED: Column = ("reused", "reused", lambda value: f"{value:.0%}")

# For each scenario its tables: the columns of each.
_TABLES: Mapping[str, Sequence[Sequence[Column]]] = {
    "decode": ((("decode tokens/s", "tokens/s", _plain(1)), _EACH[0], _EACH[2], _FIRST[0]),),
    "sharing": ((("together tokens/s", "together tok/s", _plain(0)), _RATES[0], _EACH[0], _REUSED),),
}
_OTHERS = ((*_FIRST, *_EACH), (*_RATES, _REUSED))
# What a target is compared by: the figure, and its short name.
_COMPARED: Mapping[str, Sequence[tuple[str, str]]] = {
    "decode": (("decode tokens/s", "tok/s"),),
    "sharing": (("together tokens/s", "together"), ("output tokens/s", "output")),
    "conversations": (("wall s", "seconds"), ("ttft p50 ms", "TTFT")),
}
_OTHERS_COMPARED = (("output tokens/s", "tok/s"), ("ttft p50 ms", "TTFT"))


def build(run: Run, reference: str, where: Mapping[str, Any], options: Mapping[str, Any]) -> Report:
    """Everything about one run. Ratios are each peer's figure divided by the reference's of the same repeat."""
    return {
        "benchmark": "bench_serving",
        "scenario": options["scenario"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "benchmarks.bench_serving", *sys.argv[1:]],
        "machine": dict(where),
        "options": dict(options),
        "reference": reference,
        "targets": {
            name: {
                **about,
                "peak memory bytes": run.memory[name],
                "agreement": {"compared": run.agreement[name].compared, "equal": run.agreement[name].equal},
                "labels": {
                    label: {
                        "median": medians(figures),
                        "ratio": ratios(figures, run.figures[reference][label]),
                        "repeats": figures,
                    }
                    for label, figures in run.figures[name].items()
                },
            }
            for name, about in run.targets.items()
        },
        "errors": run.errors,
    }


def save(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")


def load(path: Path) -> Report:
    """Read what `save` wrote. Raises ValueError if it is something else."""
    report = json.loads(path.read_text())
    if not isinstance(report, dict) or report.get("benchmark") != "bench_serving":
        raise ValueError(f"{path.name} holds no results of bench_serving")
    return report


def title(report: Report) -> str:
    options = report["options"]
    return f"{options['model']}, {options['dtype']}; {describe(report['machine'])}"


def show(report: Report, console: Console) -> None:
    """The figures of every label, what the targets are, and the errors."""
    for table in [_ttft(report)] if report["scenario"] == "ttft" else _by_label(report):
        console.print(table)
    console.print(_about(report))
    if report["errors"]:
        console.print(f"[bold red]{len(report['errors'])} requests failed:[/]")
        for error in report["errors"][:SHOWN_ERRORS]:
            console.print(f"  {error}", markup=False)


def _ttft(report: Report) -> Table:
    """Cold and warm side by side."""
    reference = report["reference"]
    table = Table(title=f"time to first token, ms: p50, medians of {report['options']['repeats']}")
    for heading in ("prompt", "target", "cold", "warm", "cold / warm", "cached cold, warm"):
        table.add_column(heading, justify="left" if heading == "target" else "right")
    peers = len(report["targets"]) > 1
    if peers:
        table.add_column(f"cold / {reference}", justify="right")
        table.add_column(f"warm / {reference}", justify="right")
    for length in report["options"]["length"]:
        for number, (name, target) in enumerate(report["targets"].items()):
            cold, warm = (target["labels"][Ttft.label(length, state)] for state in ("cold", "warm"))
            times = [entry["median"]["ttft p50 ms"] for entry in (cold, warm)]
            ratio = times[0] / times[1] if all(times) else None
            against = [_cell(entry["ratio"]["ttft p50 ms"], _plain(2)) for entry in (cold, warm)] if peers else []
            table.add_row(
                "" if number else f"{length:,}",
                name,
                *(_cell(time, _plain(1)) for time in times),
                _cell(ratio, _plain(1)),
                ", ".join(_cell(entry["median"]["cached per request"], _plain(0)) for entry in (cold, warm)),
                *against,
            )
        table.add_section()
    return table


def _by_label(report: Report) -> list[Table]:
    """The tables of the scenario: a row for each label and target; comparisons are in the last."""
    scenario, reference = report["scenario"], report["reference"]
    labels = list(report["targets"][reference]["labels"])
    groups = _TABLES.get(scenario, _OTHERS)
    tables: list[Table] = []
    for columns in groups:
        compared = _COMPARED.get(scenario, _OTHERS_COMPARED)
        if len(report["targets"]) == 1 or columns is not groups[-1]:
            compared = ()
        table = Table(title=None if tables else f"{scenario}: medians of {report['options']['repeats']}")
        for heading in (scenario, "target") if len(labels) > 1 else ("target",):
            table.add_column(heading)
        for _, heading, _ in columns:
            table.add_column(heading, justify="right")
        for _, heading in compared:
            table.add_column(f"{heading} / {reference}", justify="right")
        for label in labels:
            for number, (name, target) in enumerate(report["targets"].items()):
                figures, ratio = target["labels"][label]["median"], target["labels"][label]["ratio"]
                first = ["" if number else label] if len(labels) > 1 else []
                cells = [_cell(figures[figure], form) for figure, _, form in columns]
                table.add_row(*first, name, *cells, *(_cell(ratio[figure], _plain(2)) for figure, _ in compared))
            if len(report["targets"]) > 1:
                table.add_section()
        tables.append(table)
    return tables


def _about(report: Report) -> Table:
    table = Table()
    for column in ("target", "server", "peak memory", f"same tokens as {report['reference']}", "generator, cores"):
        table.add_column(column)
    for name, target in report["targets"].items():
        agreement = target["agreement"]
        cores = [figures["median"]["generator cores"] for figures in target["labels"].values()]
        table.add_row(
            name,
            f"{target.get('server')} {target.get('version') or ''}".strip(),
            _cell(target["peak memory bytes"], lambda value: f"{value / 2**20:,.0f} MiB"),
            f"{agreement['equal']} of {agreement['compared']}" if agreement["compared"] else "n/a",
            f"{max(cores):.2f}",
        )
    return table


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "n/a" if value is None else form(value)
