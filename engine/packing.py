"""Weights of a CPU model in the layout that its matrix products want.

PyTorch multiplies by a weight as the checkpoint has it: row by row, which the kernels
then rearrange, or put up with, in every call. Rearranged once at load, a product takes
a third to a half of the time in float32 and about two thirds in bfloat16 when few rows
are decoded. It is what `torch.compile` does when it freezes a model, without compiling.

The packed weight takes the place of the plain one, so it costs no memory; except where
the output layer shares its weight with the embedding, which needs the plain one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ROWS = 64
"""How many rows the layout is chosen for. Measured with weights of 256 to 49,152 rows: layouts for 64 and
for 2,048 rows are equally quick from 1 to 512 rows, one for a single row is up to twice as slow."""

_linear = torch.ops.mkldnn._linear_pointwise.default


def packed(weight: Tensor) -> Tensor:
    """Return the weight `[out, in]` in the layout of its products; `to_dense` gives it back bit by bit."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    return result


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `nn.functional.linear` does, by oneDNN; the weight `[out, in]` may be packed.

    A plain one must be dense (or the transpose of a dense one): for others there is no fast kernel.
    """
    result: Tensor = _linear(rows, weight, bias, "none", [], "")
    return result


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Say whether oneDNN has products of this precision for this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def packs(model: PreTrainedModel) -> bool:
    """Say whether there are products for packed weights of the model's precision where it is."""
    return model.device.type == "cpu" and multiplies(model.dtype)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight; takes what `nn.Linear` takes."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._packed = packed(weight)

    @property
    def weight(self) -> Tensor:
        """The plain weight, unpacked anew; for models that look at it."""
        plain: Tensor = self._packed.to_dense()
        return plain

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows, self._packed, self.bias)


def pack(model: PreTrainedModel) -> int:
    """Replace a CPU model's linear layers by packed ones, as far as the processor has kernels for their precision.

    Returns how many were replaced.
    """
    if not packs(model):
        return 0
    count = 0
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    weight = layer.weight
                elif type(layer) is Conv1D:  # GPT-2's name for a linear layer with its weight transposed
                    weight = layer.weight.t()
                else:
                    continue
                setattr(parent, name, PackedLinear(weight, layer.bias))
                count += 1
    return count
