"""Our forward pass for Llama and its kin: what it gives, what it takes, and what it leaves to transformers."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from engine import attention, model, stack
from engine.model import LoadedModel, from_pretrained_model
from engine.packing import pack, packed
from engine.probe import TOLERANCE, Findings, difference, probe
from engine.rows import TorchRows
from engine.stack import Stack
from tests.engine import models

PARTLY_SLIDING = {"use_sliding_window": True, "sliding_window": models.WINDOW, "max_window_layers": 1}
BIASES = {"attention_bias": True, "mlp_bias": True}


DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {**DEFAULT, "rope_type": kind, "factor": 4.0, **options}}


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
LONGROPE = rope(
    "longrope", short_factor=[1.5] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=models.MAX_LENGTH
)

# name: (architecture, changes). All that the stack claims to take.
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "multi-head": ("llama-mha", {}),
    "multi-query": ("llama-mqa", {}),
    "one head": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "wide heads": ("llama", {"head_dim": 24}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", BIASES),
    "epsilon": ("llama", {"rms_norm_eps": 0.5}),
    "theta": ("llama", {"rope_theta": 100.0}),
    "linear": ("llama", rope("linear")),
    "dynamic": ("llama", rope("dynamic")),
    "llama3": ("llama", LLAMA3),
    "yarn": ("llama", rope("yarn", original_max_position_embeddings=128)),
    "mistral": ("mistral", {}),
    "mistral, full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding": ("qwen2", PARTLY_SLIDING),
    "qwen3": ("qwen3", {}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "qwen3, sliding": ("qwen3", PARTLY_SLIDING),
    "phi3": ("phi3", {}),
    "phi3, sliding": ("phi3", {"sliding_window": models.WINDOW}),
    "phi3, longrope": ("phi3", {**LONGROPE, "original_max_position_embeddings": models.MAX_LENGTH}),
}

# The same families with something that the stack does not do.
LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "heads turned in part": ("phi3", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}),
}


def agrees(loaded: LoadedModel, tolerance: float = 2e-6, **changes: Any) -> bool:
    """Whether three of four rows are, by this, the model's own with eager attention; and all of them nearly."""
    findings = found(loaded.name, torch.float32, loaded.device, **changes)
    logits = findings.run(loaded.forward)
    most, all_rows = (difference(logits, findings.references, share) for share in (0.75, 1.0))
    return most < tolerance and all_rows < 20 * tolerance


def found(architecture: str, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> Findings:
    return probe(models.build(architecture, dtype, device, **changes), models.MAX_LENGTH)


def load(architecture: str, dtype: torch.dtype = torch.float32, native: bool = True, **changes: Any) -> LoadedModel:
    return from_pretrained_model(models.build(architecture, dtype, **changes), architecture, native=native)


def run_by_transformers(loaded: LoadedModel) -> bool:
    return isinstance(loaded.forward, partial) and loaded.forward.func is attention.forward


class Cold(attention.Step):
    """Attention over the rows of one step alone, by the rule itself."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        assert (window, softcap, sinks) == (None, None, None)
        out, _ = attention.plain_kernel(query, key, value, True, None, scale, None)
        return out.transpose(1, 2).contiguous()


# What it gives


@pytest.mark.parametrize("name", TAKEN)
def test_logits_are_those_of_transformers(name: str) -> None:
    """Cold, with a cached prefix, in company and decoded: every row differs by rounding only."""
    architecture, changes = TAKEN[name]
    loaded = load(architecture, **changes)
    assert isinstance(loaded.forward, Stack)
    assert agrees(loaded, **changes)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_where_transformers_rounds(name: str, dtype: torch.dtype) -> None:
    """Most logits are, to the last bit, those of transformers' modules with our attention; none is far off."""
    architecture, changes = TAKEN[name]
    loaded = load(architecture, dtype, **changes)
    assert isinstance(loaded.forward, Stack)
    findings = found(architecture, dtype, **changes)
    logits = findings.run(loaded.forward)
    assert difference(logits, findings.logits, 0.75) < TOLERANCE[dtype] / 10
    assert difference(logits, findings.logits) < TOLERANCE[dtype] / 4


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_only_the_wanted_rows(architecture: str) -> None:
    """In the order asked for; a step that wants none still lets every layer attend."""
    forward = load(architecture).forward
    tokens = torch.arange(20) * 7 % models.VOCAB_SIZE
    with torch.inference_mode():
        whole = forward(tokens, torch.arange(20), torch.arange(20), Cold())
        keep = torch.tensor([19, 3, 11])
        some = forward(tokens, torch.arange(20), keep, Cold())
        calls: list[int] = []

        class Counting(Cold):
            def attend(self, query: Tensor, *others: Any) -> Tensor:
                calls.append(query.shape[2])
                return super().attend(query, *others)

        none = forward(tokens, torch.arange(20), keep[:0], Counting())
    torch.testing.assert_close(some, whole[keep], rtol=1e-5, atol=1e-5)
    assert none.shape == (0, models.VOCAB_SIZE) and none.dtype == whole.dtype == torch.float32
    assert calls == [20] * models.configuration(architecture).num_hidden_layers


# What it takes


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_known_is_left_to_transformers(name: str) -> None:
    """And gives the right logits there."""
    architecture, changes = LEFT[name]
    loaded = load(architecture, **changes)
    assert run_by_transformers(loaded)
    assert agrees(loaded, **changes)


def _hooked(built: Any) -> None:
    built.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def _replaced(built: Any) -> None:
    mlp = built.model.layers[1].mlp
    mlp.forward = lambda hidden: hidden * 2


def _other_linear(built: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows) * 2

    built.model.layers[1].mlp.up_proj.__class__ = Doubled


def _other_class(built: Any) -> None:
    class Other(LlamaForCausalLM):
        pass

    built.__class__ = Other


def _other_epsilon(built: Any) -> None:
    built.model.layers[1].input_layernorm.variance_epsilon = 0.5


def _other_precision(built: Any) -> None:
    built.model.norm.double()


def _additional_module(built: Any) -> None:
    built.model.layers[1].mlp.adapter = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [_hooked, _replaced, _other_linear, _other_class, _other_epsilon, _other_precision, _additional_module],
)
def test_models_that_were_changed_are_left_to_transformers(change: Any) -> None:
    """Whatever makes a module compute something else than its class says."""
    built = models.build("llama")
    findings = probe(built, models.MAX_LENGTH)
    assert stack.fits(built, findings.calls)
    change(built)
    assert not stack.fits(built, findings.calls)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda self, gate_up: gate_up.chunk(2, 1)[1], "logits are off by"),
        (lambda self, gate_up: gate_up.chunk(2, 1)[1] * torch.nan, "logits are off by nan"),
        (lambda self, gate_up: gate_up @ gate_up, "RuntimeError"),
    ],
)
def test_a_stack_that_deviates_is_not_used(wrong: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is run by transformers instead, with the weights it had, and the log says why."""
    reasons: list[str] = []
    monkeypatch.setattr(model.log, "warning", lambda _, reason: reasons.append(reason))
    monkeypatch.setattr(TorchRows, "gate", wrong)
    loaded = load("qwen2", native=False)
    assert run_by_transformers(loaded)
    assert agrees(loaded)
    assert len(reasons) == 1 and reason in reasons[0]


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["biases", "tied", "qwen3", "phi3"])
def test_weights_are_given_back_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    """The model is then what it was."""
    architecture, changes = TAKEN[name]
    built = models.build(architecture, dtype, **changes)
    before = {key: weight.clone() for key, weight in built.state_dict().items()}
    fused = Stack(built, probe(built, models.MAX_LENGTH).calls)
    assert "model.layers.0.self_attn.o_proj.weight" not in built.state_dict()
    fused.give_back()
    after = built.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def numbers(forward: Stack) -> int:
    """How many numbers the stack's tensors hold, each tensor counted once."""
    found: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            found[id(value)] = value.numel()
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for value in vars(forward).values():
        visit(value)
    return sum(found.values())


@pytest.mark.parametrize("name", ["llama", "tied", "biases", "phi3"])
def test_weights_are_held_once(name: str) -> None:
    """The plain ones are let go; only a tied embedding is held twice, plain and packed."""
    architecture, changes = TAKEN[name]
    built = models.build(architecture, **changes)
    embedding = built.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    parameters = list(built.parameters())
    expected = sum(parameter.numel() for parameter in parameters)
    expected += embedding.numel() if changes.get("tie_word_embeddings") else 0
    plain = [weakref.ref(weight) for weight in parameters if weight.ndim == 2 and weight is not embedding]
    del parameters
    loaded = from_pretrained_model(built, "x")
    assert isinstance(loaded.forward, Stack)
    assert all(weight() is None for weight in plain)
    assert numbers(loaded.forward) == expected


def test_layers_are_taken_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is packed, those before have let go of their weights, and those after have not been copied."""
    built: Any = models.build("llama")
    calls = probe(built, models.MAX_LENGTH).calls
    held: list[int] = []

    def noting(weight: Tensor) -> Tensor:
        held.append(sum(parameter.numel() for parameter in built.model.layers.parameters()))
        return packed(weight)

    monkeypatch.setattr("engine.stack.packed", noting)
    whole = sum(parameter.numel() for parameter in built.model.layers.parameters())
    Stack(built, calls)
    layers = len(built.model.layers)
    assert len(held) == 4 * layers + 1
    assert held == sorted(held, reverse=True)
    assert all(held[4 * index] < whole * (layers - index) // layers for index in range(layers))


def test_the_fingerprint_does_not_depend_on_who_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints may be exchanged between processes that run it this way and that."""
    ours = load("qwen2")
    monkeypatch.setattr("engine.model.known", lambda _: False)
    theirs = load("qwen2")
    assert isinstance(ours.forward, Stack) and run_by_transformers(theirs)
    assert ours.fingerprint == theirs.fingerprint


def test_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has no kernels for packed weights, the plain ones are concatenated."""
    monkeypatch.setattr("engine.stack.packs", lambda _: False)
    for name in ("biases", "tied", "qwen3"):
        architecture, changes = TAKEN[name]
        loaded = load(architecture, **changes)
        assert isinstance(loaded.forward, Stack)
        assert agrees(loaded, **changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TAKEN)
def test_on_the_gpu(name: str) -> None:
    """The logits are those of transformers there, too."""
    architecture, changes = TAKEN[name]
    built: PreTrainedModel = models.build(architecture, device="cuda", **changes)
    loaded = from_pretrained_model(built, architecture)
    assert isinstance(loaded.forward, Stack)
    assert agrees(loaded, 1e-4, **changes)
    assert pack(built) == 0
