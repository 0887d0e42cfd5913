"""What `benchmarks.bench_routing` found, as a picture: a column for each number of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.serving.plots import COLOURS, MARKERS, STYLE
from prefixcache.routing.policies import DEFAULT


def draw(report: Sequence[dict[str, Any]], path: Path) -> None:
    """Hit rate (of what one pooled cache reaches) and p99 of the time to first token, over the load."""
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, len(report), figsize=(4.2 * len(report) + 1.6, 7), squeeze=False)
        for column, part in enumerate(report):
            above, below = panels[0][column], panels[1][column]
            bound = part["pooled"]["hit_rate"] or 1.0
            loads = list(part["loads"])
            for number, name in enumerate(part["loads"][loads[0]]):
                style: Any = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                style |= {"linewidth": 3, "zorder": 3} if name == DEFAULT else {}
                runs = [part["loads"][load][name] for load in loads]
                above.plot(loads, [100 * run["hit rate"] / bound for run in runs], label=name, **style)
                below.plot(loads, [run["ttft p99 s"] for run in runs], **style)
            above.set(title=f"{part['replicas']} replicas", ylim=(0, 105))
            below.set(yscale="log", xlabel="load, share of saturation")
            below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            below.yaxis.set_major_formatter("{x:g}")
            below.yaxis.set_minor_locator(NullLocator())
        panels[0][0].set_ylabel("cached tokens, % of one pooled cache")
        panels[1][0].set_ylabel("time to first token, p99, s")
        panels[0][-1].legend(fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1))
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
