"""The command line, used as a person or a script uses it, against a real server."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from prefixcache import terminal
from prefixcache.cli import app
from prefixcache.client import Client
from prefixcache.explain import phrase, sentence
from prefixcache.reasons import MissReason
from prefixcache.results import BlockStats, Lookup, RequestStats, Stats, TokenStats
from tests.serving import command, environment, free_port, noise_server, server

# Makes stdin the terminal that controls a new session, and becomes the command in its arguments.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
PROMPT = "The harbour opens at six. Boats that come in the night wait at the outer wall. " * 2


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with noise_server() as (address, _):
        yield address


def run(*arguments: str, stdin: str | bytes | None = None, **variables: str) -> Result:
    """Call the command in this process; stdout and stderr are apart in the result."""
    result = CliRunner().invoke(app, list(arguments), input=stdin, env={"PREFIXCACHE_ADDRESS": None, **variables})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments: str) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def words(text: str) -> str:
    """Return text without the frames and line breaks that depend on the width."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def long_prompt() -> str:
    """Return a prompt that nobody has sent and that takes a while to compute, but not longer than the model allows."""
    return f"{time.time_ns()} {PROMPT * 40}"


def wait_until(address: str, condition: Callable[[Stats], bool]) -> None:
    with Client(address) as client:
        deadline = time.monotonic() + 20
        while not condition(client.stats()):
            assert time.monotonic() < deadline


# Help, completion, import time


def imported(*arguments: str) -> tuple[set[str], str]:
    """Return the packages that a command imports, and what it writes."""
    script = (
        "import sys\nfrom prefixcache.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    return set(done.stderr.split()), done.stdout


def test_help_imports_nothing_heavy() -> None:
    """`--help` lists the commands without loading torch, transformers, gRPC or the engine."""
    modules, output = imported("--help")
    assert not modules & {"torch", "transformers", "grpc", "google", "numpy", "engine"}
    assert all(name in output for name in ("serve", "generate", "chat", "lookup", "stats", "--install-completion"))


def test_serve_offers_every_option_of_the_configuration_without_torch() -> None:
    """`serve --help` shows each field of the engine's configuration with its description."""
    from engine.config import EngineConfig

    modules, _ = imported("serve", "--help")
    assert not modules & {"torch", "transformers"}
    output = words(run("serve", "--help", COLUMNS="300").stdout)
    for name, field in EngineConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in output
        assert field.description is not None
        assert words(field.description) in output


def test_client_commands_work_without_the_engine() -> None:
    """generate, chat, lookup and stats need nothing of the server's dependencies."""
    modules, _ = imported("stats", "--address", f"127.0.0.1:{free_port()}")
    assert "grpc" in modules
    assert not modules & {"torch", "transformers", "engine", "structlog"}


def test_serve_without_the_engines_dependencies_says_how_to_install_them() -> None:
    """Where only the client is installed, `serve` is one clear line."""
    script = (
        "import sys\nfor name in ('torch', 'transformers', 'tokenizers', 'structlog', 'grpc_health'):\n"
        "    sys.modules[name] = None\nfrom prefixcache.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "serve"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.match(
        r"error: a server needs \w+, which is not installed: pip install 'prefixcache\[engine\]'", done.stderr
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "completion"), [("prefixcache st", "stats"), ("prefixcache serve --cache-m", "--cache-memory")]
)
def test_shell_completion_knows_commands_and_options(line: str, completion: str) -> None:
    """Completion offers commands, and also the options of `serve` that come from the configuration."""
    variables = environment(COMP_WORDS=line, COMP_CWORD=str(line.count(" ")), _PREFIXCACHE_COMPLETE="complete_bash")
    done = subprocess.run(command(), env=variables, capture_output=True, text=True, check=False)
    assert completion in done.stdout.split()


def test_version() -> None:
    """`--version` is one line."""
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"prefixcache .+\n", result.stdout)


# The command line makes no sense: exit code 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stat"], "No such command"),
        (["serve", "--cache-memroy", "1GB"], "--cache-memory"),
        (["serve", "--cache-memory", "much"], "cache_memory cannot be 'much'"),
        (["serve", "--port", "99999"], "port"),
        (["generate"], "give the prompt"),
        (["generate", "text", "--file", __file__], "give the prompt"),
        (["generate", "text", "--max-tokens", "0"], "--max-tokens"),
        (["lookup", "--file", "/no/such/file"], "/no/such/file"),
        (["stats", "--address", "localhost"], "has no port"),
        (["stats", "--count", "0"], "--count"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str) -> None:
    """A command line that makes no sense ends with exit code 2 and says what is wrong with it."""
    result = run(*arguments, COLUMNS="200")
    assert result.exit_code == 2
    assert message in words(result.stderr)


def test_misspelt_variable_is_refused() -> None:
    """An environment variable that looks like an option but is none is an error of `serve`."""
    result = run("serve", PREFIXCACHE_CACHE_MEMROY="1GB")
    assert result.exit_code == 2
    assert "PREFIXCACHE_CACHE_MEMROY" in result.stderr


def test_prompt_that_is_not_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are refused before anything is sent, from a file and from stdin."""
    file = tmp_path / "prompt"
    file.write_bytes(b"abc\xff")
    from_file = run("generate", "--file", str(file), COLUMNS="200")
    from_stdin = run("lookup", "-", stdin=b"\xff", COLUMNS="200")
    assert from_file.exit_code == from_stdin.exit_code == 2
    assert "not UTF-8 text: byte 3" in words(from_file.stderr)
    assert "stdin is not UTF-8 text: byte 0" in words(from_stdin.stderr)


# No server, and errors of the server: exit code 1


@pytest.mark.parametrize("arguments", [["generate", "x"], ["lookup", "x"], ["stats"], ["chat"], ["stats", "--json"]])
def test_no_server(arguments: list[str]) -> None:
    """Without a server every command says so, and how to get one."""
    address = f"127.0.0.1:{free_port()}"
    result = run(*arguments, "--address", address, stdin="hello\n")
    assert result.exit_code == 1
    assert result.stderr.endswith(
        f"error: no server answers at {address}: start one with `prefixcache serve`, or name another with --address\n"
    )


def test_errors_of_the_server_are_one_line(address: str) -> None:
    """What the server refuses is told in its own words, on one line, without a traceback."""
    result = run("generate", "x" * 20_000, "--address", address)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()[-1:]
    assert re.match(r"error: .*20,?00[01] tokens", line)


def test_timeout(address: str) -> None:
    """An answer that takes longer than --timeout is an error, and the server gives the request up."""
    result = run("generate", long_prompt(), "--timeout", "0.05", "--address", address)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .+\n", result.stderr)
    wait_until(address, lambda stats: stats.requests.running == 0)


def test_address_comes_from_the_environment(address: str) -> None:
    """PREFIXCACHE_ADDRESS names the server where --address does not."""
    result = run("stats", "--json", PREFIXCACHE_ADDRESS=address)
    assert json.loads(result.stdout)["address"] == address


def test_the_clients_variable_does_not_disturb_the_server() -> None:
    """PREFIXCACHE_ADDRESS is no option of `serve`, and no misspelt one either."""
    result = run("serve", "--port", "99999", PREFIXCACHE_ADDRESS="127.0.0.1:50051")
    assert "PREFIXCACHE_ADDRESS" not in result.stderr
    assert "option port cannot be 99999" in result.stderr


# generate


def generate(address: str, prompt: str, namespace: str, *arguments: str) -> dict[str, object]:
    return run_json("generate", prompt, "--max-tokens", "4", "--namespace", namespace, "--address", address, *arguments)


def test_generate_writes_text_to_stdout_and_the_cost_to_stderr(address: str) -> None:
    """stdout has nothing but the text; stderr says in one line what was cached, and why not more."""
    arguments = ("generate", PROMPT, "--max-tokens", "8", "--namespace", "text", "--address", address)
    cold, warm = run(*arguments), run(*arguments)
    tokens = len(PROMPT) + 1
    assert cold.stdout == warm.stdout
    assert cold.stdout.strip()
    assert f"{tokens} prompt tokens = 0 cached + {tokens} prefilled; first token after" in cold.stderr
    assert f"{tokens} prompt tokens = {tokens - 1} cached + 1 prefilled; first token after" in warm.stderr
    assert cold.stderr.count("\n") == warm.stderr.count("\n") == 1
    assert "\x1b" not in cold.stdout + cold.stderr


def test_generate_json(address: str) -> None:
    """--json is one object with stable names; the counts add up."""
    result = generate(address, PROMPT, "json")
    assert set(result) == {
        "text", "token_ids", "finish_reason", "stopped_by", "request_id", "prompt_tokens", "cached_tokens",
        "computed_tokens", "completion_tokens", "recomputed_tokens", "written_tokens", "miss_reason", "miss_position",
        "explanation", "ttft_seconds", "total_seconds",
    }  # fmt: skip
    assert result["prompt_tokens"] == result["computed_tokens"] == len(PROMPT) + 1
    assert result["miss_reason"] == "never_seen"
    assert result["finish_reason"] == "length"
    assert result["completion_tokens"] == 4


def test_generate_reads_prompts_from_files_and_stdin_exactly(address: str, tmp_path: Path) -> None:
    """A prompt is the same prompt wherever it comes from, its last newline included."""
    text = "Zeilen, die bleiben:\n\tä €\n"
    file = tmp_path / "prompt.txt"
    file.write_bytes(text.encode())
    options = ("--namespace", "sources", "--max-tokens", "1", "--json", "--address", address)
    first = json.loads(run("generate", "--file", str(file), *options).stdout)
    second = json.loads(run("generate", "-", *options, stdin=text).stdout)
    third = json.loads(run("generate", text, *options).stdout)
    assert first["prompt_tokens"] == len(text.encode()) + 1
    assert second["miss_reason"] == third["miss_reason"] == "none"


def test_generate_options_reach_the_server(address: str) -> None:
    """Seeds repeat, stop strings stop, and the cache can be left alone or kept apart."""
    drawn = [generate(address, PROMPT, "options", "--temperature", "1.5", "--seed", seed) for seed in ("7", "7", "8")]
    assert drawn[0]["token_ids"] == drawn[1]["token_ids"] != drawn[2]["token_ids"]

    bypassed = generate(address, PROMPT, "options", "--no-read")
    assert (bypassed["miss_reason"], bypassed["cached_tokens"]) == ("bypassed", 0)

    generate(address, PROMPT, "unstored", "--no-store")
    assert generate(address, PROMPT, "unstored")["cached_tokens"] == 0
    assert generate(address, PROMPT, "elsewhere")["cached_tokens"] == 0

    long = run_json("generate", PROMPT, "--max-tokens", "64", "--address", address)
    text = str(long["text"])
    stop = next(character for character in text if character.isascii())
    stopped = run_json(
        "generate", PROMPT, "--max-tokens", "64", "--stop", "\x00?", "--stop", stop, "--address", address
    )
    assert (stopped["finish_reason"], stopped["stopped_by"]) == ("stop", stop)
    assert stopped["text"] == text.partition(stop)[0]


def test_interrupted_generate_is_cancelled(address: str) -> None:
    """Ctrl+C ends `generate` with 130 and no traceback, and the server gives the request up."""
    arguments = command("generate", long_prompt(), "--address", address)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(address, lambda stats: stats.requests.running == 1)
    process.send_signal(signal.SIGINT)
    output, complaints = process.communicate(timeout=20)
    assert (process.returncode, output, complaints) == (130, b"", b"")
    wait_until(address, lambda stats: stats.requests.running == 0)


# lookup


def test_lookup_says_how_much_is_cached_and_where_it_ends(address: str) -> None:
    """lookup names the token and shows the place in the text where the cached prefix ends, and changes nothing."""
    changed = PROMPT.replace("at the outer wall", "behind the lighthouse", 1)
    arguments = ("--namespace", "lookup", "--address", address)
    assert "nothing that begins like this" in run("lookup", PROMPT, *arguments).stdout
    generate(address, PROMPT, "lookup")
    assert run_json("lookup", PROMPT, *arguments) == {
        "prompt_tokens": len(PROMPT) + 1,
        "cached_tokens": len(PROMPT),
        "miss_reason": "none",
        "miss_position": len(PROMPT),
        "alternative_tokens": 0,
        "cached_characters": len(PROMPT) - 1,
        "elsewhere": [],
        "explanation": "all of it was cached but the last token, which is always computed",
    }
    same = PROMPT.index("at the outer wall")
    for _ in range(2):  # the first look leaves nothing that the second could find
        lines = run("lookup", changed, *arguments).stdout.splitlines()
        assert lines[0].startswith(f"{same + 1} of {len(changed) + 1} prompt tokens are cached (")
        assert re.fullmatch(
            rf"a cached prompt of \d+ tokens is the same up to token {same + 1} and goes on differently", lines[1]
        )
        assert lines[2] == (
            f"the place: ...{changed[same - 32 : same]} <-- cached | not cached --> {changed[same : same + 32]}..."
        )


# stats


def test_stats_json_adds_up(address: str) -> None:
    """`stats --json` is everything the server counts, under stable names."""
    generate(address, PROMPT, "stats")
    stats = json.loads(run("stats", "--json", "--address", address).stdout)
    assert set(stats) == {"address", "blocks", "requests", "tokens", "miss_reasons", "sessions", "uptime", "hints"}
    blocks, tokens = stats["blocks"], stats["tokens"]
    assert blocks["free"] + blocks["cached"] + blocks["leased"] == blocks["total"]
    assert tokens["cached"] + tokens["computed"] == tokens["prompt"] > 0
    assert sum(stats["miss_reasons"].values()) == stats["requests"]["admitted"]


def test_stats_text(address: str) -> None:
    """Without a terminal the numbers are plain text within 80 columns."""
    result = run("stats", "--address", address)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert re.search(r"\d+ waiting, \d+ running; \d+ finished", result.stdout)


def test_watch_as_json_lines(address: str) -> None:
    """`stats --watch --json` is one object per line, here twice."""
    result = run("stats", "--watch", "--json", "--interval", "0.1", "--count", "2", "--address", address)
    first, second = map(json.loads, result.stdout.splitlines())
    assert second["uptime"] > first["uptime"]


def test_watch_needs_a_terminal(address: str) -> None:
    """Without a terminal `stats --watch` names the form that needs none."""
    result = run("stats", "--watch", "--address", address, COLUMNS="200")
    assert result.exit_code == 2
    assert "--watch --json" in words(result.stderr)


# On a terminal


class Terminal:
    """The other side of a pseudo-terminal: what a person sees and types."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.seen = ""
        self._master = master

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until `pattern` has come and forget what is before its end."""
        deadline = time.monotonic() + 20
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            assert self._read(), f"the command ended without {pattern!r} after {self.seen!r}"
        self.seen = self.seen[match.end() :]
        return match[0]

    def wait_for_end(self) -> int:
        """Read until the command has ended; return its exit code."""
        deadline = time.monotonic() + 20
        while self._read():
            assert time.monotonic() < deadline, f"still running after {self.seen!r}"
        return self.process.wait(10)

    def _read(self) -> bool:
        """Read what has come; return whether more may come."""
        if select.select([self._master], [], [], 0.1)[0]:
            try:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the command has closed its side
                return False
        return True


@contextmanager
def on_terminal(*arguments: str) -> Iterator[Terminal]:
    """Run the command on a terminal of its own, in a session of its own, so that control characters signal it."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, *command(*arguments)],
        env=environment(COLUMNS="100"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)


def test_watch_on_a_terminal(address: str) -> None:
    """The live view shows the pool, the rates and how to end it; Ctrl+C does, with exit code 0."""
    with on_terminal("stats", "--watch", "--interval", "0.1", "--address", address) as screen:
        screen.wait_for(r"leased.*cached.*free")
        screen.wait_for(r"per second.*tokens computed.*generated.*requests")
        screen.wait_for("Ctrl\\+C ends")
        screen.type("\x03")
        assert screen.wait_for_end() == 0


def test_chat_on_a_terminal(address: str) -> None:
    """A turn says its cost, Ctrl+C cancels an answer and nothing else, Ctrl+D ends the chat."""
    arguments = ("chat", "--system", long_prompt(), "--max-tokens", "4", "--address", address)
    with on_terminal(*arguments) as screen:
        screen.wait_for("/help lists")
        screen.wait_for("> ")
        screen.type("tell me everything\n")
        wait_until(address, lambda stats: stats.requests.running == 1)
        screen.type("\x03")
        screen.wait_for("cancelled: this turn is not part of the conversation")
        screen.wait_for("> ")
        screen.type("tell me something\n")
        screen.wait_for("prompt tokens = .* cached \\+ .* prefilled")
        screen.wait_for("> ")
        screen.type("/nonsense\n")
        screen.wait_for("there is no /nonsense")
        screen.type("/help\n")
        screen.wait_for("Ctrl\\+D")
        screen.wait_for("> ")
        screen.type("\x04")
        assert screen.wait_for_end() == 0


def test_output_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal control characters of the output are replaced; in a file or pipe it is left as it is."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in (
        (Screen(), "a\ufffd[2J\n\tb\ufffd\ufffd\u00e9"),
        (io.StringIO(), "a\x1b[2J\n\tb\x9b\r\u00e9"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.write(["a\x1b[2J\n", "\tb\x9b\r\u00e9"])
        assert stream.getvalue() == expected + "\n"


# chat


def test_chat_with_piped_turns(address: str) -> None:
    """Piped lines are turns; each turn finds the one before in the cache, /reset begins anew."""
    turns = "Hello, are you there?\nAnd now?\n\n/reset\nHello, are you there?\n"
    arguments = ("chat", "--system", "You are brief.", "--max-tokens", "6", "--namespace", "chat", "--address", address)
    result = run(*arguments, stdin=turns)
    assert result.exit_code == 0
    costs = re.findall(r"([\d,]+) prompt tokens = ([\d,]+) cached \+ ([\d,]+) prefilled", result.stderr)
    (first, _, _), (second, cached, prefilled), (again, all_but_one, one) = (map(int, cost) for cost in costs)
    assert first <= cached == second - prefilled
    assert (again, all_but_one, one) == (first, first - 1, 1)
    assert ">" not in result.stdout.partition("\n")[0][:2]


# Words and numbers


def test_every_reason_has_its_own_words() -> None:
    """Each reason is told in words of its own, with the position where there is one."""
    misses = [Lookup(100, 40, reason, 40) for reason in [*MissReason, None]]
    assert len({sentence(miss) for miss in misses}) == len({phrase(miss) for miss in misses}) == len(misses)
    assert all(len(phrase(miss)) <= 20 for miss in misses)
    for reason in (MissReason.DIVERGED, MissReason.EVICTED, MissReason.INVALIDATED, MissReason.IN_FLIGHT):
        assert "token 40" in sentence(Lookup(100, 40, reason, 40))
        assert "40" in phrase(Lookup(100, 40, reason, 40))


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 0, "-"), (0, 9, "0%"), (1, 900, "<1%"), (1, 2, "50%"), (999, 1000, "99%"), (3, 3, "100%")],
)
def test_percentages_do_not_flatter(part: int, whole: int, text: str) -> None:
    """Almost all is not all, and almost nothing is not nothing."""
    assert terminal.percent(part, whole) == text


def snapshot(uptime: float, *, leased: int = 0, prompt: int = 0, cached: int = 0, generated: int = 0) -> Stats:
    return Stats(
        BlockStats(16, 10_000, 9_000 - leased, 1_000, leased, 0, 65_536),
        RequestStats(0, 0, prompt // 10, prompt // 10, 0, 0, 0),
        TokenStats(prompt, cached, prompt - cached, 0, generated),
        {"never_seen": 3, "none": 0, "diverged": 12},
        uptime,
    )


def test_rates_are_those_of_the_last_seconds() -> None:
    """Rates come from the difference of two snapshots, forget what is long past, and start anew with the server."""
    meter = terminal.RateMeter()
    assert meter.add(snapshot(100.0)) is None
    assert meter.add(snapshot(102.0, prompt=200, cached=150, generated=20)) == terminal.Rates(25.0, 10.0, 10.0, 0.75)
    meter.add(snapshot(150.0, prompt=200, cached=150, generated=20))
    assert meter.add(snapshot(151.0, prompt=200, cached=150, generated=20)) == terminal.Rates(0.0, 0.0, 0.0, None)
    assert meter.add(snapshot(1.0)) is None


def test_the_view_of_the_pool_shows_what_is_there() -> None:
    """What is not empty has a cell, the bar has its length, and the most frequent reason comes first."""
    output = io.StringIO()
    Console(file=output, width=80, highlight=False).print(terminal.stats_view(snapshot(5.0, leased=1)))
    text = output.getvalue()
    (bar,) = re.findall("[█▓░]{5,}", text)
    assert len(bar) == terminal.BAR_CELLS
    assert bar.count("█") == 1
    assert bar.count("▓") == 4
    assert "█ 1 leased  ▓ 1,000 cached  ░ 8,999 free" in text
    assert "10,000 of 16 tokens = 160,000 tokens, 625 MiB" in text
    assert "diverged 12, never seen 3" in text


# serve


def test_serve_ends_cleanly_on_ctrl_c() -> None:
    """Ctrl+C ends a server that has nothing to do with exit code 0."""
    with server() as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
