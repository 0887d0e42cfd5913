"""Recorded runs of tool-calling agents, as calls.

A file is a JSON list of runs; a run is a list of messages or an object that has one
under "traj" or "messages". Every assistant message is one call: its prompt is all
messages before it, its output as long as the message itself (capped). The recorded
message, not the generated one, goes into the next prompt.

Token ids come from a byte-level BPE trained on the file, so that lengths are realistic
and ids are the same for all targets. The ids are renamed for every repeat.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.serving.traffic import FIRST_ID, Call, Phase, TokenSource, trimmed
from benchmarks.workloads import zipf

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Turn:
    """One message as tokens of the trained vocabulary; whether it is an answer to be generated."""

    header: list[int]
    body: list[int]
    answer: bool


def load(path: Path) -> list[Messages]:
    """Read the runs of a file. Raises ValueError that says what about it cannot be read."""
    entries = json.loads(path.read_text())
    if not isinstance(entries, list):
        raise ValueError(f"{path.name} is no JSON list of runs")
    loaded: list[Messages] = []
    for number, entry in enumerate(entries):
        messages = entry.get("traj", entry.get("messages")) if isinstance(entry, dict) else entry
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError(f"run {number} of {path.name} has no list of messages with a role")
        loaded.append(messages)
    return loaded


def generated(runs: int) -> list[Messages]:
    """Stand-ins for recorded runs: one long policy, then questions, tool calls, their results and answers."""
    source = random.Random("conversations")
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(3_000)]
    weights = zipf(len(words))

    def text(count: int) -> str:
        return " ".join(source.choices(words, cum_weights=weights, k=count))

    policy = {"role": "system", "content": text(1_200)}
    made: list[Messages] = []
    for _ in range(runs):
        messages: list[dict[str, Any]] = [policy]
        for _ in range(source.randint(3, 8)):
            messages.append({"role": "user", "content": text(source.randint(5, 40))})
            if source.random() < 0.6:
                call = {"name": source.choice(words), "arguments": json.dumps({"id": text(2)})}
                messages.append({"role": "assistant", "content": None, "tool_calls": [{"function": call}]})
                messages.append({"role": "tool", "content": json.dumps({"result": text(source.randint(30, 250))})})
            messages.append({"role": "assistant", "content": text(source.randint(10, 80))})
        made.append(messages)
    return made


def body(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, then its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([message.get("content") or "", *calls]) + "\n"


def header(message: Mapping[str, Any]) -> str:
    return f"<|{message['role']}|>\n"


def train(runs: Iterable[Messages], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most so many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((header(m) + body(m) for run in runs for m in run), trainer)
    return tokenizer


@dataclass(frozen=True)
class Conversations:
    """Agent runs: `concurrency` of them at a time, the calls of a run one after the other.

    A run ends before the first call that would be longer than `longest` tokens.
    """

    longest: int
    vocabulary: int
    file: Path | None = None
    runs: int = 16
    concurrency: int = 4
    max_output: int = 128
    name: str = "conversations"

    def warmup(self, source: TokenSource) -> list[Phase]:
        return [trimmed(phase, 2, 2) for phase in self.phases(source)]

    def phases(self, source: TokenSource) -> list[Phase]:
        ids = source.permutation(self.vocabulary - FIRST_ID)
        sessions = [session for run in self._turns if (session := self._calls(run, ids))]
        return [Phase(self.name, sessions, concurrency=self.concurrency)]

    @property
    def left_out(self) -> int:
        """Calls of the runs that are not made because they, or one before, are too long for the model."""
        source = TokenSource(self.vocabulary)
        made = sum(phase.calls() for phase in self.phases(source))
        return sum(turn.answer for run in self._turns for turn in run) - made

    @cached_property
    def _turns(self) -> list[list[Turn]]:
        runs = load(self.file) if self.file else generated(self.runs)
        tokenizer = train(runs, self.vocabulary - FIRST_ID)
        return [
            [
                Turn(
                    tokenizer.encode(header(message)).ids,
                    tokenizer.encode(body(message)).ids,
                    message["role"] == "assistant",
                )
                for message in run
            ]
            for run in runs[: self.runs]
        ]

    def _calls(self, turns: Sequence[Turn], ids: Sequence[int]) -> list[Call]:
        calls: list[Call] = []
        context = array("I")
        for turn in turns:
            context += array("I", [ids[token] for token in turn.header])
            if turn.answer:
                output = min(max(len(turn.body), 1), self.max_output)
                if len(context) + output > self.longest:
                    break
                calls.append(Call(context[:], output, self.name))
            context += array("I", [ids[token] for token in turn.body])
        return calls
