"""The serving benchmark as its users run it, against this project's server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import shapes
from prefixcache.local import LocalServer
from tests.serving import ROOT, environment, python

PNG = b"\x89PNG"
OPTIONS = ("--cache-memory", "64MiB", "--threads", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with a vocabulary that prompts fit into, smaller than any shape of the benchmarks."""
    small = {**shapes.SHAPES["tiny"], "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "small-enough", small)
        yield shapes.make("small-enough", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with LocalServer("--model", str(model), "--dtype", "float32", *OPTIONS, environment=environment()) as server:
        yield server.address


def bench(*arguments: str) -> str:
    """Run the benchmark, without warnings, and return what it writes."""
    return python("-m", "benchmarks.bench_serving", *arguments, timeout=100, cwd=ROOT, OMP_NUM_THREADS="2")


def figures(result: Path, target: str) -> dict[str, dict[str, Any]]:
    """The medians of each label."""
    labels = json.loads(result.read_text())["targets"][target]["labels"]
    return {label: entry["median"] for label, entry in labels.items()}


def test_ttft_of_three_targets(model: Path, address: str, tmp_path: Path) -> None:
    """Two are started by the benchmark, one runs. All have cached what was sent before, in whole blocks, and nothing
    else, and all give the same tokens."""
    result, picture = tmp_path / "ttft.json", tmp_path / "ttft.png"
    theirs = "--cache-bytes 16777216 --page-size 16 --max-batch-tokens 128 --threads 2"
    targets = ("--target", "ours", "--target", f"again=grpc://{address}", "--target", "transformers")
    started = ("--ours-options", " ".join(OPTIONS), "--transformers-options", theirs)
    options = ("--length", "48", "--length", "96", "--suffix", "16", "--pairs", "1", "--repeats", "1", "--seed", "1")
    files = ("--json", str(result), "--plot", str(picture))
    output = bench("ttft", "--model", str(model), "--dtype", "float32", *targets, *started, *options, *files)
    assert "warm / ours" in output
    report = json.loads(result.read_text())
    assert report["errors"] == []
    assert report["options"]["dtype"] == report["targets"]["again"]["dtype"] == "float32"
    for target in ("ours", "again", "transformers"):
        assert target in output
        made = figures(result, target)
        assert {label: entry["cached per request"] for label, entry in made.items()} == {
            "48 cold": 0,
            "48 warm": 32,
            "96 cold": 0,
            "96 warm": 80,
        }
        assert all(entry["ttft p50 ms"] > 0 for entry in made.values())
        assert report["targets"][target]["agreement"] == {"compared": 4, "equal": 4}
        assert report["targets"][target]["peak memory bytes"] > 50 << 20
    assert picture.read_bytes().startswith(PNG)


def test_shared_and_sharing_and_a_picture_of_saved_results(model: Path, address: str, tmp_path: Path) -> None:
    one, other, picture = tmp_path / "shared.json", tmp_path / "sharing.json", tmp_path / "sharing.png"
    common = ("--model", str(model), "--target", f"ours=grpc://{address}", "--repeats", "1")
    sizes = ("--shared", "64", "--own", "8", "--output", "4")
    bench("shared", *common, "--seed", "7", "--requests", "5", *sizes, "--json", str(one))
    made = figures(one, "ours")["shared"]
    # The first computes the shared tokens, the others wait for them.
    assert (made["prompt tokens"], made["cached tokens"], made["output tokens"]) == (5 * 72, 4 * 64, 5 * 4)
    assert made["failed"] == 0
    bench("sharing", *common, "--seed", "8", "--number", "1", "--number", "3", *sizes, "--json", str(other))
    made = figures(other, "ours")["3"]
    assert (made["requests"], made["cached tokens"]) == (3, 3 * 64)
    bench("plot", str(other), str(other), "--output", str(picture))
    assert picture.read_bytes().startswith(PNG)


def test_a_picture_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    command = [sys.executable, "-m", "benchmarks.bench_serving", "plot", str(file), "-o", str(tmp_path / "x.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 2
    assert "no results of bench_serving" in done.stderr
