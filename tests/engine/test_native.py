"""Our kernels: what they compute beside attention, how they are compiled, and what happens where they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import stack
from engine.kv import KVGeometry, KVPool, LayerGeometry
from engine.layers import Attending, Decoder, Product
from engine.model import from_pretrained_model
from engine.native import library
from engine.native.kernels import Kernels, kernels_for
from engine.native.panels import panels
from engine.native.step import NativeStep, attention_step, plan_step
from engine.packing import linear, multiplies, packed
from engine.plan import Span
from engine.rows import NativeRows, Rows, TorchRows
from engine.stack import Stack
from tests.engine import models

pytestmark = pytest.mark.skipif(kernels_for(torch.float32, "cpu") is None, reason="no g++")

DTYPES = [torch.float32, torch.bfloat16]
HEADS, KV_HEADS = 4, 2


def kernels(dtype: torch.dtype) -> Kernels:
    found = kernels_for(dtype, "cpu")
    assert found is not None
    return found


def both(width: int, dim: int, dtype: torch.dtype) -> tuple[Rows, Rows]:
    nothing = Product(torch.empty(0), None)
    decoder = Decoder(torch.empty(0), [], torch.ones(width, dtype=dtype), nothing, 1e-5, HEADS, KV_HEADS, dim)
    torch_rows = TorchRows(decoder)
    return torch_rows, NativeRows(decoder, kernels(dtype), torch_rows)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by a rounding at most."""
    tolerance = 1e-6 if one.dtype == torch.float32 else 2**-7
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)


# Rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (1, 64), (3, 70), (90, 256), (1, 576), (300, 100)])
def test_norm_and_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    """They are those of PyTorch's operations, for one row and for as many as are shared out, for any width."""
    torch.manual_seed(0)
    theirs, ours = both(width, 8, dtype)
    hidden, added, weight = (torch.randn(shape).to(dtype) * 3 for shape in ((rows, width), (rows, width), (width,)))
    one, other = hidden.clone(), hidden.clone()
    assert same(theirs.norm(one, added, weight), ours.norm(other, added, weight))
    assert torch.equal(one, other)
    assert same(theirs.norm(one, None, weight), ours.norm(other, None, weight))
    gate_up = torch.randn(rows, 2 * width).to(dtype) * 20
    assert same(theirs.gate(gate_up.clone()), ours.gate(gate_up))


def test_gates_that_are_far_out() -> None:
    """No overflow: a large gate passes, a very negative one is shut."""
    gate_up = torch.tensor([[1e4, -1e4, -200.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert kernels(torch.float32).gate(gate_up).tolist() == [pytest.approx([1e4, 0.0, 0.0, 0.0], abs=1e-30)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("dim", [6, 32, 72])
def test_rotation(dim: int, head_norm: bool, dtype: torch.dtype) -> None:
    """Queries and keys are turned, after a norm if there is one, and what is written to the pool is the same."""
    torch.manual_seed(0)
    spans = [Span(0, 30, [3, 1]), Span(0, 1, [2])]
    rows = sum(span.length for span in spans)
    theirs, ours = both(dim * HEADS, dim, dtype)
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * dim).to(dtype)
    angle = torch.randn(rows, dim // 2).repeat(1, 2)
    weight = torch.rand(HEADS + KV_HEADS, dim).to(dtype) if head_norm else None
    results = []
    for who, native in ((theirs, None), (ours, kernels(dtype))):
        pool = KVPool(KVGeometry((LayerGeometry(KV_HEADS, dim, dim),), dtype), 4, 16)
        for tensor in (*pool.keys, *pool.values):
            tensor.zero_()
        step = attention_step(pool, plan_step(spans, pool, native), native)
        attending = Attending(weight, dim**-0.5, None)
        seen = who.attend(step, angle.cos().to(dtype), angle.sin().to(dtype), qkv.clone(), attending)
        results.append((seen, pool.keys[0], pool.values[0]))
    assert all(same(one, other) for one, other in zip(*results, strict=True))
    assert torch.equal(results[0][2], results[1][2]) and float(results[0][1].abs().sum()) > 0


# Weights that are read where oneDNN has them


@pytest.mark.skipif(not all(multiplies(dtype) for dtype in DTYPES), reason="weights are not packed here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 64), (100, 72), (4096, 256), (33, 2), (1, 16)])
def test_panels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The numbers of a packed weight are found, or the weight is left to oneDNN; they are never taken for others."""
    weight = torch.randn(shape).to(dtype)
    arranged = packed(weight)
    found = panels(arranged, weight)
    if shape[0] >= 256:
        assert found is not None, "the arrangement of this version of oneDNN is not known"
    weight[shape[0] // 2, shape[1] - 1] += 1
    assert panels(arranged, weight) is None


def test_panels_of_something_else() -> None:
    """What has an odd number of inputs, or no address that is told, is left to oneDNN."""
    odd = torch.randn(64, 33).bfloat16()
    assert panels(packed(odd), odd) is None
    assert panels(torch.randn(64, 32), torch.randn(64, 32)) is None


# Whole steps


def logits(forward: Any, loaded: Any, rows: int, keep: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logits of a chunk of `rows` rows behind 20 cached ones, and the keys that were written."""
    pool = KVPool(loaded.geometry, 16, 16)
    for tensor in (*pool.keys, *pool.values):
        tensor.zero_()
    tokens = torch.arange(20 + rows) * 7 % models.VOCAB_SIZE
    for first, last, wanted in ((0, 20, []), (20, 20 + rows, keep)):
        plan = plan_step([Span(first, last - first, list(range(16))[::-1])], pool, loaded.kernels)
        step = attention_step(pool, plan, loaded.kernels)
        with torch.inference_mode():
            result = forward(
                tokens[first:last], torch.arange(first, last), torch.tensor(wanted, dtype=torch.int64), step
            )
    return result, torch.stack(pool.keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 17, 40, 64, 65])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"hidden_size": 96, "intermediate_size": 160, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
    ids=["llama", "wide", "biases", "norms", "window"],
)
def test_a_step_in_one_call(
    architecture: str, changes: dict[str, Any], rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits, and what is written, are those of one call per operation; in any order, and if none are wanted."""
    loaded = from_pretrained_model(models.build(architecture, dtype, **changes), architecture)
    assert isinstance(loaded.forward, Stack)
    if kernels(dtype).runs_steps and multiplies(dtype):
        assert loaded.forward._native is not None
    keep = [rows - 1, 0, rows // 2]
    whole, written = logits(loaded.forward, loaded, rows, keep)
    none, _ = logits(loaded.forward, loaded, rows, [])
    monkeypatch.setattr(stack, "MOST_ROWS", 0)
    parts, also_written = logits(loaded.forward, loaded, rows, keep)
    assert none.shape == (0, models.VOCAB_SIZE) and whole.dtype == parts.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for one, other in ((whole, parts), (written.float(), also_written.float())):
        assert float((one - other).norm()) < tolerance * float(other.norm())


def test_products_of_any_size() -> None:
    """A product in a whole step is oneDNN's: this is what the test above rests on."""
    rows, weight = torch.randn(3, 72), torch.randn(100, 72)
    assert torch.allclose(linear(rows, packed(weight)), rows @ weight.t(), atol=1e-5)


# Compiling


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "library", library.library.__wrapped__)
    return tmp_path / "prefixcache"


def compiler(directory: Path, script: str) -> str:
    """Return a program that calls itself a compiler."""
    path = directory / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def warnings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(library.log, "warning", lambda _, **facts: seen.append(facts))
    return seen


def test_it_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already is used; other flags make another library beside it."""
    monkeypatch.setattr(library, "FLAGS", [*library.FLAGS, "-O0"])
    first = library.compiled()
    assert first.parent == fresh and list(fresh.iterdir()) == [first]
    made = first.stat().st_mtime_ns
    assert library.compiled() == first and first.stat().st_mtime_ns == made
    assert fresh.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(library, "FLAGS", [*library.FLAGS, "-DOTHER"])
    assert library.compiled() != first and len(list(fresh.iterdir())) == 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no g++"),
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "no such thing"),
        (
            'test "$1" = --version && exit; for last; do :; done; echo "no library" > "$last"',
            "file too short",
        ),
    ],
    ids=["missing", "failing", "garbage"],
)
def test_without_a_compiler(
    script: str | None, reason: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernels are used, and the log says why and what to do."""
    monkeypatch.setenv("CXX", compiler(tmp_path, script) if script else "no-such-compiler")
    monkeypatch.chdir(tmp_path)
    seen = warnings(monkeypatch)
    assert library.library() is None
    assert len(seen) == 1 and reason in seen[0]["reason"] and "install g++" in seen[0]["advice"]
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_directory_that_others_can_write_to_is_not_trusted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there would be executed."""
    fresh.mkdir()
    fresh.chmod(0o777)
    seen = warnings(monkeypatch)
    assert library.library() is None
    assert "can be written to by others" in seen[0]["reason"]


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, as anything else that keeps the kernels from being written, ends in a warning."""
    monkeypatch.setattr(library, "library", library.library.__wrapped__)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    seen = warnings(monkeypatch)
    assert library.library() is None
    assert "XDG_CACHE_HOME" in seen[0]["advice"]


def test_models_run_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, and where there are none."""
    wanted_not = from_pretrained_model(models.build("llama"), "x", native=False)
    monkeypatch.setattr("engine.native.kernels.library", lambda: None)
    not_there = from_pretrained_model(models.build("llama"), "x")
    for loaded in (wanted_not, not_there):
        assert loaded.kernels is None
        result, _ = logits(loaded.forward, loaded, 5, [4])
        assert result.shape == (1, models.VOCAB_SIZE)


def test_compiling_ahead_needs_no_torch() -> None:
    """`make` does it after installing; it takes as long as the compiler, and no longer when it is done."""
    program = "import sys, runpy; runpy.run_module('engine.native', run_name='__main__'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    *_, path, imported = done.stdout.splitlines()
    assert Path(path) == library.compiled() and imported == "False"


def test_float16_and_gpus_are_left_to_pytorch() -> None:
    """There are no kernels for them, and that is no reason to warn."""
    assert kernels_for(torch.float16, "cpu") is None
    assert kernels_for(torch.float32, "cuda") is None


def test_steps_are_of_the_kind_that_was_asked_for() -> None:
    """A model's own modules attend by our kernels, too."""
    loaded = from_pretrained_model(models.build("gpt2"), "x")
    pool = KVPool(loaded.geometry, 4, 16)
    plan = plan_step([Span(0, 5, [1])], pool, loaded.kernels)
    assert isinstance(attention_step(pool, plan, loaded.kernels), NativeStep)
