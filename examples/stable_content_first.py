"""The same content in two orders: what changes first, or what changes last.

A cached prefix ends at the first token that differs. A date or a name at the top of a
prompt makes everything behind it new; at the end it costs only itself.
"""

from __future__ import annotations

from rich import box
from rich.table import Table

from _server import connect, console, fresh_namespace
from prefixcache import sample
from prefixcache.client import Client
from prefixcache.results import Completion

CALLERS = ["09:14, caller 5513", "09:15, caller 2087", "09:17, caller 7740", "09:21, caller 3962"]
QUESTION = "What does the Korwood sofa cost?"


def changing_first(caller: str) -> str:
    return f"Now: {caller}\n\n{sample.sheet()}\n{QUESTION}\n"


def stable_first(caller: str) -> str:
    return f"{sample.sheet()}\n{QUESTION}\n\nNow: {caller}\n"


def ask(client: Client, prompts: list[str]) -> list[Completion]:
    namespace = fresh_namespace()
    return [client.generate(prompt, max_tokens=4, namespace=namespace) for prompt in prompts]


def main() -> None:
    orders = {"what changes first": changing_first, "what changes last": stable_first}
    with connect(__doc__) as client:
        view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        view.add_column("order", style="bold")
        for title in ("request", "prompt", "cached", "prefilled", "TTFT ms"):
            view.add_column(title, justify="right")
        totals = []
        for name, order in orders.items():
            with console.status(f"{name} ..."):
                answers = ask(client, [order(caller) for caller in CALLERS])
            for number, answer in enumerate(answers, start=1):
                usage = answer.usage
                counts = (number, usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens)
                ttft = f"{(answer.ttft or 0.0) * 1000:,.0f}"
                view.add_row(name if number == 1 else "", *(f"{count:,}" for count in counts), ttft)
            view.add_section()
            totals.append(sum(answer.usage.computed_tokens for answer in answers))
        console.print(view)
        console.print()
        console.print(
            f"The same content: {totals[0]:,} tokens computed with what changes first, "
            f"{totals[1]:,} with what changes last.",
            style="bold",
        )


if __name__ == "__main__":
    main()
