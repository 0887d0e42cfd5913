"""Packed weights give the products that plain ones give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.packing import PackedLinear, pack
from tests.engine import models

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


def layers(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_a_packed_layer_is_the_layer(dtype: torch.dtype, bias: bool, rows: int) -> None:
    """For any number of rows, with and without bias, also of a view that is not contiguous."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias, dtype=dtype)
    packed = PackedLinear(plain.weight, plain.bias)
    several = torch.randn(1, rows, 96, dtype=dtype)[:, :, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(packed(several), plain(several), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(packed.weight, plain.weight)
    assert (packed.in_features, packed.out_features) == (48, 80)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral"])
def test_a_packed_model_is_the_model(architecture: str) -> None:
    """Every linear layer is replaced, whatever its model calls it, and the logits stay."""
    model, packed = models.build(architecture), models.build(architecture)
    plain = len(layers(model, nn.Linear)) + len(layers(model, Conv1D))
    assert pack(packed) == plain == len(layers(packed, PackedLinear))
    tokens = torch.randint(0, models.VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(packed(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_shared_embedding_stays_plain() -> None:
    """The output layer is packed, the embedding it shares its weight with is not touched."""
    model: Any = models.build("llama", tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    pack(model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert torch.equal(model.get_output_embeddings().weight, before)


def test_plain_weights_are_let_go() -> None:
    """Of the linear layers, only biases are left as parameters."""
    model = models.build("llama")
    pack(model)
    assert all(parameter.ndim == 1 or "embed" in name for name, parameter in model.named_parameters())


def test_a_precision_without_kernels_is_left_alone() -> None:
    """float64 stays as it is."""
    model = models.build("llama").double()
    assert pack(model) == 0
    assert not layers(model, PackedLinear)
