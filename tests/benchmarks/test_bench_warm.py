"""The benchmark of warming: it sends what it says, compares like with like, and reports what it found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import bench_warm
from benchmarks.bench_warm import Phase, Prompts, poisson, report_of
from tests.engine.serving import PaperEngine, RunningServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """A server that computes on paper, which knows few token ids and takes short prompts."""
    for name, value in (("LOW", 0), ("HIGH", 250), ("SYSTEM_TOKENS", 64), ("OWN_TOKENS", 16)):
        monkeypatch.setattr(bench_warm, name, value)
    with RunningServer(PaperEngine(blocks=2000)) as running:
        yield running


def test_a_run(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every request is served with and without warming, and at least as many prompts are warmed as were asked for."""
    result = tmp_path / "warm.json"
    bench_warm.main(prompts=3, length=100, pairs=2, requests=5, load=0.5, address=server.address, result_file=result)
    report = json.loads(result.read_text())
    assert report["without"]["requests"] == report["with"]["requests"] == 10
    assert report["warmed"]["prompts"] >= 4 and report["warmed"]["tokens"] == 100 * report["warmed"]["prompts"]
    assert len(report["ttft p99 ratio of each pair"]) == 2
    assert report["ratios"]["ttft p99"] > 0 and report["requests per second"] > 0
    stats = server.stats()
    assert stats.totals.warmed_prompts == report["warmed"]["prompts"] + 1
    assert stats.totals.finished == 2 * 10 + 8 + 5
    assert stats.totals.cached_tokens >= 25 * 64, "all begin with a cached system prompt"
    output = " ".join(capsys.readouterr().out.split())
    assert "p99 of the time to first token, with / without" in output and "wanted: at most 1.2" in output


def test_the_report_compares_all_requests() -> None:
    """Percentiles are taken over the requests of all pairs, ratios are with over without."""
    slow = Phase([0.2, 0.4], [1.0, 3.0], prompts=2, tokens=200, seconds=4.0)
    report = report_of([(Phase([0.1, 0.1], [1.0, 1.0]), slow), (Phase([0.2, 0.2], [2.0, 2.0]), slow)])
    assert report["without"]["requests"] == 4
    assert report["without"]["ttft p50 ms"] == pytest.approx(150)
    assert report["ratios"]["ttft p50"] == pytest.approx(2)
    assert report["ratios"]["total p50"] == pytest.approx(2 / 1.5)
    assert report["ttft p99 ratio of each pair"] == pytest.approx([3.98, 1.99])
    assert report["warmed"] == {"prompts": 4, "tokens": 400, "tokens per second": 50.0}


def test_arrivals_are_the_same_for_a_seed_and_as_many_per_second_as_asked_for() -> None:
    """So that both sides of a pair see the same traffic."""
    assert poisson(5.0, 100, seed=1) == poisson(5.0, 100, seed=1) != poisson(5.0, 100, seed=2)
    arrivals = poisson(5.0, 10_000, seed=0)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(2000, rel=0.05)


def test_prompts_share_a_system_prompt_and_nothing_else() -> None:
    """What is warmed is no prefix of what is asked for."""
    prompts = Prompts()
    live = [prompts.live() for _ in range(50)]
    assert all(len(prompt) == 1024 + 128 for prompt in live)
    assert all(prompt[:1024] in prompts.system for prompt in live)
    assert len({tuple(prompt[1024:1026]) for prompt in live}) == 50
    assert prompts.sequence(10)[:2] not in [system[:2] for system in prompts.system]
