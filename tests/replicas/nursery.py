"""Starts processes of the product in milliseconds: it has imported everything once, and forks.

`python -m tests.replicas.nursery` reads one JSON object per line from its standard input and
answers with the id of the process that it has started:

    {"log": FILE, "command": ["route", "--port", "50051"]}      `prefixcache` with these arguments
    {"log": FILE, "paper": {"blocks": 256}, "options": {...}}   a server of the configuration `options` whose
                                                                engine computes on paper

When its standard input ends, it kills whatever still runs and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import prefixcache.routing.serving  # noqa: F401 - so that a gateway need not
from engine import server
from engine.config import load
from engine.request import Sampled
from engine.scheduler import Step
from prefixcache import cli
from tests.engine.paper import PaperRunner
from tests.engine.serving import BLOCK, PaperEngine

VOCABULARY = 256


class PacedRunner(PaperRunner):
    """Takes so many seconds for every step."""

    def __init__(self, blocks: int, seconds: float) -> None:
        super().__init__(blocks, BLOCK, VOCABULARY)
        self._seconds = seconds

    def run(self, step: Step) -> list[Sampled | None]:
        time.sleep(self._seconds)
        return super().run(step)


def serve_on_paper(
    options: Mapping[str, object], *, blocks: int, max_running: int = 8, step_seconds: float = 0.0
) -> int:
    """Serve until SIGTERM, and return the exit code."""
    engine = PaperEngine(blocks, max_running, runner=PacedRunner(blocks, step_seconds))
    return asyncio.run(server.serve(load({}, **options), engine))


def run(task: Mapping[str, Any]) -> NoReturn:
    """Be the process that a task describes."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, log, log)):
            os.dup2(file, number)
        paper = task.get("paper")
        code = command(task["command"]) if paper is None else serve_on_paper(task["options"], **paper)
    except BaseException:  # noqa: BLE001 - it ends here, and the log says why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(arguments: Sequence[str]) -> int:
    """Run `prefixcache`, and return the exit code."""
    sys.argv = ["prefixcache", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who have ended are gone at once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the tests' to act upon
    children = []
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(json.loads(line))
        children.append(os.pidfd_open(child))
        print(child, flush=True)
    for each in children:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(each, signal.SIGKILL)
    os._exit(0)  # without taking apart all that was imported


if __name__ == "__main__":
    main()
