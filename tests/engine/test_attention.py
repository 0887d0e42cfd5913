"""Attention over blocks against plain, dense attention."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import attention
from engine.attention import AttentionStep, Kernel, call_slots, fused_kernel, head_kernel, plain_kernel
from engine.kv import KVGeometry, KVPool, LayerGeometry
from engine.native.kernels import kernels_for
from engine.native.step import READ_SLOTS, NativeStep
from engine.plan import Plan, Span
from prefixcache.errors import FailedPrecondition

SIZE = 4
BLOCKS = 300
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


NO_KERNELS = pytest.mark.skipif(kernels_for(torch.float32, "cpu") is None, reason="no g++")
WHO = pytest.mark.parametrize("native", [False, pytest.param(True, marks=NO_KERNELS)], ids=["torch", "native"])
"""Whether PyTorch's kernels attend, or ours."""


def dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return `[heads, rows, value_dim]` in float64: row i is at position start + i and sees keys 0..start + i."""
    heads, rows, _ = query.shape
    group = heads // keys.shape[0]
    query, keys, values = query.double(), keys.double(), values.double()
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = query @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    place = torch.arange(rows, device=query.device)[:, None] + start
    key = torch.arange(keys.shape[1], device=query.device)
    hidden = key > place
    if window is not None:
        hidden |= key <= place - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(heads, rows, 1)), -1)
        return scores.softmax(-1)[..., :-1] @ values
    return scores.softmax(-1) @ values


class Sequences:
    """Sequences with known keys and values, laid out in a pool up to where their chunks start."""

    def __init__(
        self,
        spans: list[Span],
        geometry: LayerGeometry,
        heads: int,
        dtype: torch.dtype,
        device: str,
        native: bool = False,
    ) -> None:
        torch.manual_seed(len(spans))
        self.spans = spans
        self.native = native
        kind = {"dtype": dtype, "device": device}
        self.pool = KVPool(KVGeometry((geometry,), dtype), BLOCKS, SIZE, device)
        for tensor in (self.pool.keys[0], self.pool.values[0]):
            tensor.fill_(torch.nan)
        by_slot = {
            "keys": torch.randn(geometry.kv_heads, BLOCKS * SIZE, geometry.key_dim, **kind),  # type: ignore[call-overload]
            "values": torch.randn(geometry.kv_heads, BLOCKS * SIZE, geometry.value_dim, **kind),  # type: ignore[call-overload]
        }
        self.keys, self.values, self.queries = [], [], []
        for span in spans:
            slots = [span.blocks[p // SIZE] * SIZE + p % SIZE for p in range(span.end)]
            self.keys.append(by_slot["keys"][:, slots])
            self.values.append(by_slot["values"][:, slots])
            self.queries.append(torch.randn(heads, span.length, geometry.key_dim, device=device).to(dtype))
            cached = torch.tensor(slots[: span.start], dtype=torch.int64, device=device)
            self.pool.write(0, cached, self.keys[-1][:, : span.start], self.values[-1][:, : span.start])

    def check(self, tolerance: float, slots_per_call: int | None = None, **options: Any) -> None:
        """Run one step and compare every row with dense attention."""
        if slots_per_call is None:
            slots_per_call = (
                READ_SLOTS if self.native else call_slots(self.pool.geometry, self.pool.keys[0].device.type)
            )
        plan = Plan(self.spans, SIZE, slots_per_call, scattered=self.native)
        step = AttentionStep(self.pool, plan)
        if self.native:
            kernels = kernels_for(self.pool.geometry.dtype, "cpu")
            assert kernels is not None
            step = NativeStep(self.pool, plan, kernels)

        def packed(tensors: list[Tensor], new: bool) -> Tensor:
            # In memory the rows come first and the heads second, as a model's projections leave them.
            rows = [tensors[i][:, -self.spans[i].length :] if new else tensors[i] for i in plan.order]
            return torch.cat(rows, 1).transpose(0, 1).contiguous().transpose(0, 1)[None]

        with torch.inference_mode():
            out = step.attend(
                packed(self.queries, False),
                packed(self.keys, True),
                packed(self.values, True),
                options.get("scale", 0.3),
                options.get("window"),
                options.get("softcap"),
                options.get("sinks"),
            )
        assert out.shape[:2] == (1, plan.rows) and out.is_contiguous() and out.dtype == self.queries[0].dtype
        for index, span in enumerate(self.spans):
            ours = out[0, plan.first_row[index] : plan.first_row[index] + span.length].transpose(0, 1)
            right = dense(
                self.queries[index], self.keys[index], self.values[index], span.start, **{"scale": 0.3, **options}
            )
            assert float((ours.double() - right).abs().max()) < tolerance, index


def tree(shuffled: bool) -> list[Span]:
    """Return a step with everything: groups in groups, cold and warm chunks, long and short tails, a lone row."""
    ids = list(range(BLOCKS))
    if shuffled:
        random.Random(1).shuffle(ids)

    def take(count: int) -> list[int]:
        return [ids.pop() if shuffled else ids.pop(0) for _ in range(count)]

    system = take(12)
    tools = system + take(5)
    spans = [Span(48 + 9, 1, system + take(3)), Span(50, 7, system + take(3)), Span(49, 6, system + take(2))]
    spans += [Span(68 + i, 1, tools + take(2)) for i in range(5)] + [Span(68, 3, tools + take(1))]
    spans += [Span(0, 9, take(3)), Span(0, 1, take(1)), Span(130, 1, take(33)), Span(90, 21, take(28))]
    return spans


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shuffled", [False, True], ids=["adjacent", "scattered"])
@pytest.mark.parametrize("slots_per_call", [1, 16, 10**6])
@pytest.mark.parametrize(
    ("heads", "geometry"),
    [
        (4, LayerGeometry(4, 8, 8)),
        (6, LayerGeometry(2, 16, 16)),
        (3, LayerGeometry(1, 8, 8)),
        (4, LayerGeometry(2, 12, 8)),
    ],
    ids=["mha", "gqa", "mqa", "narrow-values"],
)
def test_equals_dense_attention(
    heads: int, geometry: LayerGeometry, slots_per_call: int, shuffled: bool, device: str
) -> None:
    """For any mix of sequences, layout of blocks, shape of heads, and way of reading."""
    Sequences(tree(shuffled), geometry, heads, torch.float32, device).check(2e-6, slots_per_call)


@WHO
@pytest.mark.parametrize("slots_per_call", [1, 16, 10**6])
@pytest.mark.parametrize("window", [1, 5, 48, 64, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_windows_caps_and_sinks(
    slots_per_call: int, window: int, softcap: float | None, sinks: bool, native: bool
) -> None:
    """A sliding window, soft-capped scores and attention sinks are honoured, together too."""
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    if sinks:
        options["sinks"] = torch.linspace(-1, 2, 4)
    sequences = Sequences(tree(True), LayerGeometry(2, 8, 8), 4, torch.float32, "cpu", native)
    sequences.check(2e-6, slots_per_call, **options)


@WHO
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float, device: str, native: bool) -> None:
    """Partial results are merged in float32; what is left is the rounding of the numbers themselves."""
    if native and not kernels_for(dtype, device):
        pytest.skip("our kernels are for the CPU, and not for float16")
    for geometry in (LayerGeometry(2, 16, 16), LayerGeometry(2, 32, 32), LayerGeometry(2, 24, 40)):
        sequences = Sequences(tree(False), geometry, 4, dtype, device, native)
        sequences.check(tolerance, 16)
        sequences.check(tolerance, 16, window=20, sinks=torch.zeros(4, dtype=dtype, device=device))


@WHO
def test_a_long_prefill_in_a_window(native: bool) -> None:
    """More rows than a tile has, with a cached part in front."""
    spans = [Span(30, 700, list(range(200)))]
    Sequences(spans, LayerGeometry(2, 8, 8), 4, torch.float32, "cpu", native).check(2e-6, 16, window=100)


@NO_KERNELS
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shuffled", [False, True], ids=["adjacent", "scattered"])
@pytest.mark.parametrize(
    ("heads", "geometry"),
    [
        (4, LayerGeometry(4, 8, 8)),
        (6, LayerGeometry(2, 16, 16)),
        (9, LayerGeometry(3, 64, 64)),
        (14, LayerGeometry(1, 32, 32)),
        (4, LayerGeometry(2, 12, 8)),
        (4, LayerGeometry(2, 7, 9)),
        (4, LayerGeometry(1, 80, 128)),
        (2, LayerGeometry(2, 192, 256)),
    ],
    ids=["mha", "gqa", "few", "mqa", "narrow", "odd", "wide", "widest"],
)
def test_our_kernels_equal_dense_attention(
    heads: int, geometry: LayerGeometry, shuffled: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For widths of whole vectors and others, few rows and many, in one thread and cut for several."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    scale = geometry.key_dim**-0.5
    long = [Span(500, 300, list(range(100, 300))), Span(900, 1, list(range(70, 296)))]
    for spans in (tree(shuffled), long):
        for slots_per_call in (1, READ_SLOTS, 10**6):
            Sequences(spans, geometry, heads, torch.float32, "cpu", True).check(3e-6, slots_per_call, scale=scale)
        Sequences(spans, geometry, heads, torch.bfloat16, "cpu", True).check(4e-2, scale=scale)


@pytest.mark.parametrize("kernel", [plain_kernel, head_kernel])
@pytest.mark.parametrize("limit", [2**20, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_rows", [0, 1, 41])
def test_kernels_agree(
    kernel: Kernel, limit: int, causal: bool, mask_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernel and ours, whole and in tiles, give the same output and log-sum-exp."""
    if causal and mask_rows:
        pytest.skip("never asked for together")
    monkeypatch.setattr(attention, "SCORES_LIMIT", limit)
    monkeypatch.setattr(attention, "HEAD_SCORES", limit)
    monkeypatch.setattr(attention, "CAUSAL_ROWS", 32)
    monkeypatch.setitem(attention.FEW_SCORES, torch.float32, 0)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 41, 8), torch.randn(2, 2, 41, 8), torch.randn(2, 2, 41, 8)
    mask = torch.randn(2, 1, mask_rows, 41) if mask_rows else None
    ours = kernel(query, key, value, causal, mask, 0.4, None)
    theirs = fused_kernel(query, key, value, causal, None if mask is None else mask.expand(2, 1, -1, 41), 0.4, None)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=2e-6)


def test_kernels_cap_alike() -> None:
    """Soft-capped scores, with values of another width than keys."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 41, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 4)
    one, other = (kernel(query, key, value, False, None, 0.4, 2.0) for kernel in (plain_kernel, head_kernel))
    assert torch.allclose(one[0], other[0], atol=2e-6) and torch.allclose(one[1], other[1], atol=2e-6)
    assert not torch.allclose(one[0], plain_kernel(query, key, value, False, None, 0.4, None)[0], atol=1e-3)


class Anything:
    """A step that accepts all, to see what is refused before it is asked."""

    def attend(self, *_: object) -> Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prefix_cache_step": None}, "was not given the step"),
        ({"attention_mask": torch.zeros(1)}, "mask of its own"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.zeros(1)}, "'position_bias'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: dict[str, Any], reason: str) -> None:
    """An argument that would change the result raises instead of being dropped."""
    tensor = torch.zeros(1, 1, 1, 4)
    allowed: dict[str, Any] = {
        "prefix_cache_step": Anything(),
        "position_ids": tensor,
        "cu_seq_lens_q": None,
        "output_attentions": False,
    }
    mask = arguments.pop("attention_mask", None)
    attention._attend(torch.nn.Identity(), tensor, tensor, tensor, None, **allowed)
    with pytest.raises(FailedPrecondition, match=reason):
        attention._attend(torch.nn.Identity(), tensor, tensor, tensor, mask, **{**allowed, **arguments})


def test_the_scale_is_the_usual_one_unless_given() -> None:
    """Without `scaling`, scores are divided by the root of the key's width."""
    scales: list[float] = []

    class Noting(Anything):
        def attend(self, *arguments: Any) -> Tensor:
            scales.append(arguments[3])
            return torch.zeros(1)

    tensor = torch.zeros(1, 1, 1, 16)
    attention._attend(torch.nn.Identity(), tensor, tensor, tensor, None, prefix_cache_step=Noting())
    attention._attend(torch.nn.Identity(), tensor, tensor, tensor, None, scaling=2.0, prefix_cache_step=Noting())
    assert scales == [0.25, 2.0]
