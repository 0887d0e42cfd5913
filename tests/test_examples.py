"""Every example, run as a reader of it would, and judged by what it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.serving import ROOT, environment, python, server

EXAMPLES = ROOT / "examples"
NUMBER = r"([\d,]+)"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server() as (address, _):
        yield address


def run(name: str, *arguments: str) -> str:
    """Return what an example writes, on a terminal that is no terminal and 100 columns wide."""
    return python(str(EXAMPLES / name), *arguments, timeout=60, COLUMNS="100")


def counts(pattern: str, output: str) -> list[tuple[int, ...]]:
    """Return the numbers in each line that `pattern` matches."""
    matches = re.finditer(pattern, output, re.MULTILINE)
    return [tuple(int(number.replace(",", "")) for number in match.groups()) for match in matches]


def test_every_example_is_tested_and_listed() -> None:
    """No example is without a test, and the list of examples is complete."""
    here, listed = (EXAMPLES.parent / "tests" / "test_examples.py").read_text(), (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.glob("[a-z]*.py"):
        assert f'run("{example.name}"' in here
        assert example.name in listed


def test_eight_agents() -> None:
    """With a server of its own: all answers are right, seven of eight reuse the sheet, and the server ends cleanly."""
    output = run("eight_agents.py")
    rows = re.findall(r"^(\w+) +(\S.*\S) +(right|wrong) +([\d,]+) +([\d,]+) +[\d,]+ *$", output, re.MULTILINE)
    assert len(rows) == 8
    assert {verdict for _, _, verdict, _, _ in rows} == {"right"}
    counted = [(int(cached.replace(",", "")), int(prefilled.replace(",", ""))) for *_, cached, prefilled in rows]
    assert counted[0][0] == 0
    assert all(cached > 1200 and prefilled < 40 for cached, prefilled in counted[1:])
    prompt, cached = sum(map(sum, counted)), sum(cached for cached, _ in counted)
    assert f"8 of 8 answers are right; {cached / prompt:.0%} of {prompt:,} prompt tokens were not" in " ".join(
        output.split()
    )
    assert "60.75 euros" in output
    assert max(map(len, output.splitlines())) <= 100
    assert "The server has shut down." in output


def test_shared_system_prompt(address: str) -> None:
    """The first question is cold, the others find the sheet."""
    rows = counts(
        rf"{NUMBER} prompt tokens = {NUMBER} cached \+ {NUMBER} prefilled",
        run("shared_system_prompt.py", "--address", address),
    )
    assert rows[0][1] == 0
    assert all(cached > 10 * prefilled for _, cached, prefilled in rows[1:])


def test_multi_turn_chat(address: str) -> None:
    """Every turn finds at least all that the turn before had sent."""
    output = run("multi_turn_chat.py", "--address", address)
    rows = counts(rf"^ *(\d) +{NUMBER} +{NUMBER} +{NUMBER} ", output)
    assert all(fact in output for fact in ("60.75 euros", "W 32", "H 50", "12.", "18:20"))
    assert len(rows) == 6
    for (_, before, _, _), (_, prompt, cached, prefilled) in pairwise(rows):
        assert before <= cached
        assert cached + prefilled == prompt
    ((sent, computed),) = counts(rf"^{NUMBER} prompt tokens were sent .* {NUMBER} of them computed", output)
    assert (sent, computed) == (sum(row[1] for row in rows), sum(row[3] for row in rows))
    assert computed * 3 < sent


def test_stable_content_first(address: str) -> None:
    """What changes costs least at the end: several times fewer tokens are computed for the same content."""
    output = run("stable_content_first.py", "--address", address)
    rows = counts(rf" (\d) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER} *$", output)
    first, last = rows[:4], rows[4:]
    assert len(last) == 4
    assert sum(row[1] for row in first) == sum(row[1] for row in last)
    ((changing, stable),) = counts(
        rf"{NUMBER} tokens computed with what changes first, {NUMBER} with what changes last", output
    )
    assert (changing, stable) == (sum(row[3] for row in first), sum(row[3] for row in last))
    assert stable * 3 < changing


def test_without_a_server_an_example_says_so() -> None:
    """An address where nobody answers is one line, not a traceback."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "shared_system_prompt.py"), "--address", "127.0.0.1:1"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no answer from 127.0.0.1:1")
    assert "Traceback" not in done.stderr


def test_warm_pin_forget(address: str) -> None:
    """The sheet is warm for the first turn, the first turn for the second, and nothing is left at the end."""
    output = run("warm_pin_forget.py", "--address", address)
    ((tokens,),) = counts(rf"^warm +computed: {NUMBER} tokens", output)
    ((pinned,),) = counts(rf"^pin +{NUMBER} tokens stay", output)
    assert 0 <= tokens - pinned < 16
    ((cached, _, kept),) = counts(rf"^first turn +{NUMBER} of {NUMBER} prompt tokens cached; {NUMBER} kept", output)
    assert cached == tokens and kept > tokens
    ((again, prompt),) = counts(rf"^second turn +{NUMBER} of {NUMBER} prompt tokens cached", output)
    assert kept <= again < prompt
    ((ended,), (freed,)) = (*counts(rf"^end +{NUMBER} blocks", output), *counts(rf"^forget +{NUMBER} blocks", output))
    assert 0 < ended < freed
    assert "has been invalidated" in output


def test_two_replicas() -> None:
    """Each group is on one replica, both are used, and everybody's second turn is where the first was."""
    output = run("two_replicas.py")
    rows = re.findall(r"^([12]) +(\w+) +(\w+) +(one|two) +([\d,]+) +([\d,]+) +[\d,]+ *$", output, re.MULTILINE)
    assert len(rows) == 16
    places = {(group, replica) for _, group, _, replica, _, _ in rows}
    assert places in ({("counter", "one"), ("storeroom", "two")}, {("counter", "two"), ("storeroom", "one")})
    assert "8 of 8 agents went on where they had begun." in output
    assert "There is no redis-server here" not in output
