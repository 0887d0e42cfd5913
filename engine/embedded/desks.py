"""The desks whose agents the model plays, as desks.toml describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from engine.embedded.values import Source, read_toml


@dataclass(frozen=True)
class Property:
    """Something that a thing, or a desk, has."""

    label: str
    value: str
    questions: tuple[str, ...]
    about_it: tuple[str, ...] = ()

    def draw(self, source: Source) -> str:
        value: str = getattr(source, self.value)()
        return value


@dataclass(frozen=True)
class Tool:
    """What an agent can call. Its arguments are a thing, one of its properties, and something that the user says."""

    name: str
    description: str
    thing: str
    lookup: str
    """The label of the property, and the argument's name."""
    said: str
    said_value: str
    requests: tuple[str, ...]
    """What users say, with {x} for the thing and {s} for what they give."""

    def draw_said(self, source: Source) -> str:
        value: str = getattr(source, self.said_value)()
        return value

    def specification(self) -> dict[str, Any]:
        """Return the tool as a chat template takes it."""
        arguments = {name: {"type": "string"} for name in (self.thing, self.lookup, self.said)}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {"type": "object", "properties": arguments},
            },
        }


@dataclass(frozen=True)
class Desk:
    """One kind of agent; its things are what most questions are about."""

    name: str
    thing: str
    spoken: str
    """A thing within a sentence."""
    titles: tuple[str, ...]
    rules: tuple[str, ...]
    properties: tuple[Property, ...]
    general: tuple[Property, ...]
    """What the desk itself has."""
    tool: Tool

    @property
    def needed(self) -> Property:
        """What must be looked up for a call."""
        return next(item for item in self.properties if item.label == self.tool.lookup)

    def draw_thing(self, source: Source) -> str:
        thing: str = getattr(source, self.thing)()
        return thing


@dataclass(frozen=True)
class Phrases:
    """What all desks share."""

    question: tuple[str, ...]
    about_it: tuple[str, ...]
    another: tuple[str, ...]
    general: tuple[str, ...]
    openings: tuple[str, ...]
    unknown: str
    small_talk: tuple[tuple[str, str], ...]
    intros: tuple[str, ...]


_FILE = read_toml("desks.toml")
DESKS = TypeAdapter(tuple[Desk, ...]).validate_python(_FILE["desk"])
PHRASES = TypeAdapter(Phrases).validate_python(_FILE["phrases"])
