"""`prefixcache why` and `prefixcache events`, as a person or a script uses them, against a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixcache.cli_why import CACHED_SHOWN, REST_SHOWN
from prefixcache.client import Client
from prefixcache.explain import advice, place_in, sentence, varying_at
from prefixcache.reasons import MissReason
from prefixcache.results import Lookup
from tests.engine.serving import PaperEngine, RunningServer
from tests.prefixcache.test_cli import on_terminal, run, words

RULES = "You are the harbour's assistant.\nBoats that come at night wait at the outer wall.\n"
MARK = "── ▲ cached   ▼ not cached: "


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with RunningServer(PaperEngine(blocks=1024)) as server:
        yield server.address


def cache(address: str, prompt: str, namespace: str) -> None:
    with Client(address) as client:
        client.generate(prompt, max_tokens=1, namespace=namespace)


def why(address: str, prompt: str, namespace: str, *arguments: str) -> str:
    result = run("why", "-", "--namespace", namespace, "--address", address, *arguments, stdin=prompt)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


# why


def test_why_marks_the_place_and_says_the_reason(address: str, tmp_path: Path) -> None:
    """The prompt is cut in two at the place; then come the counts, the reason, what stands there and what to do."""
    cache(address, RULES + "It is 09:15 now. Which berth is free?", "marks")
    file = tmp_path / "prompt.txt"
    file.write_text(RULES + "It is 09:47 now. Which berth is free?")
    result = run("why", str(file), "--namespace", "marks", "--address", address)
    same, total = len(RULES + "It is 09:") + 1, len(RULES + "It is 09:15 now. Which berth is free?") + 1
    assert result.exit_code == 0
    assert result.stdout == (
        f"{RULES}It is 09:\n"
        + f"{MARK}line 3, column 10 (token {same}) ".ljust(80, "─")
        + "\n47 now. Which berth is free?\n\n"
        f"{same} of {total} prompt tokens are cached (77%).\n"
        f"A cached prompt of {total} tokens is the same up to token {same} and goes on differently.\n"
        "What stands there tends to change: 09:47 (clock time)\n"
        "What to do: move the clock time, and whatever else changes, behind everything that stays the same.\n"
    )


def test_why_of_a_fully_cached_prompt(address: str) -> None:
    """There is no place to mark, and nothing to do."""
    cache(address, RULES, "whole")
    output = why(address, RULES, "whole")
    assert output.startswith(RULES + f"\n{len(RULES)} of {len(RULES) + 1} prompt tokens are cached (99%).\n")
    assert "▼" not in output
    assert output.endswith("which is always computed.\nWhat to do: nothing.\n")


def test_why_of_a_prompt_that_nobody_sent(address: str) -> None:
    """The mark is in front of the text, without a part above it."""
    output = why(address, RULES, "nobody")
    assert output.startswith("── ▼ not cached: line 1, column 1 (token 0) ──")
    assert f"0 of {len(RULES) + 1} prompt tokens are cached (0%).\nNothing that begins like this" in output
    assert "`prefixcache warm` does that ahead of time" in output


def test_why_of_messages(address: str, tmp_path: Path) -> None:
    """Messages come from a JSON file, with tools or alone, and are shown as the model's template renders them."""
    messages = [{"role": "system", "content": RULES}, {"role": "user", "content": "Bonjour, 世界 🙂"}]
    tools = [{"name": "tide", "parameters": {"port": "text"}}]
    with Client(address) as client:
        client.generate(messages, tools=tools, max_tokens=1, namespace="messages")
    messages[1]["content"] = "Bonjour, 世界 🙃"
    file = tmp_path / "chat.json"
    options = ("--messages", str(file), "--namespace", "messages", "--address", address)
    file.write_text(json.dumps({"model": "any", "messages": messages, "tools": tools}, indent=2))
    with_tools = run("why", *options)
    before, _, behind = with_tools.stdout.partition(f"\n{MARK}line 4, column 28 ")
    assert before.endswith("<|end|><|user|>Bonjour, 世界 ")
    assert behind.splitlines()[1] == "🙃<|end|><|assistant|>"
    file.write_text(json.dumps(messages))
    assert '"tide"' not in run("why", *options).stdout
    piped = run("why", "--messages", "-", *options[2:], stdin=json.dumps([*b"ids"]))
    assert "\nids\n" in piped.stdout


def test_why_shortens_long_prompts_in_the_middle(address: str) -> None:
    """Of what is cached and what is not, beginning and end are shown, with how much is between; --full shows all."""
    rules = "".join(f"Rule {number} is {'long ' * (number % 4)}.\n" for number in range(60))
    cache(address, rules, "long")
    prompt = rules + "".join(f"{number}. question\n" for number in range(50))
    output = why(address, prompt, "long")
    kept = [line for line in output.rpartition("\n\n")[0].splitlines() if not line.startswith("[...")]
    left_out = [int(count.replace(",", "")) for count in re.findall(r"\[\.\.\. ([\d,]+) characters", output)]
    shown = "".join(line + "\n" for line in kept if not line.startswith("──"))
    assert len(left_out) == 2
    assert len(shown) + sum(left_out) == len(prompt)
    assert len(kept) == sum(part.lines for part in (*CACHED_SHOWN, *REST_SHOWN)) + 1
    assert output.startswith("Rule 0 is .\nRule 1 is long .\n")
    assert f"Rule 59 is {'long ' * 3}.\n{MARK}line 61, column 1 " in output
    full = why(address, prompt, "long", "--full")
    assert full.startswith(rules + MARK)
    assert "characters are left out" not in full


def test_why_shortens_a_line_without_end(address: str) -> None:
    """A prompt on one line is shortened within it."""
    cache(address, "x" * 1800, "line")
    output = why(address, "x" * 1700 + "yy", "line")
    head, tail = CACHED_SHOWN
    left_out = 1700 - head.characters - tail.characters
    assert output.startswith(
        f"{'x' * head.characters}\n[... {left_out} characters are left out here; --full shows them ...]\n"
        f"{'x' * tail.characters}\n{MARK}line 1, column 1,701 (token 1,701) ──"
    )


def test_why_cannot_control_the_terminal(address: str) -> None:
    """Control characters of a prompt are shown as what they are not, on both sides of the place."""
    cache(address, RULES + "\x1b[2J\x07 one\x9b", "control")
    output = why(address, RULES + "\x1b[2J\x07 two\x9b\r", "control")
    assert "\ufffd[2J\ufffd \n" in output
    assert "\ntwo\ufffd\ufffd\n" in output


def test_why_on_a_terminal_dims_what_is_cached(address: str, tmp_path: Path) -> None:
    """On a terminal the cached part is dim, and the mark and what varies are in colour."""
    cache(address, RULES + "Request 7d1f0c3a2b, please.", "terminal")
    file = tmp_path / "prompt.txt"
    file.write_text(RULES + "Request 7d1f0c3a9e, please.")
    with on_terminal("why", str(file), "--namespace", "terminal", "--address", address) as screen:
        screen.wait_for(r"\x1b\[2mYou are the harbour's assistant\.")
        screen.wait_for(r"\x1b\[2mRequest 7d1f0c3a\x1b\[0m")
        screen.wait_for(rf"\x1b\[1;33m{MARK}line 3, column 17")
        screen.wait_for(r"\x1b\[1;33m9e\x1b\[0m, please\.")
        screen.wait_for("What to do: move the hexadecimal id,")
        assert screen.wait_for_end() == 0


def test_why_as_json(address: str) -> None:
    """--json has what a lookup has, with text, line, column, what varies, and what to do."""
    cache(address, RULES + "Ticket 4711.", "json")
    found = json.loads(why(address, RULES + "Ticket 4799.", "json", "--json"))
    same = len(RULES + "Ticket 47")
    token, total = same + 1, same + 4
    assert found == {
        "prompt_tokens": total,
        "cached_tokens": token,
        "miss_reason": "diverged",
        "miss_position": token,
        "alternative_tokens": total,
        "text": RULES + "Ticket 4799.",
        "cached_characters": same,
        "elsewhere": [],
        "line": 3,
        "column": 10,
        "varying": {"what": "number", "start": same - 2, "end": same + 2},
        "explanation": f"a cached prompt of {total} tokens is the same up to token {token} and goes on differently",
        "advice": "move the number, and whatever else changes, behind everything that stays the same",
    }
    cache(address, RULES, "json")
    whole = json.loads(why(address, RULES, "json", "--json"))
    assert (whole["miss_reason"], whole["line"], whole["varying"]) == ("none", None, None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("7", "must be a JSON string, or an object"),
        ("[]", "must be text, a list of token ids or a list of messages"),
        ('{"tools": []}', 'give either "prompt" or "messages"'),
        ('["a", 3]', "must be text, a list of token ids or a list of messages"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_files_that_are_no_messages(content: str, complaint: str, tmp_path: Path) -> None:
    """What cannot be a prompt is refused before anything is sent, with what it should be."""
    file = tmp_path / "chat.json"
    file.write_text(content)
    result = run("why", "--messages", str(file), COLUMNS="300")
    assert result.exit_code == 2
    assert complaint in words(result.stderr)


def test_why_takes_one_prompt(tmp_path: Path) -> None:
    """Without a prompt, or with two, it says how to give one; a file that is not there is named."""
    file = tmp_path / "prompt.txt"
    file.write_text("text")
    for arguments in ([], [str(file), "--messages", str(file)]):
        result = run("why", *arguments, COLUMNS="200")
        assert result.exit_code == 2
        assert "give the prompt as a FILE of text" in words(result.stderr)
    missing = run("why", "/no/such/prompt.txt", COLUMNS="200")
    assert missing.exit_code == 2
    assert "there is no file '/no/such/prompt.txt'" in words(missing.stderr)


# Words and places


def test_every_reason_has_something_to_do() -> None:
    """Each reason comes with an advice, also one that this version does not know."""
    for reason in [*MissReason, None]:
        assert advice(Lookup(100, 40, reason, 40))
    diverged = Lookup(100, 40, MissReason.DIVERGED, 40, 1234)
    assert "a cached prompt of 1,234 tokens is the same up to token 40" in sentence(diverged)
    assert "prefixcache doctor" in advice(diverged)
    assert "move the UUID" in advice(diverged, "UUID")


def test_places_are_lines_and_columns() -> None:
    """Lines and columns count from 1; a place behind a newline is in the next line."""
    text = "ab\n\ncd"
    assert [place_in(text, characters)[1:] for characters in range(7)] == [
        (1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (3, 2), (3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "behind", "varying"),
    [
        ("Today is ", "2026-11-22.", "2026-11-22"),
        ("Today is 2026-1", "1-22 08:30.", "2026-11-22 08:30"),
        ("Today is", ' "2026-11-22".', "2026-11-22"),
        ("id: ", "123e4567-e89b-12d3-a456-426614174000 x", "123e4567-e89b-12d3-a456-426614174000"),
        ("Turn ", "17 of 20", "17"),
        ("My name is ", "Jan", None),
        ("at 08:30", " we left at 09:00", None),
        ("the end", "", None),
        ("line\n", "\n2026-11-22", None),
        ("x" * 5000 + " 12:", "34 " + "y" * 5000, "12:34"),
    ],
)
def test_what_varies_is_found_around_the_place(before: str, behind: str, varying: str | None) -> None:
    """What the place is in, or what begins there behind spaces and quotes, if it is of a kind that tends to change."""
    text = before + behind
    found = varying_at(text, len(before))
    assert (None if found is None else text[found.start : found.end]) == varying


# events


def events(address: str, *arguments: str) -> list[str]:
    result = run("events", "--address", address, *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


def test_events_are_shown_as_they_come() -> None:
    """First what is stored, then every change with its number; Ctrl+C ends it with exit code 0."""
    with RunningServer(PaperEngine(blocks=8)) as server:
        cache(server.address, "x" * 40, "first")
        with on_terminal("events", "--address", server.address) as screen:
            screen.wait_for(r"\+ 2 blocks +up to [0-9a-f]{12}  first\r\n")
            screen.wait_for("0  = 2 blocks are stored; what follows are changes")
            cache(server.address, "y" * 20, "second")
            screen.wait_for(r" 1  \+ 1 block +up to [0-9a-f]{12}  second\r\n")
            cache(server.address, "z" * 90, "third")
            screen.wait_for(r" [23]  - [12] blocks? +up to [0-9a-f]{12}  (first|second)\r\n")
            screen.wait_for(r"\+ 5 blocks +up to [0-9a-f]{12}  third\r\n")
            screen.type("\x03")
            assert screen.wait_for_end() == 0


def test_events_as_json_can_be_resumed() -> None:
    """--json names stream and sequence, and --after goes on behind them."""
    with RunningServer(PaperEngine()) as server:
        cache(server.address, "x" * 40, "")
        snapshot, end = map(json.loads, events(server.address, "--json", "--count", "2"))
        assert (snapshot["event"], snapshot["sequence"], len(snapshot["hashes"])) == ("snapshot", 0, 2)
        assert (end["event"], end["sequence"], end["blocks"]) == ("snapshot_end", 0, 2)
        cache(server.address, "y" * 20, "later")
        after = f"{end['stream_id']}:{end['sequence']}"
        (stored,) = map(json.loads, events(server.address, "--json", "--count", "1", "--after", after))
        assert stored.keys() == {"event", "stream_id", "sequence", "namespace", "parent", "hashes"}
        assert (stored["event"], stored["sequence"], stored["namespace"]) == ("stored", 1, "later")
        assert all(re.fullmatch("[0-9a-f]{32}", text) for text in [stored["parent"], *stored["hashes"]])
        gone = run("events", "--after", "0123456789abcdef:5", "--address", server.address)
        assert gone.exit_code == 1
        assert re.fullmatch(r"error: .*start over.*\n", gone.stderr)


@pytest.mark.parametrize("after", ["5", "x:", ":5", "x:-5"])
def test_a_position_that_is_none(after: str) -> None:
    """--after says what it takes."""
    result = run("events", "--after", after, COLUMNS="200")
    assert result.exit_code == 2
    assert "STREAM:SEQUENCE" in words(result.stderr)
