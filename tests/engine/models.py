"""Tiny models with random weights, one per architecture, made by transformers itself.

`build` makes one in memory, `make` saves it (and, if wanted, a byte-level tokenizer) to
a directory that can be served. The weights are the same every time. They are drawn far
wider than usual, so that attention matters and greedy output does not repeat itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 288
MAX_LENGTH = 512
WINDOW = 12
"""The sliding window of the models that have one: shorter than most prompts of the tests."""
EOS = 261

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA_LIKE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **_HEADS}
_LEARNED = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": MAX_LENGTH}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": WINDOW}

# name: (model type, what differs from the defaults). Names say what the test is after.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "llama-mha": ("llama", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "llama-mqa": ("llama", {**_LLAMA_LIKE, "num_key_value_heads": 1}),
    "gpt_bigcode": ("gpt_bigcode", {**_LEARNED, "multi_query": True}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    "mistral": ("mistral", {**_LLAMA_LIKE, **_SLIDING}),
    "gpt2": ("gpt2", _LEARNED),
    "gpt_neox": ("gpt_neox", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "phi3": ("phi3", {**_LLAMA_LIKE, "num_hidden_layers": 2}),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "opt": (
        "opt",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    ),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, **_EXPERTS, "num_hidden_layers": 2}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt_oss": ("gpt_oss", {**_LLAMA_LIKE, **_EXPERTS, **_SLIDING, "head_dim": 8}),
    "deepseek_v3": (  # keys wider than values
        "deepseek_v3",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
}

# Architectures that cannot be served.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "t5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "bert": ("bert", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}),
}


def build(
    architecture: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any
) -> PreTrainedModel:
    """Return the model in evaluation mode; `changes` go into its configuration."""
    config = configuration(architecture, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model: PreTrainedModel = made.train(False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = EOS
    moved: PreTrainedModel = made.to(dtype).to(device)
    return moved


def configuration(architecture: str, **changes: Any) -> Any:
    """Return the configuration of one of ARCHITECTURES or REFUSED."""
    model_type, options = {**ARCHITECTURES, **REFUSED}[architecture]
    lengths = {} if "n_positions" in options else {"max_position_embeddings": MAX_LENGTH}
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": 256, "eos_token_id": EOS, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **{**tokens, **lengths, **options, **changes})


def make(architecture: str, directory: Path, *, tokenizer: bool = False, **changes: Any) -> Path:
    """Save the model to `directory` / `architecture` and return that path."""
    path = directory / architecture
    build(architecture, **changes).save_pretrained(path)
    if tokenizer:
        from engine.embedded.vocabulary import bytewise

        bytewise().save_pretrained(path)
    return path
