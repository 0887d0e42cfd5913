"""A chat sends the whole conversation at every turn, and pays only for what is new in it."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from _server import connect, console, fresh_namespace
from prefixcache import sample

TURNS = [
    "How much is the Korwood sofa?",
    "And on which shelf is it?",
    "What about the Dalland kettle?",
    "How many pieces are left?",
    "When do you close?",
    "Thank you!",
]


def main() -> None:
    with connect(__doc__) as client:
        namespace = fresh_namespace()
        messages = [{"role": "system", "content": sample.sheet()}]
        view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for title in ("turn", "prompt", "cached", "prefilled"):
            view.add_column(title, justify="right")
        view.add_column("question and answer")
        view.add_column("TTFT ms", justify="right")
        computed = sent = 0
        for number, text in enumerate(TURNS, start=1):
            messages.append({"role": "user", "content": text})
            with console.status(f"Turn {number} of {len(TURNS)} ..."):
                answer = client.generate(messages, max_tokens=32, namespace=namespace)
            messages.append({"role": "assistant", "content": answer.text})
            usage = answer.usage
            sent += usage.prompt_tokens
            computed += usage.computed_tokens
            counts = (number, usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens)
            view.add_row(
                *(f"{count:,}" for count in counts),
                Text.assemble(text, "\n", (answer.text.strip(), "cyan")),
                f"{(answer.ttft or 0.0) * 1000:,.0f}",
            )
        console.print(view)
        console.print()
        conclusion = f"{sent:,} prompt tokens were sent in {len(TURNS)} turns, {computed:,} of them computed."
        console.print(conclusion, style="bold")


if __name__ == "__main__":
    main()
