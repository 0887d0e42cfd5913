"""Eight agents share a long system prompt: the first pays for it, the other seven do not.

Every agent has the same handbook in front and a job and a question of its own behind
it. The first one asks alone; then the other seven ask at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from _server import connect, console, fresh_namespace, handbook
from prefixcache.client import Client
from prefixcache.explain import label
from prefixcache.results import Completion

# Columns of the table without those of the questions.
NARROWEST = 61


@dataclass(frozen=True)
class Agent:
    name: str
    job: str
    question: str


AGENTS = [
    Agent("bookings", "You take bookings.", "A bike for three children on Friday?"),
    Agent("refunds", "You decide on refunds.", "I cancelled at eight. What do I get back?"),
    Agent("roadside", "You send the repair van.", "The motor stopped on a bridge. Who comes?"),
    Agent("claims", "You decide on damage.", "The lamp fell off, and I told you. What now?"),
    Agent("theft", "You handle stolen bikes.", "My Pelican is gone. What do I do first?"),
    Agent("batteries", "You plan the range.", "Can a Heron do 65 km with a spare battery?"),
    Agent("families", "You advise families.", "Which bike takes two children and a dog?"),
    Agent("night desk", "You answer at night.", "I am two hours late. What will it cost?"),
]


def ask(client: Client, agent: Agent, namespace: str) -> Completion:
    """Send one agent's prompt: what all share comes first, what is its own comes last."""
    prompt = f"{handbook()}\n{agent.job}\nQuestion: {agent.question}\nAnswer:"
    return client.generate(prompt, max_tokens=16, namespace=namespace)


def run(client: Client) -> list[Completion]:
    """Let the first agent ask alone, then the others at once; answers are in the order of AGENTS."""
    namespace = fresh_namespace()
    with console.status("The first agent asks ..."):
        first = ask(client, AGENTS[0], namespace)
    with console.status("The other seven ask at once ..."), ThreadPoolExecutor(len(AGENTS)) as threads:
        others = list(threads.map(lambda agent: ask(client, agent, namespace), AGENTS[1:]))
    return [first, *others]


def table(completions: list[Completion]) -> Table:
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    view.add_column("agent", style="bold")
    view.add_column("question")
    for title in ("prompt", "cached", "prefilled"):
        view.add_column(title, justify="right")
    view.add_column("reason")
    view.add_column("TTFT ms", justify="right")
    room = max(console.width - NARROWEST, 10)
    for agent, completion in zip(AGENTS, completions, strict=True):
        usage = completion.usage
        view.add_row(
            agent.name,
            agent.question if len(agent.question) <= room else agent.question[: room - 1].rstrip() + "…",
            f"{usage.prompt_tokens:,}",
            Text(f"{usage.cached_tokens:,}", "green" if usage.cached_tokens else "dim"),
            Text(f"{usage.computed_tokens:,}", "yellow"),
            label(completion.miss_reason or "not said"),
            f"{(completion.ttft or 0.0) * 1000:,.0f}",
        )
    return view


def conclusion(completions: list[Completion]) -> str:
    prompt = sum(completion.usage.prompt_tokens for completion in completions)
    cached = sum(completion.usage.cached_tokens for completion in completions)
    cold, *warm = [completion.ttft or 0.0 for completion in completions]
    middle = median(warm)
    return (
        f"{cached / prompt:.0%} of {prompt:,} prompt tokens were not computed. First token after {cold * 1000:,.0f} ms "
        f"alone and cold, {middle * 1000:,.0f} ms warm with seven at once (median): {cold / middle:.1f} times as fast."
    )


def main() -> None:
    with connect(__doc__) as client:
        model = client.model()
        completions = run(client)
        console.print()
        console.print(table(completions))
        console.print()
        console.print(conclusion(completions), style="bold")
        if model.name == "embedded":
            console.print(
                "The embedded model is untrained: its answers are noise and not shown, the work it saves is real.",
                style="dim",
            )
    console.print(
        "\nNext:  prefixcache serve            a server that stays\n"
        "       prefixcache chat             talk to it; every turn says what it cost\n"
        "       prefixcache stats --watch    see what the cache holds",
        style="dim",
    )


if __name__ == "__main__":
    main()
