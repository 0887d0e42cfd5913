"""Names and values that nobody has met before: what the facts of a sheet consist of.

Everything is put together from parts, so that each part is common and most wholes are
new. A hash keeps a tenth of the wholes out of training: `Source(random)` never says one
of those, `Source(random, held_out=True)` says no others. What has too few values for
that (days of the week, materials) is the same for both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from xxhash import xxh3_64_intdigest

HELD_OUT_OF = 10
"""One value in so many is kept out of training."""


def is_held_out(value: str) -> bool:
    """Return whether a value may appear in examinations only."""
    return xxh3_64_intdigest(value.encode()) % HELD_OUT_OF == 0


def read_toml(name: str) -> dict[str, Any]:
    """Return what a file beside this one says."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


_WORDS: dict[str, list[str]] = {name: words.split() for name, words in read_toml("words.toml").items()}
_LETTERS = "ABCDEFGHKLMNPRSTUVWX"
_DIGITS = [str(digit) for digit in range(10)]
_TWO_DIGITS = [f"{number:02}" for number in range(100)]
_TO_99 = [str(number) for number in range(10, 100)]
_CENTS = [f"{number:02}" for number in range(0, 100, 5)]
_HOURS = [str(hour) for hour in range(6, 23)]
_MINUTES = [f"{minute:02}" for minute in range(60)]
_DAYS_OF_MONTH = [str(day) for day in range(1, 29)]


class Source:
    """A stream of values from a generator of random numbers: equal seeds, equal values.

    Each method draws one value of a kind; desks.toml names them.
    """

    def __init__(self, random: Random, held_out: bool = False) -> None:
        self.random = random
        self.held_out = held_out

    def name(self) -> str:
        """A made-up name, such as Velmora or Tarwick."""
        return self._new("", _WORDS["starts"], _WORDS["ends"])

    def product(self) -> str:
        return f"{self.name()} {self.random.choice(_WORDS['products'])}"

    def person(self) -> str:
        """A first name that is common and a surname that is not."""
        return f"{self.random.choice(_WORDS['first_names'])} {self.name()}"

    def title(self) -> str:
        """The title of a book, such as Copper Garden."""
        return self._new(" ", _WORDS["adjectives"], _WORDS["nouns"])

    def price(self) -> str:
        return self._new(".", _TO_99, _CENTS) + " euros"

    def code(self) -> str:
        """A number that nobody remembers, such as K-4471."""
        return self._new("", _LETTERS, ("-",), _TWO_DIGITS, _TWO_DIGITS)

    def time(self) -> str:
        return self._new(":", _HOURS, _MINUTES)

    def morning(self) -> str:
        return self._new(":", _HOURS[:6], _MINUTES)

    def evening(self) -> str:
        return self._new(":", _HOURS[9:], _MINUTES)

    def date(self) -> str:
        return self._new(" ", _DAYS_OF_MONTH, _WORDS["months"])

    def shelf(self) -> str:
        return self._new(" ", _LETTERS, _TO_99)

    def number(self) -> str:
        """A number of three digits: a room, pages."""
        return self._new("", _TO_99, _DIGITS)

    def extension(self) -> str:
        """A telephone extension of four digits."""
        return self._new("", _TO_99, _TWO_DIGITS)

    def quantity(self) -> str:
        return self.random.choice(_TO_99)

    def material(self) -> str:
        return self.random.choice(_WORDS["materials"])

    def department(self) -> str:
        return self.random.choice(_WORDS["departments"])

    def day(self) -> str:
        return self.random.choice(_WORDS["days"])

    def _new(self, join: str, *parts: Sequence[str]) -> str:
        """Return a combination of one of each of `parts` that is held out, or is not."""
        while True:
            value = join.join(map(self.random.choice, parts))
            if is_held_out(value) == self.held_out:
                return value
