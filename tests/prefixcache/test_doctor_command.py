"""`prefixcache doctor` as people and build servers use it: on files, and beside a real server."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from prefixcache.client import Client
from prefixcache.doctor import Diagnosis, Pieces, prompt_from, sendable
from tests.engine.serving import PaperEngine, RunningServer
from tests.prefixcache.agents import COUNT, NAMES, RULES, Front, chats, clock, moment, profile, texts, with_tools
from tests.prefixcache.test_cli import on_terminal, run, words


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))  # stdout is looked at
    with RunningServer(PaperEngine(blocks=2048)) as server:
        yield server
    structlog.reset_defaults()


def written(path: Path, prompts: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return str(path)


def report(*arguments: str, stdin: str | None = None) -> dict[str, Any]:
    result = run("doctor", "--json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def send(server: RunningServer, prompts: Sequence[Any], namespace: str) -> float:
    """Send prompts one after another and return which share of their tokens the engine found in its cache."""
    with Client(server.address) as client:
        before = client.stats(timeout=20).tokens
        for source in prompts:
            prompt, tools = sendable(source)
            client.generate(prompt, tools=tools, max_tokens=1, namespace=namespace, timeout=20)
        after = client.stats(timeout=20).tokens
    return (after.cached - before.cached) / (after.prompt - before.prompt)


# What it predicts


@pytest.mark.parametrize(
    ("name", "prompts", "kind", "position"),
    [
        ("clock", texts(clock), "datetime", 1 + len("Current time: ")),
        ("chat", chats(lambda n, _: f"Now: {moment(n)}\n"), "datetime", 2 + len("Now: ")),
        ("keys", texts(profile), "text", None),
        ("tools", with_tools(), "tools", None),
    ],
    ids=["clock", "clock in a chat", "keys", "tools"],
)
def test_what_it_predicts_is_what_the_engine_measures(
    server: RunningServer, tmp_path: Path, name: str, prompts: list[Any], kind: str, position: int | None
) -> None:
    """Today's share and that of the rewritten prompts are within two points of what a real server then reports."""
    rewritten = tmp_path / "rewritten.jsonl"
    found = report(
        written(tmp_path / "prompts.jsonl", prompts),
        *("--tokenizer", "server", "--address", server.address, "--rewrite", str(rewritten)),
    )
    assert found["findings"][0]["kind"] == kind
    assert position is None or found["findings"][0]["place"]["token"] == position
    assert found["today"]["share"] == pytest.approx(send(server, prompts, f"{name}, today"), abs=0.02)
    better = [json.loads(line) for line in rewritten.read_text().splitlines()]
    assert found["after"]["share"] == pytest.approx(send(server, better, f"{name}, after"), abs=0.02)
    assert found["after"]["share"] > found["today"]["share"] + 0.4


def test_what_it_predicts_is_what_a_model_measures() -> None:
    """The same with the embedded model instead of one on paper."""
    prompts = texts(clock)[:12]
    with RunningServer(cache_memory="64MiB") as server, Client(server.address) as client:
        pieces = Pieces()
        diagnosis = Diagnosis(
            [prompt_from(prompt, pieces, "") for prompt in prompts],
            pieces,
            tokenize=lambda sources: [client.tokenize(source, timeout=20) for source in sources],
        )
        report = diagnosis.report
        assert report.today.share == pytest.approx(send(server, prompts, "today"), abs=0.02)
        assert report.after.share == pytest.approx(send(server, list(diagnosis.rewritten()), "after"), abs=0.02)
    assert report.after.share > 0.8 > 0.1 > report.today.share


def test_the_estimate_without_a_server_is_close(server: RunningServer, tmp_path: Path) -> None:
    """Pieces that stand for tokens give shares within five points of those of the tokens."""
    file = written(tmp_path / "prompts.jsonl", texts(clock))
    exact = report(file, "--tokenizer", "server", "--address", server.address)
    estimate = report(file)
    assert (exact["counted"], estimate["counted"]) == ("server", "estimate")
    for share in ("today", "after"):
        assert estimate[share]["share"] == pytest.approx(exact[share]["share"], abs=0.05)


# Live traffic


@contextlib.contextmanager
def traffic(server: RunningServer, prompts: Sequence[Any], namespace: str) -> Iterator[None]:
    """Send prompts as soon as somebody watches."""

    def go() -> None:
        pause = threading.Event()
        while not server.server.front.shapes.watchers:
            pause.wait(0.005)
        shares.append(send(server, prompts, namespace))

    shares: list[float] = []
    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_following_finds_what_varies_without_any_text(server: RunningServer) -> None:
    """The same finding at the same place as from the text, with the server's token counts, and what it measured."""
    prompts = texts(clock)
    with traffic(server, prompts, "followed"):
        found = report("--follow", "--count", str(COUNT), "--address", server.address)
    (finding,) = found["findings"]
    assert (finding["kind"], finding["prompts"], finding["examples"]) == ("datetime", COUNT, [])
    assert (finding["place"]["line"], finding["place"]["column"]) == (1, 15)
    assert found["measured"]["tokens"] == sum(len(text) + 1 for text in prompts)
    assert found["today"]["share"] == pytest.approx(found["measured"]["share"], abs=0.05)
    assert found["after"]["share"] > 0.85


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [
        ("keys", texts(profile)),
        ("tools", with_tools()),
        ("spaces", [f"{(RULES, RULES, RULES.replace('euros', 'euros '))[n % 3]}\n{n}" for n in range(24)]),
    ],
)
def test_following_finds_other_orders_and_spaces(server: RunningServer, kind: str, prompts: list[Any]) -> None:
    """How a text is built is part of its shape."""
    with traffic(server, prompts, f"followed {kind}"):
        found = report("--follow", "--count", str(len(prompts)), "--address", server.address)
    assert kind in [finding["kind"] for finding in found["findings"]]
    assert found["after"]["share"] > found["today"]["share"] + 0.02


def test_ctrl_c_ends_following_with_the_report(server: RunningServer) -> None:
    """On a terminal the number of prompts is shown meanwhile."""
    with (
        on_terminal("doctor", "--follow", "--address", server.address) as screen,
        traffic(server, texts(clock), "on a terminal"),
    ):
        screen.wait_for(f"{COUNT} prompts at .*Ctrl\\+C for the report")
        screen.type("\x03")
        screen.wait_for("1\\. .*date and time")
        assert screen.wait_for_end() == 0


def test_following_where_nothing_happens_is_an_error(server: RunningServer) -> None:
    """There is nothing to report."""
    result = run("doctor", "--follow", "--seconds", "0.2", "--address", server.address)
    assert result.exit_code == 1
    assert result.stderr == f"error: no prompt came to {server.address} while it was followed\n"


# Reports


def test_a_report_is_plain_text_in_a_pipe(tmp_path: Path) -> None:
    """What varies, where, examples, advice, savings; no colours and no trailing spaces."""
    result = run("doctor", written(tmp_path / "prompts.jsonl", texts(profile)), "--tokens-per-second", "100")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())
    lines = result.stdout.splitlines()
    assert lines[0].startswith("24 prompts, about ") and lines[0].endswith(" in 1 group of prompts that are alike")
    assert "can be reused" in lines[2]
    assert "tokens (" in lines[3] and lines[3].endswith(" s) less to compute")
    assert any(line.startswith("1. varying text: line 1, column ") for line in lines)
    assert any("▸Anna◂" in line for line in lines)
    assert "Write JSON with sorted keys" in result.stdout
    assert "together with the other advice" in result.stdout


def test_a_report_without_findings_says_so(tmp_path: Path) -> None:
    """And how good these prompts are."""
    result = run("doctor", written(tmp_path / "prompts.jsonl", texts(lambda _, __: "")))
    assert "Nothing was found that changes in front of what these prompts have in common." in result.stdout
    assert "as advised" not in result.stdout


def test_json_has_stable_names(tmp_path: Path) -> None:
    """Everything that the text says, for machines."""
    found = report(written(tmp_path / "prompts.jsonl", texts(clock)), "--tokens-per-second", "1000")
    assert found.keys() == {
        "prompts", "groups", "ungrouped", "counted", "block_size", "today", "after", "saved_tokens", "saved_seconds",
        "findings", "measured",
    }  # fmt: skip
    (finding,) = found["findings"]
    assert finding.keys() == {
        "kind", "title", "place", "examples", "prompts", "places", "groups", "variants", "advice", "saved_tokens",
        "saved_alone", "saved_seconds",
    }  # fmt: skip
    assert finding["place"].keys() == {"prompt", "part", "line", "column", "token"}
    assert finding["examples"][0] == {
        "before": "Current time: ",
        "value": "2024-11-22T10:15:03Z",
        "after": "",
    }
    assert found["today"].keys() == {"tokens", "cached", "share"}
    assert finding["saved_seconds"] == finding["saved_tokens"] / 1000


@pytest.mark.parametrize(("front", "code"), [(clock, 1), (lambda _, __: "", 0)])
def test_a_build_can_fail_under_a_share(tmp_path: Path, front: Front, code: int) -> None:
    """Exit code 1, with the share, if less than that can be reused today; the report comes all the same."""
    result = run("doctor", written(tmp_path / "prompts.jsonl", texts(front)), "--fail-under", "80")
    assert result.exit_code == code
    assert result.stdout.startswith("24 prompts")
    assert ("less than the 80% asked for" in result.stderr) == bool(code)


# Where prompts come from


def test_prompts_come_from_files_directories_and_stdin(tmp_path: Path) -> None:
    """Lines of one file, files of text, and what is piped in are the same prompts."""
    prompts = texts(clock)
    lines = written(tmp_path / "prompts.jsonl", prompts)
    directory = tmp_path / "texts"
    directory.mkdir()
    for number, prompt in enumerate(prompts):
        (directory / f"{number:02}.txt").write_text(prompt)
    (directory / ".hidden").write_text("not a prompt")
    found = [report(lines), report(str(directory)), report("-", stdin=Path(lines).read_text())]
    places = [one["findings"][0]["place"].pop("prompt") for one in found]
    assert found[0] == found[1] == found[2]
    assert places == [f"{lines}, line 1", str(directory / "00.txt"), "stdin, line 1"]
    assert report(lines, str(directory))["prompts"] == 2 * COUNT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name files of prompts, or - for stdin; or --follow a server"),
        (["--follow", "-"], "name files of prompts, or - for stdin; or --follow a server"),
        (["/no/such/file"], "there is no file '/no/such/file'"),
        (["--follow", "--rewrite", "x"], "--rewrite needs the text of prompts"),
        (["--follow", "--tokenizer", "server"], "--tokenizer server needs the text of prompts"),
        (["-", "--fail-under", "101"], "--fail-under"),
        (["-", "--rewrite", "/no/such/directory/x"], "cannot be written: No such file"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str) -> None:
    """Exit code 2, and what is wrong."""
    result = run("doctor", *arguments, stdin='"a prompt"\n', COLUMNS="200")
    assert result.exit_code == 2
    assert message in words(result.stderr)


def test_a_line_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    """Exit code 2: it is not what was measured that is wrong."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('"fine"\n{"promt": "x"}\n')
    result = run("doctor", str(file), COLUMNS="300")
    assert result.exit_code == 2
    assert "prompts.jsonl, line 2: the object has neither prompt nor messages" in words(result.stderr)
    assert run("doctor", "-", stdin="", COLUMNS="200").exit_code == 1


def test_prompts_are_not_overwritten_by_their_rewriting(tmp_path: Path) -> None:
    """Whoever names the same file twice keeps it."""
    file = written(tmp_path / "prompts.jsonl", texts(clock))
    before = Path(file).read_text()
    result = run("doctor", file, "--rewrite", file, COLUMNS="300")
    assert (result.exit_code, Path(file).read_text()) == (2, before)
    assert "would overwrite" in words(result.stderr)


def test_half_characters_are_written_as_json_has_them(tmp_path: Path) -> None:
    """They are in some recorded prompts; nothing fails because of them."""
    prompts = texts(lambda n, _: f"Guest {NAMES[n]}\ud83d says:\n")
    file, rewritten = tmp_path / "prompts.jsonl", tmp_path / "rewritten.jsonl"
    assert run("doctor", written(file, prompts), "--rewrite", str(rewritten)).exit_code == 0
    assert json.loads(rewritten.read_text().splitlines()[0]).startswith("Guest [text]\ud83d says:\n")
    assert report(str(file))["findings"][0]["examples"][0]["after"] == "? says:"


def test_the_prefill_rate_can_be_measured(tmp_path: Path) -> None:
    """The server computes something once and keeps nothing of it."""
    file = written(tmp_path / "prompts.jsonl", texts(clock))
    with RunningServer(PaperEngine()) as server:
        found = report(file, "--measure", "--address", server.address)
        assert found["findings"][0]["saved_seconds"] > 0
        assert server.stats().totals.prompt_tokens > 1000
        assert server.stats().cache.cached == 0
