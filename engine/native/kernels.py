"""The kernels, called with tensors.

Every tensor must be dense, on the CPU and of the kernels' precision; whoever calls sees
to that, nothing is checked.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from engine.native.library import library

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class AttentionArguments(ctypes.Structure):
    """`struct Attention` of attention.h."""

    _fields_ = (
        ("query", c_void_p),
        ("query_row", c_int64),
        ("query_head", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("keys_head", c_int64),
        ("values_head", c_int64),
        ("out", c_void_p),
        ("sinks", c_void_p),
        ("reads", c_void_p),
        ("slots", c_void_p),
        ("reads_count", c_int32),
        ("rows", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("key_dim", c_int32),
        ("value_dim", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("threads", c_int32),
    )


class RotationArguments(ctypes.Structure):
    """`struct Rotation` of rows.h."""

    _fields_ = (
        ("qkv", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("head_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("keys_head", c_int64),
        ("values_head", c_int64),
        ("slots", c_void_p),
        ("rows", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
        ("epsilon", c_float),
        ("threads", c_int32),
    )


class Kernels:
    """The kernels of one precision."""

    def __init__(self, functions: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._functions = functions
        self.dtype = dtype
        self.attend = self.function("attend", ctypes.POINTER(AttentionArguments))
        self.rotate = self.function("rotate", ctypes.POINTER(RotationArguments))
        self._norm = self.function("norm", *4 * [c_void_p], c_int32, c_int32, c_float, c_int32)
        self._gate = self.function("gate", *2 * [c_void_p], c_int32, c_int32, c_int32)

    def function(self, name: str, *arguments: Any) -> Any:
        """Return the function of this name that takes these types."""
        found = getattr(self._functions, f"{name}_{NAMES[self.dtype]}")
        found.argtypes, found.restype = arguments, None
        return found

    @property
    def runs_steps(self) -> bool:
        """Whether there is a function for whole steps: not without products of pairs where they are needed."""
        return hasattr(self._functions, f"step_{NAMES[self.dtype]}")

    def norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Add `added` to `hidden` `[rows, width]`, in place, and return the root-mean-square norm of the sum."""
        out = torch.empty_like(hidden)
        rows, width = hidden.shape
        more = None if added is None else added.data_ptr()
        threads = torch.get_num_threads()
        self._norm(hidden.data_ptr(), more, weight.data_ptr(), out.data_ptr(), rows, width, epsilon, threads)
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return SiLU of the first half of each row `[rows, 2 * width]` times the second half."""
        rows, both = gate_up.shape
        out = gate_up.new_empty(rows, both // 2)
        self._gate(gate_up.data_ptr(), out.data_ptr(), rows, both // 2, torch.get_num_threads())
        return out


def kernels_for(dtype: torch.dtype, device: str) -> Kernels | None:
    """Return the kernels for models of this precision on this device, or None if there are none."""
    if device != "cpu" or dtype not in NAMES:
        return None
    functions = library()
    return None if functions is None else Kernels(functions, dtype)
