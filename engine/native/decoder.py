"""A whole step of a model by one call, for few rows."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from engine.layers import Decoder, Product
from engine.native.kernels import Kernels
from engine.native.panels import Panels
from engine.native.step import NativeStep

MOST_ROWS = 64
"""Rows up to which one call is quicker than oneDNN's products with our kernels in between. Measured with models of 256
and 576 numbers per row, on a processor with AMX: in float32 up to 128 and 64 rows, in bfloat16 up to 256 and 32."""


class _Product(Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        *((name, c_int32) for name in ("inputs", "outputs", "panel_inputs", "panel_outputs")),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "head_norm", "mlp_norm")),
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
        ("scale", c_float),
        ("reading", c_int32),
    )


class _Model(Structure):
    _fields_ = (
        ("embedding", c_void_p),
        ("layers", POINTER(_Layer)),
        ("norm", c_void_p),
        ("head", _Product),
        *((name, c_int32) for name in ("layers_count", "width", "heads", "kv_heads", "dim")),
        ("epsilon", c_float),
    )


class _Reading(Structure):
    _fields_ = (("reads", c_void_p), ("slots", c_void_p), ("count", c_int32))


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("tokens", "slots", "keep", "cosine", "sine", "keys", "values")),
        ("keys_head", c_int64),
        ("values_head", c_int64),
        ("readings", POINTER(_Reading)),
        ("logits", c_void_p),
        *((name, c_int32) for name in ("rows", "keep_count", "readings_count", "threads")),
    )


class NativeDecoder:
    """A decoder whose weights are all packed in known ways: `found` has them by the id of the packed weight."""

    def __init__(self, kernels: Kernels, decoder: Decoder, found: Mapping[int, Panels]) -> None:
        self._decoder = decoder  # keeps the weights
        self._run = kernels.function("step", POINTER(_Model), POINTER(_Step))
        self._windows = sorted({layer.attending.window or 0 for layer in decoder.layers})

        def product(of: Product) -> _Product:
            outputs, inputs = of.weight.shape
            its = found[id(of.weight)]
            return _Product(its.address, _address(of.bias), inputs, outputs, its.inputs, its.width)

        self._layers = (_Layer * len(decoder.layers))(
            *(
                _Layer(
                    *(_address(weight) for weight in (layer.norm, layer.attending.head_norm, layer.mlp_norm)),
                    *(product(one) for one in (layer.qkv, layer.out, layer.gate_up, layer.down)),
                    layer.attending.scale,
                    self._windows.index(layer.attending.window or 0),
                )
                for layer in decoder.layers
            )
        )
        self._model = _Model(
            embedding=decoder.embedding.data_ptr(),
            layers=self._layers,
            norm=decoder.norm.data_ptr(),
            head=product(decoder.head),
            layers_count=len(decoder.layers),
            width=decoder.embedding.shape[1],
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            dim=decoder.dim,
            epsilon=decoder.epsilon,
        )

    def __call__(self, tokens: Tensor, cosine: Tensor, sine: Tensor, keep: Tensor, step: NativeStep) -> Tensor:
        """Return the logits `[len(keep), vocabulary]` of a step with at most MOST_ROWS rows, in float32."""
        logits = self._decoder.norm.new_empty(len(keep), self._decoder.head.weight.shape[0])
        readings = [_Reading(*step.reading(window or None)) for window in self._windows]
        pool = step.addresses
        arguments = _Step(
            tokens=tokens.data_ptr(),
            slots=step.slots_address,
            keep=keep.data_ptr(),
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            keys=ctypes.addressof(pool.keys),
            values=ctypes.addressof(pool.values),
            keys_head=pool.keys_head,
            values_head=pool.values_head,
            readings=(_Reading * len(readings))(*readings),
            logits=logits.data_ptr(),
            rows=len(tokens),
            keep_count=len(keep),
            readings_count=len(self._windows),
            threads=torch.get_num_threads(),
        )
        self._run(byref(self._model), byref(arguments))
        return logits.float()


def _address(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.data_ptr()
