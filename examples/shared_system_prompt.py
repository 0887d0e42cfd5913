"""A system prompt that many requests share is computed once.

`lookup` says beforehand what a request would find, `started` says what it has found.
"""

from __future__ import annotations

from _server import connect, console, fresh_namespace
from prefixcache import sample
from prefixcache.explain import sentence

QUESTIONS = ["How much is the Korwood sofa?", "Where do I find the Teloda stool?", "When do you close?"]


def main() -> None:
    with connect(__doc__) as client:
        namespace = fresh_namespace()
        for question in QUESTIONS:
            prompt = [{"role": "system", "content": sample.sheet()}, {"role": "user", "content": question}]
            expected = client.lookup(prompt, namespace=namespace)
            answer = client.generate(prompt, max_tokens=32, namespace=namespace)
            usage = answer.usage
            assert usage.cached_tokens == expected.cached_tokens  # nobody else uses this namespace
            console.print(f"[bold]{question}[/] [cyan]{answer.text}[/]")
            console.print(
                f"  {usage.prompt_tokens:,} prompt tokens = [green]{usage.cached_tokens:,} cached[/] + "
                f"[yellow]{usage.computed_tokens:,} prefilled[/], TTFT {(answer.ttft or 0.0) * 1000:,.0f} ms"
            )
            console.print(f"  {sentence(answer)}", style="dim")


if __name__ == "__main__":
    main()
