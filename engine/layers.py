"""What a decoder layer of the Llama kind computes with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """A weight `[out, in]`, packed if the processor wants it, and a bias."""

    weight: Tensor
    bias: Tensor | None


class Attending(NamedTuple):
    """How a layer attends: weights `[heads + kv_heads, dim]` of a norm of each head of query and key, if there is
    one; the factor of its scores; its sliding window."""

    head_norm: Tensor | None
    scale: float
    window: int | None


class Layer(NamedTuple):
    """The weights of one layer."""

    norm: Tensor
    qkv: Product
    attending: Attending
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class Decoder(NamedTuple):
    """The weights of all layers and of what surrounds them, and the sizes that they do not tell."""

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Product
    epsilon: float
    heads: int
    kv_heads: int
    dim: int
