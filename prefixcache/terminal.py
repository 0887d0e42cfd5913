"""What is written to a terminal: consoles, text made safe for it, and the view of the statistics.

Colours follow the terminal, NO_COLOR and FORCE_COLOR; without a terminal everything is
plain. Words carry the meaning, colour only repeats it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from prefixcache.explain import label

if TYPE_CHECKING:  # only for its types: the results come with protobuf, which takes time to import
    from prefixcache.results import BlockStats, HintStats, Stats

BAR_CELLS = 40
RATE_SECONDS = 10.0

# What could move the cursor, change colours or do worse: all control characters but newline and tab.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def safe(text: str) -> str:
    """Return text with its control characters, but for newlines and tabs, replaced."""
    return text.translate(_CONTROLS)


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def write(pieces: Iterable[str]) -> None:
    """Write output as it comes, to a terminal without control characters; end the line, also when it ends early."""
    written = False
    try:
        for piece in pieces:
            sys.stdout.write(safe(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
            written = True
    finally:
        if written:
            sys.stdout.write("\n")
            sys.stdout.flush()


def note(text: str, style: str = "dim") -> None:
    """Write a line about the output to stderr, so that stdout holds nothing but the output."""
    sys.stdout.flush()
    console(stderr=True).print(Text(text, style), soft_wrap=True)


def error(text: str) -> None:
    """Write an error as one line."""
    line = Text("error: ", "bold red").append(" ".join(text.split()), "red")
    console(stderr=True).print(line, soft_wrap=True)


def percent(part: float, whole: float) -> str:
    """Return "83%", or "-" of nothing. Never rounds up to 100% or down to 0%."""
    if whole <= 0:
        return "-"
    share = 100 * part / whole
    if 0 < share < 1:
        return "<1%"
    return f"{min(share, 99) if part < whole else share:.0f}%"


def size(count: float) -> str:
    """Return bytes as "512 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second, over the last `RATE_SECONDS`."""

    computed: float
    generated: float
    requests: float
    hit_rate: float | None


class RateMeter:
    """Turns the counters of successive snapshots into rates."""

    def __init__(self) -> None:
        self._snapshots: deque[Stats] = deque()

    def add(self, stats: Stats) -> Rates | None:
        """Take a snapshot; return the rates once there are two of the same server process."""
        if self._snapshots and stats.uptime < self._snapshots[-1].uptime:
            self._snapshots.clear()  # it was restarted
        self._snapshots.append(stats)
        while stats.uptime - self._snapshots[0].uptime > RATE_SECONDS and len(self._snapshots) > 2:
            self._snapshots.popleft()
        first = self._snapshots[0]
        seconds = stats.uptime - first.uptime
        if seconds <= 0:
            return None
        prompt = stats.tokens.prompt - first.tokens.prompt
        recomputed = stats.tokens.recomputed - first.tokens.recomputed
        return Rates(
            computed=(stats.tokens.computed - first.tokens.computed + recomputed) / seconds,
            generated=(stats.tokens.generated - first.tokens.generated) / seconds,
            requests=(stats.requests.admitted - first.requests.admitted) / seconds,
            hit_rate=(stats.tokens.cached - first.tokens.cached) / prompt if prompt else None,
        )


def stats_view(stats: Stats, rates: Rates | None = None) -> RenderableType:
    """Return sizes and counters, and rates if they are known, as a few lines of at most 80 columns."""
    blocks, requests, tokens = stats.blocks, stats.requests, stats.tokens
    view = Table.grid(padding=(0, 2))
    view.add_column(style="bold", no_wrap=True)
    view.add_column(overflow="fold")
    view.add_row("blocks", _pool(blocks))
    view.add_row(
        "",
        f"{blocks.total:,} of {blocks.block_size} tokens = {blocks.total * blocks.block_size:,} tokens, "
        f"{size(blocks.total * blocks.bytes_per_block)}; {_removed(blocks)} so far",
    )
    view.add_row(
        "requests",
        f"{requests.waiting:,} waiting, {requests.running:,} running; "
        f"{requests.finished:,} finished, {requests.aborted:,} aborted, {requests.preempted:,} preempted",
    )
    share = Text(percent(tokens.cached, tokens.prompt), "green")
    prompt = Text(f"{tokens.prompt:,} prompt = {tokens.cached:,} cached (").append_text(share)
    view.add_row("tokens", prompt.append(f") + {tokens.computed:,} computed"))
    again = f"; {tokens.recomputed:,} recomputed after preemption" if tokens.recomputed else ""
    ahead = f"; {tokens.warmed:,} of {requests.warmed:,} prompts computed ahead of time" if requests.warmed else ""
    view.add_row("", f"{tokens.generated:,} generated{again}{ahead}")
    if rates is not None:
        recent = "no new prompts" if rates.hit_rate is None else f"{percent(rates.hit_rate, 1)} cached"
        view.add_row(
            "per second",
            f"{rates.computed:,.0f} tokens computed, {rates.generated:,.0f} generated, "
            f"{rates.requests:,.1f} requests ({recent})",
        )
    view.add_row("why not more", _reasons(stats))
    if stats.hints is not None:
        view.add_row("hints", _hints(stats.hints))
    return view


def _pool(blocks: BlockStats) -> Text:
    """Return the block pool as a bar and its legend; the cells differ in shape as well as in colour."""
    bar, legend, filled = Text(), [], 0
    for name, count, cell, style in (
        ("leased", blocks.leased, "█", "cyan"),
        ("pinned", blocks.pinned, "▒", "magenta"),
        ("cached", blocks.cached, "▓", "green"),
        ("free", blocks.free, "░", "dim"),
    ):
        # What is not empty shows at least one cell; the rest of the bar is free.
        share = max(round(BAR_CELLS * count / max(blocks.total, 1)), 1) if count else 0
        cells = BAR_CELLS - filled if name == "free" else min(share, BAR_CELLS - filled)
        filled += cells
        bar.append(cell * cells, style)
        if count or name != "pinned":
            legend.append(Text.assemble((cell, style), f" {count:,} {name}"))
    return Text.assemble(bar, "\n", Text("  ").join(legend))


def _hints(hints: HintStats) -> str:
    again = f", published anew {hints.republished:,} times" if hints.republished else ""
    state = f"failing: {hints.error}" if hints.error else "current" if hints.current else "catching up"
    return safe(f"{hints.blocks:,} blocks known to others as {hints.replica_id}{again}; {state}")


def _removed(blocks: BlockStats) -> str:
    parts = [f"{blocks.evicted:,} evicted"]
    parts += [
        f"{count:,} {name}"
        for count, name in ((blocks.expired, "expired"), (blocks.invalidated, "invalidated"))
        if count
    ]
    return ", ".join(parts)


def _reasons(stats: Stats) -> Text:
    ordered = sorted(stats.miss_reasons.items(), key=lambda entry: -entry[1])
    named = [f"{'all cached' if name == 'none' else label(name)} {count:,}" for name, count in ordered if count]
    return Text(", ".join(named) or "no requests yet")
