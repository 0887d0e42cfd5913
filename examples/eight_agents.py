"""Eight agents share a long system prompt: the first pays for it, the other seven do not.

Every agent has the same sheet of facts in front and a question of its own behind it,
which can be answered from that sheet only. The first one asks alone; then the other
seven ask at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from _server import connect, console, fresh_namespace
from prefixcache import sample
from prefixcache.client import Client
from prefixcache.results import Completion


@dataclass(frozen=True)
class Agent:
    """Who asks, what, and which fact on the sheet is the answer."""

    name: str
    question: str
    thing: str
    label: str

    @property
    def fact(self) -> str:
        return sample.facts()[self.thing][self.label]


AGENTS = [
    Agent("prices", "How much is the Korwood sofa?", "Korwood sofa", "price"),
    Agent("shelves", "Where do I find the Teloda stool?", "Teloda stool", "shelf"),
    Agent("stock", "How many pieces of the Alida bowl are left?", "Alida bowl", "stock"),
    Agent("deliveries", "When will there be more of the Noroda torch?", "Noroda torch", "next delivery"),
    Agent("catalogue", "What is the article number of the Colima clock?", "Colima clock", "article number"),
    Agent("mornings", "When do you open?", "The desk", "opening time"),
    Agent("switchboard", "How can I call you?", "The desk", "telephone number"),
    Agent("complaints", "Who is in charge here?", "The desk", "head of the desk"),
]


def ask(client: Client, agent: Agent, namespace: str) -> Completion:
    """Send one agent's prompt: what all share comes first, what is its own comes last."""
    messages = [{"role": "system", "content": sample.sheet()}, {"role": "user", "content": agent.question}]
    return client.generate(messages, max_tokens=32, namespace=namespace)


def run(client: Client) -> list[Completion]:
    """Let the first agent ask alone, then the others at once; answers are in the order of AGENTS."""
    namespace = fresh_namespace()
    with console.status("The first agent asks ..."):
        first = ask(client, AGENTS[0], namespace)
    with console.status("The other seven ask at once ..."), ThreadPoolExecutor(len(AGENTS)) as threads:
        others = list(threads.map(lambda agent: ask(client, agent, namespace), AGENTS[1:]))
    return [first, *others]


def is_right(agent: Agent, completion: Completion) -> bool:
    return agent.fact in completion.text


def table(completions: list[Completion]) -> Table:
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    view.add_column("agent", style="bold")
    view.add_column("question and answer")
    view.add_column("")
    for title in ("cached", "prefilled", "TTFT ms"):
        view.add_column(title, justify="right")
    for agent, completion in zip(AGENTS, completions, strict=True):
        usage = completion.usage
        right = is_right(agent, completion)
        view.add_row(
            agent.name,
            Text.assemble(agent.question, "\n", (completion.text.strip(), "cyan")),
            Text("right", "green") if right else Text("wrong", "red"),
            Text(f"{usage.cached_tokens:,}", "green" if usage.cached_tokens else "dim"),
            Text(f"{usage.computed_tokens:,}", "yellow"),
            f"{(completion.ttft or 0.0) * 1000:,.0f}",
        )
    return view


def conclusion(completions: list[Completion]) -> str:
    prompt = sum(completion.usage.prompt_tokens for completion in completions)
    cached = sum(completion.usage.cached_tokens for completion in completions)
    right = sum(map(is_right, AGENTS, completions))
    cold, *warm = [completion.ttft or 0.0 for completion in completions]
    middle = median(warm)
    return (
        f"{right} of {len(AGENTS)} answers are right; {cached / prompt:.0%} of {prompt:,} prompt tokens were not "
        f"computed. First token after {cold * 1000:,.0f} ms alone and cold, {middle * 1000:,.0f} ms warm with seven "
        f"at once (median): {cold / middle:.1f} times as fast."
    )


def main() -> None:
    with connect(__doc__) as client:
        completions = run(client)
        console.print()
        console.print(table(completions))
        console.print()
        console.print(conclusion(completions), style="bold")
    console.print(
        "\nNext:  prefixcache serve            a server that stays\n"
        "       prefixcache chat             ask it about the same sheet; every turn says what it cost\n"
        "       prefixcache stats --watch    see what the cache holds",
        style="dim",
    )


if __name__ == "__main__":
    main()
