"""What a layer of the Llama kind does with its rows between two products: norm, attention, gate.

By PyTorch's operations, or by our kernels in one call each.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import Step
from engine.layers import Attending, Decoder
from engine.native.kernels import Kernels
from engine.native.step import NativeStep


class Rows(Protocol):
    """The work between products. `hidden` and what is added to it are `[rows, width]`."""

    def norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """Add `added`, if any, to `hidden`, in place; return the root-mean-square norm of the sum."""

    def attend(self, step: Step, cosine: Tensor, sine: Tensor, qkv: Tensor, layer: Attending) -> Tensor:
        """Rotate queries and keys by `cosine` and `sine` `[rows, dim]`, and attend; may overwrite `qkv`.

        `qkv` is `[rows, (heads + 2 * kv_heads) * dim]`. Returns `[rows, heads * dim]`.
        """

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return SiLU of the first half of each row times the second half."""


class TorchRows:
    """In PyTorch's operations, as few as will do."""

    def __init__(self, decoder: Decoder) -> None:
        self._root_epsilon = torch.tensor(math.sqrt(decoder.epsilon), device=decoder.norm.device)
        self._dim = decoder.dim
        self._query_key = (decoder.heads, decoder.kv_heads)
        self._turned_and_not = (decoder.heads + decoder.kv_heads, decoder.kv_heads)

    def norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        return self._norm(hidden if added is None else hidden.add_(added), weight)

    def attend(self, step: Step, cosine: Tensor, sine: Tensor, qkv: Tensor, layer: Attending) -> Tensor:
        rows, half = len(qkv), self._dim // 2
        plain, value = qkv.view(1, rows, -1, self._dim).split(self._turned_and_not, 2)
        if layer.head_norm is not None:
            plain = self._norm(plain, layer.head_norm)
        other = plain.roll(half, 3).mul_(sine.unsqueeze(1))
        other[..., :half].neg_()
        turned = (plain * cosine.unsqueeze(1)).add_(other)
        query, key = turned.transpose(1, 2).split(self._query_key, 1)
        seen = step.attend(query, key, value.transpose(1, 2), layer.scale, layer.window, None, None)
        return seen.reshape(rows, -1)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        return functional.silu(gate).mul_(up)

    def _norm(self, vectors: Tensor, weight: Tensor) -> Tensor:
        """Norm over the last dimension. There is no square of `vectors`: fresh memory for it would cost most."""
        length = torch.linalg.vector_norm(vectors, 2, -1, True, dtype=torch.float32)
        root = length.mul_(vectors.shape[-1] ** -0.5).hypot_(self._root_epsilon)
        normed = vectors.div(root)
        if normed.dtype != weight.dtype:
            normed = normed.to(weight.dtype)
        return normed.mul_(weight)


class NativeRows:
    """By our kernels; attention too, if the step's is."""

    def __init__(self, decoder: Decoder, kernels: Kernels, otherwise: TorchRows) -> None:
        self._heads = decoder.heads
        self._epsilon = decoder.epsilon
        self._kernels = kernels
        self._otherwise = otherwise
        self.gate = kernels.gate

    def norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        return self._kernels.norm(hidden, added, weight, self._epsilon)

    def attend(self, step: Step, cosine: Tensor, sine: Tensor, qkv: Tensor, layer: Attending) -> Tensor:
        if not isinstance(step, NativeStep):
            return self._otherwise.attend(step, cosine, sine, qkv, layer)
        seen = step.attend_rotated(qkv, self._heads, cosine, sine, self._epsilon, *layer)
        return seen.view(len(qkv), -1)
