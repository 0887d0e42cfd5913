"""Loading: what is learnt of a model, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine import embedded, probe
from engine.attention import AttentionStep
from engine.kv import LayerGeometry
from engine.model import from_pretrained_model, load_model
from engine.native.step import NativeStep
from prefixcache.errors import FailedPrecondition, InvalidArgument, NotFound
from tests.engine import models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama with a tokenizer."""
    return models.make("llama", tmp_path_factory.mktemp("models"), tokenizer=True)


def test_facts_of_a_saved_model(saved: Path) -> None:
    """They come from its own configuration and from running it."""
    loaded = load_model(str(saved), device="cpu")
    assert (loaded.name, loaded.architecture) == ("llama", "llama")
    assert (loaded.dtype, loaded.device) == ("float32", "cpu")
    assert (loaded.vocab_size, loaded.max_length) == (models.VOCAB_SIZE, models.MAX_LENGTH)
    assert loaded.eos_token_ids == (models.EOS,)
    assert loaded.geometry.layers == (LayerGeometry(2, 8, 8),) * 3
    assert loaded.geometry.dtype is torch.float32


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_served_model_is_for_inference(architecture: str) -> None:
    """It is in evaluation mode, and nothing of it wants gradients."""
    model = models.build(architecture).train()
    from_pretrained_model(model, "x")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_architecture_passes_the_probe(architecture: str) -> None:
    """With room to spare: agreement with the model's own attention is fifty times better than asked for."""
    model = models.build(architecture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(probe.TOLERANCE, torch.float32, 2e-6)
        loaded = from_pretrained_model(model, "here")
    assert loaded.vocab_size == models.VOCAB_SIZE
    assert len(loaded.geometry.layers) == model.config.num_hidden_layers


def test_keys_may_be_wider_than_values() -> None:
    """What is cached is what the layers pass, whatever the configuration calls it."""
    loaded = from_pretrained_model(models.build("deepseek_v3"), "here")
    assert set(loaded.geometry.layers) == {LayerGeometry(4, 16, 12)}


def test_end_of_sequence_may_be_several_tokens_or_none() -> None:
    """As the generation configuration says; else as the model's configuration says."""

    def served(generation: int | list[int] | None, configured: int | None) -> tuple[int, ...]:
        model = models.build("llama")
        assert model.generation_config is not None
        model.generation_config.eos_token_id = generation
        model.config.eos_token_id = configured
        return from_pretrained_model(model, "x").eos_token_ids

    assert served([3, 5], models.EOS) == (3, 5)
    assert served(None, models.EOS) == (models.EOS,)
    assert served(None, None) == ()


def test_a_rope_that_changes_its_mind_limits_the_length() -> None:
    """Past its original length, "longrope" would turn cached keys wrong, so a sequence ends there."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    changes: dict[str, Any] = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    assert from_pretrained_model(models.build("phi3", **changes), "x").max_length == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_precision_is_as_asked(saved: Path, dtype: str) -> None:
    """What is computed and what is cached have it."""
    loaded = load_model(str(saved), dtype=dtype, device="cpu")
    assert loaded.dtype == dtype
    assert str(loaded.geometry.dtype) == f"torch.{dtype}"
    findings = probe.probe(AutoModelForCausalLM.from_pretrained(saved, dtype=dtype), models.MAX_LENGTH)
    expected = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    assert probe.difference(findings.run(loaded.forward), findings.logits) < expected


def test_automatic_precision_on_a_cpu_is_float32(tmp_path: Path) -> None:
    """Whatever the checkpoint has."""
    path = models.make("llama", tmp_path)
    models.build("llama", torch.bfloat16).save_pretrained(path)
    assert load_model(str(path), device="cpu").dtype == "float32"


def test_fingerprint_is_the_same_in_every_process(saved: Path) -> None:
    """It does not depend on hash seeds, on the directory, or on whether the model was saved."""
    program = f"from engine.model import load_model; print(load_model({str(saved)!r}, device='cpu').fingerprint)"
    elsewhere = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert elsewhere == load_model(str(saved), device="cpu").fingerprint
    assert elsewhere == from_pretrained_model(models.build("llama"), "other").fingerprint


def test_fingerprint_tells_models_apart(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, precision or configuration: another fingerprint; also when only samples are digested."""
    for limit in (2**28, 0):
        monkeypatch.setattr("engine.model.DIGEST_WHOLE", limit)
        seen = {from_pretrained_model(models.build("llama"), "x").fingerprint}
        seen.add(load_model(str(saved), dtype="bfloat16", device="cpu").fingerprint)
        seen.add(from_pretrained_model(models.build("llama", rope_theta=5.0, rms_norm_eps=1e-4), "x").fingerprint)
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
            model = models.build("llama")
            model.get_parameter(name).data[0, 0] += 1
            seen.add(from_pretrained_model(model, "x").fingerprint)
        assert len(seen) == 6


# What is refused


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bloom", "another attention than its own"),
        ("gpt_neo", "another attention than its own"),
        ("mamba", "running state"),
        ("t5", "encoder-decoder"),
    ],
)
def test_refused_by_name_before_weights_are_read(architecture: str, reason: str, tmp_path: Path) -> None:
    """The configuration is enough; the message names the architecture and says what to do."""
    models.configuration(architecture).save_pretrained(tmp_path)
    with pytest.raises(
        FailedPrecondition, match=f"architecture '{architecture}' cannot be served: .*{reason}.* serve "
    ):
        load_model(str(tmp_path), device="cpu")


def test_refused_by_the_probe() -> None:
    """BERT claims the attention interface, and its attention is not causal."""
    with pytest.raises(FailedPrecondition, match=r"architecture 'bert' cannot be served.* serve another model"):
        from_pretrained_model(models.build("bert"), "x")


@pytest.mark.parametrize("kind", [AttentionStep, NativeStep])
def test_wrong_logits_are_refused(kind: type[AttentionStep], monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that honours everything but is wrong does not pass."""
    right = kind.attend

    def wrong(self: AttentionStep, query: Tensor, *others: object) -> Tensor:
        return right(self, query * 1.01, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "attend", wrong)
    with pytest.raises(FailedPrecondition, match=r"architecture 'llama' .* logits are off by .*e-0"):
        from_pretrained_model(models.build("llama"), "x", native=kind is NativeStep)


def test_layers_without_our_attention_are_refused() -> None:
    """A layer that calls something else would have no cached prefix."""
    model = models.build("llama")
    model.config.num_hidden_layers = 4
    with pytest.raises(FailedPrecondition, match="4 layers call the attention interface 3 times"):
        from_pretrained_model(model, "x")


def test_kinds_of_attention_that_are_not_known_are_refused() -> None:
    """So are windows that layers do not pass on."""
    model = models.build("gemma2")
    kinds = list(model.config.layer_types)
    model.config.layer_types = ["chunked_attention", *kinds[1:]]
    with pytest.raises(FailedPrecondition, match="'chunked_attention'"):
        from_pretrained_model(model, "x")
    model.config.layer_types = ["full_attention", *kinds[1:]]
    with pytest.raises(FailedPrecondition, match=f"'full_attention' passes {models.WINDOW}"):
        from_pretrained_model(model, "x")
    llama = models.build("llama")
    llama.config.sliding_window = 5
    with pytest.raises(FailedPrecondition, match="limited to 5 tokens"):
        from_pretrained_model(llama, "x")


def test_a_model_that_fails_is_refused_by_name() -> None:
    """An exception from inside a model's own code becomes a clear error."""
    model = models.build("llama")
    model.get_submodule("model.layers.1").register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(FailedPrecondition, match=r"'llama' cannot be served.*ZeroDivisionError"):
        from_pretrained_model(model, "x")


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_architecture_passes_in_half_precision(architecture: str, dtype: torch.dtype) -> None:
    """Rounding, and an expert chosen otherwise for a few tokens, are no reason to refuse a model."""
    assert from_pretrained_model(models.build(architecture, dtype), "x").geometry.dtype is dtype


def test_double_precision_is_refused() -> None:
    """There is no cache for it."""
    with pytest.raises(FailedPrecondition, match=r"torch\.float64"):
        from_pretrained_model(models.build("llama", torch.float64), "x")


def test_no_such_directory(tmp_path: Path) -> None:
    """A path that is none, and a directory without a model, are named."""
    with pytest.raises(NotFound, match=r"there is no directory .*nothing"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(NotFound, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id that cannot be fetched says what was tried."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match="no model of that name could be fetched from the hub"):
        load_model("nobody/no-such-model")


def test_broken_directories(tmp_path: Path, saved: Path) -> None:
    """An unknown architecture, an unreadable configuration, missing and incomplete weights."""
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "frobnicator"}')
    with pytest.raises(FailedPrecondition, match=r"does not know the architecture .*frobnicator"):
        load_model(str(tmp_path))
    config.write_text('{"model_type":')
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        load_model(str(tmp_path))
    config.write_text((saved / "config.json").read_text())
    with pytest.raises(FailedPrecondition, match=r"weights of .* cannot be loaded"):
        load_model(str(tmp_path))
    changed = json.loads(config.read_text())
    config.write_text(json.dumps({**changed, "num_hidden_layers": 4}))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(FailedPrecondition, match=r"lacks weights .*layers\.3"):
        load_model(str(tmp_path))


def test_unknown_device_and_dtype(saved: Path) -> None:
    """The message lists what there is."""
    with pytest.raises(InvalidArgument, match="no device 'tpu': choose auto, cpu or cuda"):
        load_model(str(saved), device="tpu")
    with pytest.raises(InvalidArgument, match="no dtype 'int4': choose auto, float32"):
        load_model(str(saved), dtype="int4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(saved: Path) -> None:
    """Asking for one is an error, leaving it open is not."""
    with pytest.raises(FailedPrecondition, match="--device cpu"):
        load_model(str(saved), device="cuda")
    assert load_model(str(saved), device="auto").device == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_gpu(saved: Path, dtype: str) -> None:
    """The probe passes there too."""
    assert load_model(str(saved), dtype=dtype, device="cuda").device == "cuda"


def test_the_embedded_model_can_be_served() -> None:
    """The model that needs no download is a directory like any other, and has its name."""
    loaded = load_model(str(embedded.DIRECTORY))
    assert (loaded.name, loaded.architecture, loaded.max_length) == ("embedded", "llama", 4096)
