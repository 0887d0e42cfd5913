"""Figures as pictures. A panel shows one run: what was measured in different runs is never drawn into one panel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.serving.measure import Figures
from benchmarks.serving.report import Report, title
from benchmarks.serving.traffic import Ttft

# Okabe and Ito's colours, which stay apart for colour-blind readers, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "legend.frameon": False,
    "svg.hashsalt": "bench_serving",
}


def draw(reports: Sequence[Report], path: Path) -> None:
    """One panel per report, side by side. Raises ValueError if one of them has no plot."""
    for report in reports:
        check(report)
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(reports), figsize=(9 * len(reports), 5), squeeze=False)
        for panel, report in zip(panels[0], reports, strict=True):
            _PANELS[report["scenario"]](panel, report)
            panel.set_title(title(report), fontsize=9, color="#555555")
            panel.legend(fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1))
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def check(report: Report) -> None:
    """Raise ValueError if there is nothing to draw in a report."""
    scenario = report["scenario"]
    if scenario not in _PANELS:
        raise ValueError(f"there is no plot of {scenario!r}; there are: {', '.join(_PANELS)}")
    if scenario == "agents" and not report["options"]["rate"]:
        raise ValueError("the plot of 'agents' is over rates: give --rate, several times")


def _targets(report: Report) -> Iterator[tuple[str, dict[str, Any], dict[str, Figures]]]:
    """For each target: its name, how it is drawn, and the medians by label."""
    for number, (name, target) in enumerate(report["targets"].items()):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 6}
        yield name, style, {label: entry["median"] for label, entry in target["labels"].items()}


def _line(panel: Axes, points: Iterable[tuple[float, float | None]], **style: Any) -> None:
    """A line through what there is."""
    known = [(x, y) for x, y in points if y is not None]
    panel.plot([x for x, _ in known], [y for _, y in known], **style)


def _logarithmic(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Plain numbers at `ticks`, or at 1, 2 and 5 times the powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ticks is None else FixedLocator(list(ticks)))


def _ttft(panel: Axes, report: Report) -> None:
    lengths = report["options"]["length"]
    for name, style, labels in _targets(report):
        for state, look in (("cold", {"linestyle": "--", "markerfacecolor": "white"}), ("warm", {"linestyle": "-"})):
            points = [(length, labels[Ttft.label(length, state)]["ttft p50 ms"]) for length in lengths]
            _line(panel, points, label=f"{name}, {state}", **style, **look)
    panel.set(xscale="log", yscale="log", ylabel="time to first token, ms")
    panel.set_xlabel(f"prompt, tokens (warm: all but the last {report['options']['suffix']} are cached)")
    _logarithmic(panel.xaxis, lengths)
    _logarithmic(panel.yaxis)


def _sharing(panel: Axes, report: Report) -> None:
    for name, style, labels in _targets(report):
        together = [(int(number), figures["together tokens/s"]) for number, figures in labels.items()]
        _line(panel, together, label=name, **style)
        # Where they never all decoded at once: what came out over the whole phase.
        apart = [
            (int(number), figures["output tokens/s"])
            for number, figures in labels.items()
            if figures["together tokens/s"] is None
        ]
        if apart:
            look = {"linestyle": "none", "markerfacecolor": "white", "label": f"{name}, not all at once"}
            _line(panel, apart, **style, **look)
    numbers = [int(number) for number in next(_targets(report))[2]]
    panel.set(xscale="log", yscale="log", ylabel="output tokens/s")
    panel.set_xlabel(f"requests that share a cached prefix of {report['options']['shared']:,} tokens")
    _logarithmic(panel.xaxis, numbers)
    _logarithmic(panel.yaxis)


def _agents(panel: Axes, report: Report) -> None:
    rates = report["options"]["rate"]
    for name, style, labels in _targets(report):
        for percent, look in ((50, {"linestyle": "-"}), (99, {"linestyle": ":", "markerfacecolor": "white"})):
            points = [(rate, labels[f"{rate:g}/s"][f"ttft p{percent} ms"]) for rate in rates]
            _line(panel, points, label=f"{name}, p{percent}", **style, **look)
    panel.set(yscale="log", xlabel="requests per second", ylabel="time to first token, ms", xticks=rates)
    _logarithmic(panel.yaxis)


_PANELS = {"ttft": _ttft, "sharing": _sharing, "agents": _agents}
