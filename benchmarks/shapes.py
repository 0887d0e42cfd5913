"""Models of the benchmarks: well-known shapes with random weights (seed 0), saved with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # 6 million parameters: a step is mostly overhead, which is what it is for.
    "tiny": {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 768,
        "vocab_size": 4096,
        "max_position_embeddings": 16_384,
    },
    # 135 million parameters, the shape of SmolLM2-135M.
    "small": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49_152,
        "max_position_embeddings": 16_384,
        "tie_word_embeddings": True,
    },
    # 355 million parameters, the shape of GPT-2 medium.
    "gpt2-medium": {
        "model_type": "gpt2",
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
        "vocab_size": 50_257,
    },
}


def make(shape: str, directory: Path, dtype: str = "float32") -> Path:
    """Save the model of a shape below `directory`, unless it is there, and return its path."""
    path = directory / f"{shape}-{dtype}"
    if not path.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        from engine.embedded.vocabulary import bytewise

        logging.disable_progress_bar()
        torch.manual_seed(0)
        options = dict(SHAPES[shape])
        config = AutoConfig.for_model(options.pop("model_type"), **options, bos_token_id=0, eos_token_id=1)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        bytewise().save_pretrained(path)
        model.save_pretrained(path)
    return path
