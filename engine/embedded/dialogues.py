"""Sheets of facts and conversations about them: what the model is trained on and examined with.

A system prompt holds a desk's sheet; what the assistant answers stands on it, or it says
that it does not. Equal seeds give equal dialogues; nothing here knows tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.embedded.desks import DESKS, PHRASES, Desk, Property
from engine.embedded.values import Source

LAYOUTS = {"list": 5, "sentences": 3, "table": 2}
"""How a sheet may be written, and how often it is."""
DESK = "the desk"
"""What the desk itself is called on a sheet and in answers."""
KINDS = {
    "lookup": 44,
    "property": 12,  # another property of the thing of the turn before
    "thing": 12,  # the same property of another thing
    "general": 7,
    "unknown thing": 8,
    "unknown property": 5,
    "tool": 18,
    "small talk": 3,
}
"""What a turn may be about, and how often it is."""
CALLS = 60
"""How often a turn is a call where calls are practised."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which is the last of the messages."""

    kind: str
    messages: tuple[dict[str, str], ...]
    thing: str = ""
    """The thing on the sheet that must be found."""

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Sheet:
    """What a desk knows, as values and as the text of a system prompt."""

    desk: Desk
    layout: str
    properties: tuple[Property, ...]
    things: dict[str, dict[str, str]]
    """Values by thing and label."""
    general: dict[str, str]
    """Values by label."""
    tools: tuple[dict[str, Any], ...]
    text: str

    def spoken(self, thing: str) -> str:
        return self.desk.spoken.format(x=thing)


def draw_sheet(
    source: Source, characters: int, desk: Desk | None = None, layout: str | None = None, calls: bool = False
) -> Sheet:
    """Return a sheet with as many things as a text of `characters` has room for, two at least.

    With `calls` there is a tool for certain.
    """
    choose = source.random
    desk = desk or choose.choice(DESKS)
    layout = layout or choose.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    properties = tuple(choose.sample(desk.properties, choose.randint(2, len(desk.properties))))
    has_tool = choose.random() < 0.4 or calls
    if has_tool and desk.needed not in properties:
        properties = (*properties[:-1], desk.needed)
    general = {item.label: item.draw(source) for item in desk.general if choose.random() < 0.7}
    beginning, ending = _beginning(source, desk), _ending(layout, general)
    things: dict[str, dict[str, str]] = {}
    rows: list[str] = []
    length = len(beginning) + len(ending)
    while length < characters or len(things) < 2:
        thing = desk.draw_thing(source)
        if thing not in things:
            things[thing] = {item.label: item.draw(source) for item in properties}
            rows.append(_row(desk, layout, thing, things[thing]))
            length += len(rows[-1])
    tools = (desk.tool.specification(),) if has_tool else ()
    return Sheet(desk, layout, properties, things, general, tools, beginning + "\n".join(rows) + ending)


def _beginning(source: Source, desk: Desk) -> str:
    intro = source.random.choice(PHRASES.intros).format(desk=desk.name, place=source.name())
    rules = source.random.sample(desk.rules, source.random.randint(0, len(desk.rules)))
    return " ".join([intro, *rules]) + f"\n\n{source.random.choice(desk.titles)}:\n"


def _row(desk: Desk, layout: str, thing: str, values: dict[str, str]) -> str:
    if layout == "table":
        return f"| {thing} | {_facts(values, ' | ')} |"
    if layout == "list":
        return f"- {thing}: {_facts(values)}"
    return _sentence(desk.spoken.format(x=thing), values)


def _facts(values: dict[str, str], separator: str = "; ") -> str:
    return separator.join(f"{label} {value}" for label, value in values.items())


def _sentence(subject: str, values: dict[str, str]) -> str:
    *facts, last = (f"the {label} {value}" for label, value in values.items())
    return _capital(f"{subject} has {', '.join(facts)} and {last}." if facts else f"{subject} has {last}.")


def _ending(layout: str, general: dict[str, str]) -> str:
    if not general:
        return ""
    return "\n\n" + (_sentence(DESK, general) if layout == "sentences" else f"{_capital(DESK)}: {_facts(general)}")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


class Conversation:
    """Draws turns about a sheet, each of which may go on from the one before."""

    def __init__(self, source: Source, sheet: Sheet, calls: bool = False) -> None:
        """With `calls` every third turn or so is one."""
        self._source = source
        self._weights = [CALLS if calls and kind == "tool" else weight for kind, weight in KINDS.items()]
        self._choose = source.random
        self._sheet = sheet
        self._before: tuple[str, Property] | None = None
        """What the turn before was about, if one can go on from it."""
        self._result: Turn | None = None
        """What follows a call."""
        self._draw: dict[str, Callable[[], Turn]] = {
            "lookup": self._lookup,
            "property": self._another_property,
            "thing": self._another_thing,
            "general": self._general,
            "unknown thing": self._unknown_thing,
            "unknown property": self._unknown_property,
            "tool": self._call,
            "small talk": self._small_talk,
        }

    def turn(self) -> Turn:
        if self._result is not None:
            result, self._result = self._result, None
            return result
        kind = self._choose.choices(list(KINDS), self._weights)[0]
        if (
            (kind in ("property", "thing") and self._before is None)
            or (kind == "tool" and not self._sheet.tools)
            or (kind == "unknown property" and len(self._sheet.properties) == len(self._sheet.desk.properties))
        ):
            kind = "lookup"
        turn = self._draw[kind]()
        if kind not in ("lookup", "property", "thing", "small talk"):
            self._before = None
        return turn

    def turns(self, count: int) -> list[Turn]:
        return [self.turn() for _ in range(count)]

    def _lookup(self) -> Turn:
        thing = self._choose.choice(list(self._sheet.things))
        return self._about(thing, self._choose.choice(self._sheet.properties), "lookup")

    def _unknown_thing(self) -> Turn:
        while (thing := self._sheet.desk.draw_thing(self._source)) in self._sheet.things:
            pass
        return self._about(thing, self._choose.choice(self._sheet.properties), "unknown thing")

    def _unknown_property(self) -> Turn:
        missing = [item for item in self._sheet.desk.properties if item not in self._sheet.properties]
        thing = self._choose.choice(list(self._sheet.things))
        return self._about(thing, self._choose.choice(missing), "unknown property")

    def _about(self, thing: str, item: Property, kind: str) -> Turn:
        own = self._choose.random() < 0.6
        question = self._choose.choice(item.questions if own else PHRASES.question)
        return self._answered(question, thing, item, kind)

    def _another_property(self) -> Turn:
        assert self._before is not None
        thing, before = self._before
        item = self._choose.choice([other for other in self._sheet.properties if other is not before])
        return self._answered(self._choose.choice((*PHRASES.about_it, *item.about_it)), thing, item, "property")

    def _another_thing(self) -> Turn:
        assert self._before is not None
        before, item = self._before
        thing = self._choose.choice([other for other in self._sheet.things if other != before])
        return self._answered(self._choose.choice(PHRASES.another), thing, item, "thing")

    def _answered(self, question: str, thing: str, item: Property, kind: str) -> Turn:
        self._before = thing, item
        spoken = self._sheet.spoken(thing)
        value = self._sheet.things.get(thing, {}).get(item.label, PHRASES.unknown)
        asked = self._typed(question.format(x=spoken, label=item.label), thing)
        return _turn(kind, asked, _answer(spoken, item, value), thing)

    def _general(self) -> Turn:
        item = self._choose.choice(self._sheet.desk.general)
        question = self._choose.choice((*PHRASES.general, *item.questions)).format(label=item.label)
        value = self._sheet.general.get(item.label, PHRASES.unknown)
        return _turn("general", self._typed(question), _answer(DESK, item, value))

    def _small_talk(self) -> Turn:
        return _turn("small talk", *self._choose.choice(PHRASES.small_talk))

    def _call(self) -> Turn:
        """The user wants something done: the agent says what it looks up for that, and calls. The result comes next."""
        tool = self._sheet.desk.tool
        thing = self._choose.choice(list(self._sheet.things))
        said = tool.draw_said(self._source)
        spoken, value = self._sheet.spoken(thing), self._sheet.things[thing][tool.lookup]
        request = self._choose.choice(tool.requests).format(x=spoken, s=said)
        call = {"name": tool.name, "arguments": {tool.thing: thing, tool.lookup: value, tool.said: said}}
        number = self._source.code()
        self._result = Turn(
            "tool result",
            (
                {"role": "tool", "content": json.dumps({"done": True, "number": number})},
                {"role": "assistant", "content": f"Done. The number is {number}."},
            ),
        )
        answer = f"{_answer(spoken, self._sheet.desk.needed, value)}\n{json.dumps(call)}"
        return _turn("tool", self._opened(request, thing, said), answer, thing)

    def _typed(self, question: str, thing: str = "") -> str:
        """Return a question as people write it: with an opening, or carelessly."""
        if self._choose.random() < 0.1:
            return question.lower().rstrip("?.")
        return self._opened(question, thing)

    def _opened(self, question: str, *names: str) -> str:
        """Return a question behind an opening; what it begins with stays as it is if it is a name."""
        opening = self._choose.choice(PHRASES.openings)
        if not opening.endswith((", ", ": ")):
            return opening + _capital(question)
        keeps = question.startswith(("I ", *filter(None, names)))
        return opening + (question if keeps else question[0].lower() + question[1:])


def _answer(spoken: str, item: Property, value: str) -> str:
    """Return an answer: it says first which fact it is, and has to find only then what it is."""
    return f"For {spoken}: {item.label} {value}."


def _turn(kind: str, question: str, answer: str, thing: str = "") -> Turn:
    return Turn(kind, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), thing)


def messages_of(sheet: Sheet, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return a whole conversation, as a chat template takes it."""
    return [{"role": "system", "content": sheet.text}, *(message for turn in turns for message in turn.messages)]
