"""The examination of the embedded model: it asks what it says, cold and warm, and would notice a wrong prefix."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from benchmarks import bench_quality
from benchmarks.bench_quality import Answer, questions, summary
from engine.embedded.values import is_held_out
from prefixcache.client import Client
from prefixcache.results import Completion
from tests.engine.serving import RunningServer


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(cache_memory="64MiB", threads=2) as running:
        yield running


def run(server: RunningServer, result: Path | None = None) -> None:
    bench_quality.main(dialogues=1, turns=2, address=server.address, result_file=result, quick=False)


def test_a_run(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every group adds up to all questions; answers are the same from the cache, and nearly certain of themselves."""
    run(server, tmp_path / "quality.json")
    report = json.loads((tmp_path / "quality.json").read_text())
    whole = report["all"]
    assert whole["questions"] == whole["same"] == 2 * len(bench_quality.LENGTHS)
    for title in bench_quality.GROUPS:
        assert sum(group["questions"] for group in report[title].values()) == whole["questions"]
    assert whole["right"] == whole["right warm"] > 0.5
    assert whole["cached"] > 0.99
    assert 1.0 <= whole["perplexity"] < 2.0
    output = capsys.readouterr().out
    assert all(title in output for title in bench_quality.GROUPS)


def test_a_wrong_prefix_is_noticed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If what comes from the cache is another answer, the run fails and says so."""
    generate = Client.generate

    def spoiled(client: Client, prompt: list[int], **options: object) -> Completion:
        if options.get("read_cache") is False or options.get("logit_bias"):
            return generate(client, prompt, **options)  # type: ignore[arg-type]
        return generate(client, [*prompt[:-4], *prompt[-3:]], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "generate", spoiled)
    monkeypatch.setattr(bench_quality, "LENGTHS", (250,))
    with pytest.raises(typer.Exit):
        bench_quality.main(dialogues=3, turns=4, address=server.address, quick=False, perplexity=False)
    assert "is not the one that was computed" in capsys.readouterr().out


def test_questions_are_of_what_was_never_taught() -> None:
    """Names on the sheets are held out, and a turn's prompt is all that was said before it."""
    for dialogue in questions(500, dialogues=5, turns=4, seed="test"):
        first = dialogue[0]
        assert all(is_held_out(word) for thing in first.sheet.things for word in name_of(first.sheet.desk.thing, thing))
        for before, after in pairwise(dialogue):
            assert after.messages[: len(before.messages)] == before.messages


def name_of(kind: str, thing: str) -> list[str]:
    """Return what is new in the name of a thing."""
    words = thing.split()
    return {"product": words[:1], "title": [thing], "person": words[1:], "name": words}[kind]


def test_the_summary_counts_what_it_says() -> None:
    """Right is right cold; perplexity is over all tokens of all answers."""
    ((question, other),) = questions(250, dialogues=1, turns=2, seed="test")
    right = question.turn.answer
    answers = [
        Answer(question, 100, 99, right, right, [math.log(0.5)]),
        Answer(other, 300, 0, "For nobody.", other.turn.answer, [math.log(0.5), math.log(0.25), 0.0]),
    ]
    found = summary(answers)
    assert (found["questions"], found["prompt tokens"], found["same"]) == (2, 200, 1)
    assert (found["right"], found["right warm"], found["cached"]) == (0.5, 1.0, 99 / 400)
    assert found["perplexity"] == pytest.approx(2.0)
