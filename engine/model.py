"""Loads a transformers model, or refuses it by name with the reason.

What can be seen from the configuration is refused before the weights are read; the rest
is for the probe, which runs the model. A loaded model is in evaluation mode, on its
device, set to our attention, and comes with everything the engine needs to know of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from xxhash import xxh3_128

from engine import attention
from engine.kv import KVGeometry
from engine.native.kernels import Kernels, kernels_for
from engine.packing import pack
from engine.probe import TOLERANCE, Findings, Forward, difference, probe
from engine.stack import Stack, fits, known
from prefixcache.errors import FailedPrecondition, InvalidArgument, NotFound

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

NO_LIMIT = 2**20
"""Maximum length, in tokens, of a model whose configuration states none."""

DIGEST_WHOLE = 2**28
"""Weights up to this many bytes are digested whole, larger ones by samples."""
DIGEST_SAMPLES = 4096
"""Numbers taken of each tensor of a larger model, evenly spread."""

log = structlog.get_logger()

ADVICE = "serve a decoder-only language model, such as a Llama, Qwen, Mistral, Gemma or GPT-2 one"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and its facts.

    `forward` runs a step, whose attention is that of `kernels`, if any. `architecture` is its
    model type; `vocab_size` the width of its logits; `max_length` the most tokens of prompt and
    output; `fingerprint` (hex) says what it computes: equal for equal configuration, precision
    and weights, in every process.
    """

    forward: Forward
    name: str
    architecture: str
    vocab_size: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    geometry: KVGeometry
    kernels: Kernels | None
    fingerprint: str


def load_model(source: str, dtype: str = "auto", device: str = "auto", *, native: bool = True) -> LoadedModel:
    """Load the model in the directory, or of the hub id, `source`.

    `dtype` is "float32", "bfloat16", "float16" or "auto" (float32 on a CPU, the
    checkpoint's own on a GPU); `device` is "cpu", "cuda" or "auto" (a GPU if there is one).
    Unless `native` is wanted, PyTorch's kernels do all the work.

    Raises NotFound if there is no such model or it cannot be fetched, InvalidArgument
    for an unknown dtype or device, FailedPrecondition if the device is not there or the
    model cannot be served.
    """
    where = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidArgument(f"there is no dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    source = os.path.expanduser(source)
    config = _config(source)
    _check(config)
    precision = DTYPES.get(dtype) or _own_dtype(config, where)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=precision, attn_implementation="eager", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FailedPrecondition(
            f"the weights of {source!r} cannot be loaded ({_first_line(error)}): check that the model is complete"
        ) from error
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        raise FailedPrecondition(
            f"{source!r} lacks weights of its own architecture, among them {missing[0]!r}: it is incomplete, "
            "or not the language model its configuration says"
        )
    if where == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):  # out of the mapped file, which a single one holds whole
            tensor.data = tensor.data.clone()
    path = Path(source)
    return from_pretrained_model(model.to(where), path.resolve().name if path.is_dir() else source, native=native)


def from_pretrained_model(model: PreTrainedModel, name: str, *, native: bool = True) -> LoadedModel:
    """Wrap a model that is in memory; its weights are moved to where a step wants them, and it is of no further use.

    Raises FailedPrecondition if it cannot be served.
    """
    config = model.config
    _check(config)
    dtype = {value: key for key, value in DTYPES.items()}.get(model.dtype)
    if dtype is None:
        raise FailedPrecondition(f"a model in {model.dtype} cannot be served: convert it to {', '.join(DTYPES)}")
    model.train(False)
    model.requires_grad_(False)
    fingerprint = _fingerprint(model, dtype)
    max_length = _max_length(config.get_text_config(decoder=True))
    kernels = kernels_for(model.dtype, model.device.type) if native else None
    findings, forward = _prepare(model, max_length, kernels)
    return LoadedModel(
        forward=forward,
        name=name,
        architecture=config.model_type,
        vocab_size=findings.vocab_size,
        max_length=max_length,
        eos_token_ids=_eos(model),
        dtype=dtype,
        device=model.device.type,
        geometry=findings.geometry,
        kernels=kernels,
        fingerprint=fingerprint,
    )


def _prepare(model: PreTrainedModel, max_length: int, kernels: Kernels | None) -> tuple[Findings, Forward]:
    """Prove that the model can be served; return what was found, and what runs it: its own modules or our stack.

    Every row must come out of the stack as it comes out of the modules: there are no experts to choose otherwise.
    """
    if known(model):
        findings = probe(model, max_length, kernels)
        if fits(model, findings.calls):
            stack = Stack(model, findings.calls, kernels)
            try:
                off = difference(findings.run(stack), findings.logits)
            except Exception as error:  # noqa: BLE001 - the rotary module of any version of transformers runs in it
                reason = f"{type(error).__name__}: {error}"
            else:
                if off <= TOLERANCE[model.dtype]:
                    return findings, stack
                reason = f"logits are off by {off:.1e}"
            stack.give_back()
            log.warning("the model is run by transformers' modules, which takes longer", reason=reason)
    pack(model)
    return probe(model, max_length, kernels), partial(attention.forward, model)


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda"; see `load_model` for what it raises."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InvalidArgument(f"there is no device {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise FailedPrecondition(
            "device cuda was asked for, but PyTorch finds no usable GPU: install a CUDA build of PyTorch and a "
            "driver, or choose --device cpu"
        )
    return device


def _own_dtype(config: PreTrainedConfig, device: str) -> torch.dtype:
    own: torch.dtype | None = getattr(config, "dtype", None)
    return own if device == "cuda" and own in DTYPES.values() and own is not None else torch.float32


def _config(source: str) -> PreTrainedConfig:
    path = Path(source)
    looks_local = source.startswith((".", "/")) or source.count("/") > 1
    if looks_local and not path.is_dir():
        raise NotFound(f"there is no directory {source!r}: give a model's directory or hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise NotFound(f"the directory {source!r} has no config.json: give a directory that save_pretrained wrote")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    except OSError as error:
        if path.is_dir():
            raise FailedPrecondition(f"the configuration in {source!r} cannot be read: {_first_line(error)}") from error
        raise NotFound(
            f"there is no directory {source!r}, and no model of that name could be fetched from the hub "
            f"({_first_line(error)}): check the name, the network, and your access to the model"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"transformers {transformers.__version__} does not know the architecture of {source!r} "
            f"({_first_line(error)}): a newer transformers may, and code that comes with a model is not run"
        ) from error
    return config


def _check(config: PreTrainedConfig) -> None:
    """Raise FailedPrecondition for what the configuration alone shows to be out of reach."""
    architecture = config.model_type
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder, and a decoder with an encoder has no prefix to cache"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "it is not a causal language model"
    else:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if model_class._is_stateful:
            reason = "it keeps a running state instead of keys and values, which cannot be shared by prefix"
        elif not model_class._supports_attention_backend:
            reason = "transformers does not let it use another attention than its own"
        else:
            return
    raise FailedPrecondition(f"models of architecture {architecture!r} cannot be served: {reason}; {ADVICE}")


def _max_length(config: PreTrainedConfig) -> int:
    """Return the longest sequence whose positions mean the same however it is computed.

    "longrope" changes the meaning of all positions once a sequence passes its original
    length: keys cached before would be wrong after, so such a model ends there.
    """
    length = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    originals = [
        kind.get("original_max_position_embeddings") or length for kind in kinds if kind.get("rope_type") == "longrope"
    ]
    return int(min([length, *originals]))


def _eos(model: PreTrainedModel) -> tuple[int, ...]:
    generation = model.generation_config
    found = None if generation is None else generation.eos_token_id
    if found is None:
        found = model.config.get_text_config(decoder=True).eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _fingerprint(model: PreTrainedModel, dtype: str) -> str:
    """Return a digest of configuration, precision and weights, the same in every process."""
    facts = model.config.to_dict()
    for incidental in ("_name_or_path", "architectures", "transformers_version", "dtype", "use_cache"):
        facts.pop(incidental, None)
    digest = xxh3_128(json.dumps([type(model).__name__, facts, dtype], sort_keys=True, default=str).encode())
    tensors = sorted(model.state_dict().items())
    whole = sum(tensor.nbytes for _, tensor in tensors) <= DIGEST_WHOLE
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        numbers = tensor.detach().flatten()
        if not whole:
            numbers = numbers[:: max(numbers.numel() // DIGEST_SAMPLES, 1)]
        digest.update(_bytes(numbers))
    return digest.hexdigest()


def _bytes(numbers: Tensor) -> bytes:
    return numbers.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
