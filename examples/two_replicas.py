"""Two replicas behind one address: eight agents in two groups, each sent to where its system prompt lies.

With a redis-server at hand the gateway finds the replicas, and what they hold, in Redis.
Without one it is told their addresses, and goes by what it has sent where itself.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from rich import box
from rich.table import Table
from rich.text import Text

from _server import console
from prefixcache import sample
from prefixcache.client import Client
from prefixcache.errors import FailedPrecondition, NotFound, PrefixCacheError, Unavailable
from prefixcache.local import LocalRedis, LocalServer, free_port
from prefixcache.requests import Prompt
from prefixcache.results import Completion

SMALL = ("--model", "embedded", "--cache-memory", "64MiB", "--threads", "1")
START_SECONDS = 20.0
NAMES = ("one", "two")

GROUPS = {
    "counter": "You answer customers at the counter.",
    "storeroom": "You answer those who work in the storeroom.",
}
AGENTS = [
    ("counter", "prices", "How much is the Korwood sofa?"),
    ("storeroom", "shelves", "Where do I find the Teloda stool?"),
    ("counter", "stock", "How many pieces of the Alida bowl are left?"),
    ("storeroom", "deliveries", "When will there be more of the Noroda torch?"),
    ("counter", "offers", "What does the Dalland kettle cost?"),
    ("storeroom", "catalogue", "What is the article number of the Colima clock?"),
    ("counter", "gifts", "What do I pay for the Corland vase?"),
    ("storeroom", "returns", "On which shelf is the Oluna mirror?"),
]


@contextlib.contextmanager
def redis_server() -> Iterator[str | None]:
    """Start a redis-server and yield its URL; None if there is none on this machine."""
    try:
        server = LocalRedis()
    except FailedPrecondition:
        console.print("There is no redis-server here: the gateway is told where the replicas are.", style="dim")
        yield None
        return
    with server:
        yield server.url


@contextlib.contextmanager
def gateway(redis: str | None, addresses: list[str]) -> Iterator[str]:
    """Run `prefixcache route` and yield its address."""
    port = free_port()
    where = ["--redis", redis] if redis else [f"--replica={address}" for address in addresses]
    command = [sys.executable, "-m", "prefixcache", "route", *where, "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(command)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def two_replicas() -> Iterator[Client]:
    """Yield a client of a gateway to two replicas."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        with console.status("Starting two replicas of the embedded model, and a gateway ..."):
            options = [*SMALL, *(("--redis", redis) if redis else ())]
            servers = [LocalServer(*options, "--replica-id", name) for name in NAMES]
            with ThreadPoolExecutor(len(NAMES)) as threads:
                list(threads.map(stack.enter_context, servers))
            address = stack.enter_context(gateway(redis, [server.address for server in servers]))
            for name in NAMES:
                wait_for(name, address)
        yield stack.enter_context(Client(address, token="", tls=False))


def wait_for(name: str, address: str) -> None:
    """Return when the gateway has found a replica."""
    end = time.monotonic() + START_SECONDS
    with Client(address, token="", tls=False, replica=name) as client:
        while True:
            try:
                client.model(timeout=10)
                return
            except (NotFound, Unavailable):
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def conversation(group: str, question: str) -> Prompt:
    """What an agent sends first: what its group shares, then its own."""
    return [
        {"role": "system", "content": f"{GROUPS[group]} {sample.sheet()}"},
        {"role": "user", "content": question},
    ]


def ask_all(client: Client, prompts: list[Prompt]) -> list[Completion]:
    """Let the first of each group ask before the others, who then ask at once."""
    first = [client.generate(prompt, max_tokens=32) for prompt in prompts[: len(GROUPS)]]
    with ThreadPoolExecutor(len(AGENTS)) as threads:
        return first + list(threads.map(lambda prompt: client.generate(prompt, max_tokens=32), prompts[len(GROUPS) :]))


def next_turn(prompt: Prompt, answer: Completion) -> Prompt:
    return [
        *prompt,
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "And what is the shelf?"},
    ]


def table(turns: list[list[Completion]]) -> Table:
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("turn", "group", "agent", "replica"):
        view.add_column(title, style="bold" if title == "agent" else "")
    for title in ("cached", "computed", "TTFT ms"):
        view.add_column(title, justify="right")
    for number, answers in enumerate(turns, 1):
        for (group, name, _), answer in zip(AGENTS, answers, strict=True):
            usage = answer.usage
            view.add_row(
                str(number),
                group,
                name,
                Text(answer.replica or "-", "cyan" if answer.replica == "one" else "magenta"),
                Text(f"{usage.cached_tokens:,}", "green" if usage.cached_tokens > usage.computed_tokens else "dim"),
                Text(f"{usage.computed_tokens:,}", "yellow"),
                f"{(answer.ttft or 0.0) * 1000:,.0f}",
            )
    return view


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started here ends then, too
    try:
        with two_replicas() as client:
            prompts = [conversation(group, question) for group, _, question in AGENTS]
            with console.status("Eight agents ask, twice ..."):
                first = ask_all(client, prompts)
                second = ask_all(client, [next_turn(*pair) for pair in zip(prompts, first, strict=True)])
        console.print(table([first, second]))
    except PrefixCacheError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    same = sum(before.replica == after.replica for before, after in zip(first, second, strict=True))
    usage = [answer.usage for answer in first + second]
    cached, prompt = sum(one.cached_tokens for one in usage), sum(one.prompt_tokens for one in usage)
    console.print(
        f"\n{same} of {len(AGENTS)} agents went on where they had begun. "
        f"{cached / prompt:.0%} of {prompt:,} prompt tokens were not computed.",
        style="bold",
    )


if __name__ == "__main__":
    main()
