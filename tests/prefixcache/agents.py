"""Prompts as agents write them: long instructions that are always the same, and something in front that is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

RULES = """\
You are the support agent of Harbour Bikes, a shop that rents bicycles to visitors of the island.
Answer in the language of the guest, in at most five sentences, and never promise a price that is not in the list below.

Prices per day:
- city bike: 12 euros
- mountain bike: 19 euros
- electric bike: 29 euros, deposit 100 euros
- trailer for children: 8 euros

Bikes can be returned until eight in the evening at any of the four stations. Who comes later pays for one more day.
If a guest reports an accident, ask first whether somebody is hurt, and give the number of the nearest station.
Cancellations are free until noon of the day before. After that half of the price is kept.
"""
QUESTIONS = (
    "Do you have a bike for three children?",
    "I cancelled at eight, what do I get back?",
    "The motor stopped on a bridge.",
    "How late is the station open?",
    "Can I take it on the ferry?",
    "What is the deposit?",
    "Is there a discount for groups?",
    "Where do I return it?",
)
NAMES = (
    *("Anna", "Bob", "Carla", "Dieter", "Eva", "Fritz", "Gerd", "Hanna", "Ida", "Jan", "Karl", "Lena"),
    *("Max", "Nora", "Otto", "Paul", "Rosa", "Sven", "Tom", "Uta", "Vera", "Willi", "Xenia", "Yara"),
)
COUNT = len(NAMES)

Front = Callable[[int, random.Random], str]
"""What the n-th prompt says first."""


def moment(number: int) -> datetime:
    return datetime(2024, 11, 22, 10, 15, 3) + timedelta(seconds=37 * number)


def day(number: int) -> datetime:
    return datetime(2024, 11, 22) + timedelta(days=number)


def hexadecimal(source: random.Random, digits: int) -> str:
    return "".join(source.choices("0123456789abcdef", k=digits))


def shuffled(source: random.Random, items: list[Any]) -> list[Any]:
    return source.sample(items, len(items))


def texts(front: Front) -> list[str]:
    """Prompts for a completion: what `front` says, the rules, a question."""
    source = random.Random(4)
    return [
        f"{front(number, source)}{RULES}\nGuest: {QUESTIONS[number % len(QUESTIONS)]} ({number})\nAnswer:"
        for number in range(COUNT)
    ]


def chats(front: Front) -> list[dict[str, Any]]:
    """Conversations of one to three turns whose system message begins with what `front` says."""
    source = random.Random(5)
    prompts = []
    for number in range(COUNT):
        messages = [{"role": "system", "content": front(number, source) + RULES}]
        for turn in range(number % 3):
            messages.append({"role": "user", "content": QUESTIONS[(number + turn) % len(QUESTIONS)]})
            messages.append({"role": "assistant", "content": "Yes, we have that for you."})
        messages.append({"role": "user", "content": QUESTIONS[number % len(QUESTIONS)] + f" It is number {number}."})
        prompts.append({"messages": messages})
    return prompts


def clock(number: int, source: random.Random) -> str:
    return f"Current time: {moment(number).isoformat()}Z\n\n"


def profile(number: int, source: random.Random) -> str:
    """A guest's data as JSON whose keys come from a set: another order in every process."""
    items = {"name": NAMES[number], "language": "en", "plan": "premium", "station": "north"}
    return f"Guest profile: {json.dumps(dict(shuffled(source, list(items.items()))))}\n"


def identifier(source: random.Random) -> UUID:
    return UUID(int=source.getrandbits(128), version=4)


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"what": {"type": "string", "description": f"what to {name}"}}}
    function = {"name": name, "description": f"Tool to {name} things in the shop, with care.", "parameters": parameters}
    return {"type": "function", "function": function}


def with_tools() -> list[dict[str, Any]]:
    """Conversations with the same tools in an order that changes."""
    source = random.Random(6)
    tools = [tool(name) for name in ("search", "book", "cancel", "repair")]
    return [
        {
            "messages": [{"role": "system", "content": RULES}, {"role": "user", "content": question}],
            "tools": shuffled(source, tools),
        }
        for question in QUESTIONS * 3
    ]
