"""A prompt that is warm before anybody asks, kept while a tool runs, and forgotten on request."""

from __future__ import annotations

from _server import connect, console, fresh_namespace
from prefixcache import sample
from prefixcache.explain import sentence


def main() -> None:
    with connect(__doc__) as client:
        namespace = fresh_namespace()
        system = sample.sheet()

        with client.warm([system], namespace=namespace) as warming:
            for warmed in warming:
                console.print(f"[bold]warm[/]        {warmed.state}: {warmed.prompt_tokens:,} tokens")
        pinned = client.pin(system, "sheet", namespace=namespace, ttl=3600)
        console.print(f"[bold]pin[/]         {pinned.pinned_tokens:,} tokens stay, whatever others need")

        turn = f"{system}\nCustomer: Where is my bike?\nAgent calls the tracker"
        answer = client.generate(turn, max_tokens=8, namespace=namespace, session_id="case-17", keep_for=60)
        usage = answer.usage
        console.print(
            f"[bold]first turn[/]  {usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens cached; "
            f"{answer.kept_tokens:,} kept while the tool runs"
        )
        turn += f"{answer.text}\nTracker: in the Mill Lane workshop.\nAgent:"
        usage = client.generate(turn, max_tokens=8, namespace=namespace, session_id="case-17").usage
        console.print(f"[bold]second turn[/] {usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens cached")
        blocks = client.end_session("case-17", namespace=namespace)
        console.print(f"[bold]end[/]         {blocks} blocks of this case go first from now on")

        client.unpin("sheet", namespace=namespace)
        done = client.invalidate(system[:100], namespace=namespace)
        console.print(f"[bold]forget[/]      {done.freed_blocks} blocks are free")
        console.print(f"            {sentence(client.lookup(system, namespace=namespace))}", style="dim")


if __name__ == "__main__":
    main()
