"""The arithmetic of the serving benchmark, on records made by hand."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from benchmarks.serving import memory
from benchmarks.serving.measure import Agreement, Record, figures, medians, percentile, ratios, together


def record(sent: float, *times: float, prompt: int = 10, cached: int | None = 4, error: str | None = None) -> Record:
    """A finished request: one token at each of `times`."""
    made = Record("all", prompt, len(times), sent, list(times), [1] * len(times), list(range(len(times))))
    made.cached_tokens, made.error = cached, error
    return made


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 2.5), (90, 3.7), (100, 4)])
def test_a_percentile_is_interpolated(percent: float, expected: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(expected)


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentile([], 50) is None


def test_figures_are_those_of_the_records() -> None:
    """Two requests in a phase of four seconds: first tokens after 1 and 2 s, 0.5 and 1 s per token."""
    made = figures([record(0, 1, 1.5, 2), record(0, 2, 3, 4, prompt=30, cached=26)], wall=4, ttft_limit=1.5)
    expected = {
        "requests": 2,
        "failed": 0,
        "prompt tokens": 40,
        "cached tokens": 30,
        "output tokens": 6,
        "reused": 0.75,
        "cached per request": 15,
        "output tokens/s": 1.5,
        "total tokens/s": 11.5,
        "goodput/s": 0.25,
        "ttft p50 ms": 1500,
        "ttft p99 ms": 1990,
        "tpot p50 ms": 750,
        "decode tokens/s": 1.5,
    }
    assert {name: made[name] for name in expected} == pytest.approx(expected)


def test_failed_requests_count_as_failed_and_nowhere_else() -> None:
    made = figures([record(0, 1, 2), record(0, 9, 9, error="broken")], wall=2, ttft_limit=5)
    assert (made["requests"], made["failed"], made["output tokens"], made["ttft p99 ms"]) == (2, 1, 2, 1000)
    assert made["goodput/s"] == 0.5
    assert made["together tokens/s"] is None  # not all of them decoded


def test_all_failed_leaves_no_times() -> None:
    made = figures([record(0, error="broken")], wall=2, ttft_limit=5)
    assert made["ttft p50 ms"] is made["tpot p50 ms"] is made["decode tokens/s"] is None
    assert made["output tokens/s"] == 0


def test_cached_tokens_are_unknown_if_one_target_request_does_not_tell() -> None:
    made = figures([record(0, 1), record(0, 1, cached=None)], wall=1, ttft_limit=5)
    assert made["cached tokens"] is made["reused"] is made["cached per request"] is None


def test_tokens_in_the_first_event_do_not_shorten_the_time_per_token() -> None:
    """Three tokens at 1 s, then two at 2 s: half a second per later token."""
    made = Record("all", 10, 5, 0.0, [1.0, 2.0], [3, 2])
    assert made.tpot == 0.5


def test_together_counts_between_the_last_start_and_the_first_end() -> None:
    """One has its first token at 3 s, the other its last at 5 s; 3 tokens of the one and 2 of the other between."""
    assert together([record(0, 1, 2, 3, 4, 5), record(0, 3, 3.5, 4.5, 5, 6)]) == pytest.approx((2 + 3) / 2)


@pytest.mark.parametrize("other", [(5.0, 6.0), (2.5, 6.0)])
def test_sequences_that_never_run_together_have_no_such_rate(other: tuple[float, ...]) -> None:
    """The other starts after the one has ended, or so late that neither could get a token each."""
    assert together([record(0, 1, 2, 2.6), record(0, *other)]) is None


@pytest.mark.parametrize(
    ("asked", "told", "message"), [(4, 10, "3 tokens came where 4"), (3, 11, "counts 11 prompt tokens where 10")]
)
def test_a_request_that_is_not_as_asked_has_failed(asked: int, told: int, message: str) -> None:
    made = record(0, 1, 2, 3)
    made.asked, made.prompt_tokens = asked, told
    made.check()
    assert message in (made.error or "")


def test_a_request_as_asked_has_not_failed() -> None:
    made = record(0, 1, 2, 3)
    made.prompt_tokens = 10
    made.check()
    assert made.error is None


def test_ratios_are_of_the_same_repeat() -> None:
    """The machine was half as fast in the second repeat, for both."""
    assert medians([{"a": 1.0}, {"a": 2.0}, {"a": 4.0}]) == {"a": 2.0}
    assert ratios([{"a": 3.0}, {"a": 6.0}], [{"a": 1.0}, {"a": 2.0}]) == {"a": 3.0}
    assert ratios([{"a": 3.0}, {"a": None}], [{"a": 1.0}, {"a": 2.0}]) == {"a": None}
    assert ratios([{"a": 3.0}], [{"a": 0.0}]) == {"a": None}


def test_agreement_compares_only_what_both_tell() -> None:
    one, same, other, silent = record(0, 1, 2), record(0, 1, 2), record(0, 1, 2), record(0, 1, 2)
    other.tokens, silent.tokens = [7, 8], None
    agreement = Agreement()
    agreement.add([same, other, silent], [one, one, one])
    assert (agreement.compared, agreement.equal) == (2, 1)


def test_peak_memory_is_that_of_the_listener_and_its_children() -> None:
    """A process of 50 MiB listens; its child holds 100 MiB more."""
    child = "data = b'x' * (100 << 20); print('ready', flush=True); input()"
    listener = f"""
import socket, subprocess, sys
data = b'x' * (50 << 20)
listening = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(listening.getsockname()[1], flush=True)
input()
child.communicate(b"\\n")
"""
    command = [sys.executable, "-c", listener]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        peak = memory.peak("127.0.0.1", port)
        assert memory.peak("192.0.2.1", port) is None  # elsewhere
        process.communicate("\n")
    assert peak is not None
    assert 150 << 20 < peak < 230 << 20


def test_memory_of_a_port_where_nobody_listens_is_unknown() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert memory.peak("127.0.0.1", probe.getsockname()[1]) is None
