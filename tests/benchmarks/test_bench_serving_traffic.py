"""What the serving benchmark sends: the same every time, and shared exactly as it says."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.conversations import Conversations, body, header, load, train
from benchmarks.serving.traffic import (
    FIRST_ID,
    Agents,
    Call,
    Chat,
    Decode,
    Phase,
    Scenario,
    Shared,
    Sharing,
    TokenSource,
    Trace,
    Ttft,
    check_lengths,
)

VOCABULARY = 4096

SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "ttft": lambda: Ttft((80, 200), suffix=16, pairs=2),
    "decode": lambda: Decode(16, 8),
    "shared": lambda: Shared(6, 100, 20, 4),
    "sharing": lambda: Sharing((1, 2, 4), 200, 10, 4),
    "agents": lambda: Agents(20, 3, 100, 20, 4),
    "agents over rates": lambda: Agents(20, 3, 100, 20, 4, rates=(2.0, 8.0)),
    "chat": lambda: Chat(4, 3, 20, 10),
    "trace": lambda: Trace(None, 10, 64),
    "conversations": lambda: Conversations(8192, VOCABULARY, runs=2, max_output=16),
}


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def calls(phases: Sequence[Phase]) -> list[Call]:
    return [call for phase in phases for session in phase.sessions for call in session]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_seed_gives_the_same_traffic(name: str) -> None:
    first, second = (TokenSource(VOCABULARY, 1) for _ in range(2))
    for _ in range(2):
        assert SCENARIOS[name]().phases(first) == SCENARIOS[name]().phases(second)
    assert SCENARIOS[name]().phases(TokenSource(VOCABULARY, 2)) != SCENARIOS[name]().phases(TokenSource(VOCABULARY, 1))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_repeat_is_new_to_a_cache_and_of_the_same_lengths(name: str) -> None:
    source = TokenSource(VOCABULARY)
    scenario = SCENARIOS[name]()
    warmup, one, other = calls(scenario.warmup(source)), calls(scenario.phases(source)), calls(scenario.phases(source))
    assert [len(call.prompt) for call in one] == [len(call.prompt) for call in other]
    for new in other:
        assert max(shared_length(new.prompt, old.prompt) for old in warmup + one) <= 2


@pytest.mark.parametrize("name", SCENARIOS)
def test_ids_are_within_the_vocabulary(name: str) -> None:
    for call in calls(SCENARIOS[name]().phases(TokenSource(VOCABULARY))):
        assert min(call.prompt) >= FIRST_ID and max(call.prompt) < VOCABULARY
        assert call.output >= 1


def test_ttft_pairs_share_all_but_the_suffix() -> None:
    sessions = Ttft((80, 200), suffix=16, pairs=3).phases(TokenSource(VOCABULARY))[0].sessions
    assert [(cold.label, warm.label) for cold, warm in sessions] == 3 * [
        ("80 cold", "80 warm"),
        ("200 cold", "200 warm"),
    ]
    for cold, warm in sessions:
        assert len(cold.prompt) == len(warm.prompt)
        assert shared_length(cold.prompt, warm.prompt) == len(cold.prompt) - 16
    for (_, before), (cold, _) in pairwise(sessions):
        assert shared_length(before.prompt, cold.prompt) == 0


def test_shared_prompts_share_exactly_their_prefix() -> None:
    made = calls(Shared(6, 100, 20, 4).phases(TokenSource(VOCABULARY)))
    assert [len(call.prompt) for call in made] == [120] * 6
    assert {shared_length(made[0].prompt, call.prompt) for call in made[1:]} == {100}


def test_sharing_primes_the_prefix_and_then_sends_as_many_as_it_says() -> None:
    phases = Sharing((1, 2, 4), 200, 10, 4).phases(TokenSource(VOCABULARY))
    assert [(phase.label, len(phase.sessions), phase.counted) for phase in phases] == [
        ("prime", 1, False),
        ("1", 1, True),
        ("2", 2, True),
        ("4", 4, True),
    ]
    made = calls(phases)
    assert {shared_length(made[0].prompt, call.prompt) for call in made[1:]} == {200}


def test_agents_share_whole_system_prompts() -> None:
    made = calls(Agents(60, 3, 100, 20, 4).phases(TokenSource(VOCABULARY)))
    systems = {call.prompt[:100].tobytes() for call in made}
    assert len(systems) == 3
    assert len({call.prompt.tobytes() for call in made}) == 60


def test_arrivals_are_poisson() -> None:
    """Rates and the spread of the gaps are those of the exponential distribution, as near as 2,000 draws are."""
    phases = Agents(2_000, 2, 4, 2, 1, rates=(2.0, 8.0)).phases(TokenSource(VOCABULARY))
    for phase, rate in zip(phases, (2.0, 8.0), strict=True):
        assert phase.starts is not None
        gaps = [b - a for a, b in pairwise([0, *phase.starts])]
        assert min(gaps) >= 0
        assert statistics.mean(gaps) == pytest.approx(1 / rate, rel=0.1)
        assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.15)


def test_chats_grow() -> None:
    sessions = Chat(4, 3, 20, 10).phases(TokenSource(VOCABULARY))[0].sessions
    assert [len(session) for session in sessions] == [3] * 4
    for session in sessions:
        for before, after in pairwise(session):
            assert shared_length(before.prompt, after.prompt) == len(before.prompt)
            assert len(after.prompt) >= len(before.prompt) + before.output + 10


def test_a_trace_keeps_its_times_lengths_and_sharing(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 64, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1500, "output_length": 1, "hash_ids": [0, 1, 3]},
        {"timestamp": 9000, "input_length": 600, "output_length": 6400, "hash_ids": [4, 5]},
        {"timestamp": 9500, "input_length": 600, "output_length": 10, "hash_ids": [4, 5]},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (phase,) = Trace(file, 3, scale=16, speed=2, max_output=100).phases(TokenSource(VOCABULARY))
    one, two, three = calls([phase])
    assert phase.starts == [0, 1, 4]
    assert [len(call.prompt) for call in (one, two, three)] == [32 + 32 + 5, 32 + 32 + 30, 32 + 6]
    assert [call.output for call in (one, two, three)] == [4, 1, 100]
    assert shared_length(one.prompt, two.prompt) == 64
    assert shared_length(one.prompt, three.prompt) == 0


@pytest.mark.parametrize("make", [lambda: Ttft((64,), suffix=64), lambda: Trace(None, 1, 3), lambda: TokenSource(500)])
def test_what_cannot_be_made_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"64 tokens|must divide 512|too small"):
        make()


def test_a_call_that_is_too_long_is_refused() -> None:
    phases = Decode(16, 8).phases(TokenSource(VOCABULARY))
    check_lengths(phases, 24)
    with pytest.raises(ValueError, match="16 tokens and 8 to generate"):
        check_lengths(phases, 23)


# Conversations

CALL = {"id": "call_1", "type": "function", "function": {"name": "book", "arguments": '{"seat": "4A"}'}}
RUN: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. " * 30},
    {"role": "user", "content": "A seat, please."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "done", "name": "book", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "Seat 4A is yours. " * 10},
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    file = tmp_path / "runs.json"
    other = [*RUN[:1], {"role": "user", "content": "Cancel it."}, {"role": "assistant", "content": "Cancelled."}]
    file.write_text(json.dumps([{"task_id": 0, "traj": RUN}, {"task_id": 1, "traj": other}, {"traj": RUN}]))
    return file


def test_every_answer_of_a_run_is_a_call_with_what_was_before(runs: Path) -> None:
    scenario = Conversations(8192, VOCABULARY, runs, runs=2, max_output=12)
    (phase,) = scenario.phases(TokenSource(VOCABULARY))
    first, second = phase.sessions
    assert (len(first), len(second)) == (2, 1)
    tokenizer = train(load(runs), VOCABULARY - FIRST_ID)

    def length(*texts: str) -> int:
        return sum(len(tokenizer.encode(text).ids) for text in texts)

    whole = [text for message in RUN for text in (header(message), body(message))]
    assert [len(call.prompt) for call in first] == [length(*whole[:5]), length(*whole[:9])]
    assert first[0].output == min(length(whole[5]), 12)
    assert first[1].output == 12  # the cap
    assert shared_length(first[0].prompt, first[1].prompt) == len(first[0].prompt)
    assert shared_length(first[0].prompt, second[0].prompt) >= length(*whole[:3])
    assert scenario.left_out == 0


def test_a_run_ends_before_what_is_too_long_and_that_is_counted(runs: Path) -> None:
    (phase,) = Conversations(8192, VOCABULARY, runs, runs=1).phases(TokenSource(VOCABULARY))
    first, second = phase.sessions[0]
    short = Conversations(len(second.prompt), VOCABULARY, runs, runs=1)
    assert [len(call.prompt) for call in calls(short.phases(TokenSource(VOCABULARY)))] == [len(first.prompt)]
    assert short.left_out == 1


def test_tool_calls_are_part_of_the_text() -> None:
    assert body(RUN[2]) == '\n{"name": "book", "arguments": "{\\"seat\\": \\"4A\\"}"}\n'


@pytest.mark.parametrize("content", ['{"runs": []}', '[{"traj": 3}]', '[[{"content": "no role"}]]'])
def test_a_file_without_runs_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "runs.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"runs\.json"):
        load(file)
