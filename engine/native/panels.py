"""Where the numbers of a packed weight lie.

oneDNN does not say how it arranges a weight, so it is found out: one arrangement after
another is compared with what is in memory, number by number. Kernels may read weights
that way, so that they need none of their own; what is not recognized is left to oneDNN.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (64, 48, 32, 24, 16, 8)
COMPARED = 2**22
"""Numbers compared at a time."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight `[out, in]` as panels of `width` outputs each: `[inputs, width]`, or with 16 bits per number
    `[inputs / 2, width, 2]`. What is missing of whole panels is zero."""

    address: int
    inputs: int
    width: int


def panels(packed: Tensor, plain: Tensor) -> Panels | None:
    """Return the arrangement of a packed weight whose plain form is given, or None if it is another one."""
    outputs, inputs = plain.shape
    together = 4 // plain.itemsize
    if inputs % together:
        return None
    try:
        address, size = (int(of(packed)) for of in (torch.ops.mkldnn.data_ptr, torch.ops.mkldnn._nbytes))
    except (AttributeError, RuntimeError):  # other versions of PyTorch may not tell
        return None
    memory = (ctypes.c_uint8 * size).from_address(address)
    numbers = torch.frombuffer(memory, dtype=plain.dtype)
    for width in WIDTHS:
        count = -(-outputs // width)
        padded, rest = divmod(len(numbers), count * width)
        if not rest and padded >= inputs and not padded % together:
            found = numbers.view(count, padded // together, width, together)
            if _holds(found, plain):
                return Panels(address, padded, width)
    return None


def _holds(found: Tensor, plain: Tensor) -> bool:
    """Say whether `[panels, in / together, width, together]` are the numbers of `[out, in]`."""
    count, rows, width, together = found.shape
    step = max(COMPARED // (rows * width * together), 1)
    for first in range(0, count, step):
        some = found[first : first + step].permute(0, 2, 1, 3).reshape(-1, rows * together)
        right = plain[first * width : (first + step) * width]
        if not torch.equal(some[: len(right), : plain.shape[1]], right):
            return False
    return True
