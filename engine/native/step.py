"""The attention of a step by our kernels: one call per layer for everything the plan says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import byref, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention import AttentionStep, call_slots
from engine.kv import KVPool
from engine.native.kernels import AttentionArguments, Kernels, RotationArguments
from engine.plan import Band, Causal, Padded, Plan, Read, Reads, Slots, Span

READ_SLOTS = 32
"""Slots that are read anew in about the time it takes to merge one more partial result."""
EVERYTHING = 2**30
"""An offset behind every key, and a window as wide as any sequence."""
NO_MASK = (EVERYTHING, 2 * EVERYTHING - 1)
"""Offset and window with which a row sees all keys of its read."""

_Row = tuple[int, int, int, int, int, int]
"""`struct Read` of attention.h."""


def plan_step(spans: Sequence[Span], pool: KVPool, kernels: Kernels | None) -> Plan:
    """Return the plan of a step over `spans`, as its attention likes it best."""
    if kernels is None:
        return Plan(spans, pool.block_size, call_slots(pool.geometry, pool.keys[0].device.type))
    return Plan(spans, pool.block_size, READ_SLOTS, scattered=True)


def attention_step(pool: KVPool, plan: Plan, kernels: Kernels | None) -> AttentionStep:
    """Return the attention of one step."""
    return AttentionStep(pool, plan) if kernels is None else NativeStep(pool, plan, kernels)


class PoolAddresses:
    """Where a pool's keys and values lie, layer by layer, and how far heads are apart, in numbers."""

    def __init__(self, pool: KVPool) -> None:
        layers = len(pool.keys)
        self.keys = (c_void_p * layers)(*(keys.data_ptr() for keys in pool.keys))
        self.values = (c_void_p * layers)(*(values.data_ptr() for values in pool.values))
        self.keys_head = pool.keys[0].stride(0)
        self.values_head = pool.values[0].stride(0)


class NativeStep(AttentionStep):
    """Attention by our kernels."""

    def __init__(self, pool: KVPool, plan: Plan, kernels: Kernels) -> None:
        super().__init__(pool, plan)
        self._kernels = kernels
        self._tables: dict[int | None, _Table] = {}
        self._rotation: RotationArguments | None = None

    @functools.cached_property
    def addresses(self) -> PoolAddresses:
        return PoolAddresses(self._pool)

    @property
    def slots_address(self) -> int:
        """Where the slots of the rows' keys and values lie."""
        return int(self._plan.slots.ctypes.data)

    def reading(self, window: int | None) -> tuple[int, int, int]:
        """Return where the reads and slots of layers with this window lie, and how many reads there are."""
        arguments = self._table(window).arguments
        return arguments.reads, arguments.slots, arguments.reads_count

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer = self._write(key, value)
        if query.stride(3) != 1:
            query = query.contiguous()
        _, head, row, _ = query.stride()
        if sinks is not None:
            sinks = sinks.float().contiguous()
        return self._attend(layer, query, row, head, query.shape[1], scale, window, softcap, sinks)[None]

    def attend_rotated(
        self,
        qkv: Tensor,
        heads: int,
        cosine: Tensor,
        sine: Tensor,
        epsilon: float,
        head_norm: Tensor | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend with queries, keys and values as they come out of a layer's product.

        `qkv` is `[rows, (heads + 2 * kv_heads) * dim]`; its queries and keys are rotated by
        `cosine` and `sine` `[rows, dim]`, the same in all layers, after a norm with the weights
        `head_norm` `[heads + kv_heads, dim]` if there are any. Returns `[rows, heads, dim]`.
        """
        layer = self._next_layer()
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        kv_heads, _, dim = keys.shape
        arguments = self._rotation
        if arguments is None:
            arguments = self._rotation = RotationArguments(
                cosine=cosine.data_ptr(),
                sine=sine.data_ptr(),
                keys_head=keys.stride(0),
                values_head=values.stride(0),
                slots=self.slots_address,
                rows=len(qkv),
                heads=heads,
                kv_heads=kv_heads,
                dim=dim,
                epsilon=epsilon,
                threads=torch.get_num_threads(),
            )
        arguments.qkv = qkv.data_ptr()
        arguments.keys, arguments.values = keys.data_ptr(), values.data_ptr()
        arguments.head_norm = None if head_norm is None else head_norm.data_ptr()
        self._kernels.rotate(byref(arguments))
        return self._attend(layer, qkv, qkv.shape[1], dim, heads, scale, window, None, None)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        query_row: int,
        query_head: int,
        heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        rows = self._plan.rows
        out = query.new_empty(rows, heads, values.shape[2])
        arguments = self._table(window).arguments
        arguments.query, arguments.query_row, arguments.query_head = query.data_ptr(), query_row, query_head
        arguments.keys, arguments.values = keys.data_ptr(), values.data_ptr()
        arguments.keys_head, arguments.values_head = keys.stride(0), values.stride(0)
        arguments.out = out.data_ptr()
        arguments.sinks = None if sinks is None else sinks.data_ptr()
        arguments.rows, arguments.heads, arguments.kv_heads = rows, heads, keys.shape[0]
        arguments.key_dim, arguments.value_dim = keys.shape[2], values.shape[2]
        arguments.scale, arguments.softcap = scale, softcap or 0.0
        arguments.threads = torch.get_num_threads()
        self._kernels.attend(byref(arguments))
        return out

    def _table(self, window: int | None) -> _Table:
        table = self._tables.get(window)
        if table is None:
            table = self._tables[window] = _Table(self._plan.reads(window), self._plan.slots)
        return table


class _Table:
    """The reads of the layers with one window, as the kernels take them."""

    def __init__(self, reads: Reads, new: NDArray[np.int64]) -> None:
        self._rows: list[_Row] = []
        self._slots: list[NDArray[np.int64]] = []
        self._count = 0
        for read in (*reads.base, *reads.further):
            self._add(read, new)
        self._reads = np.array(self._rows, dtype=np.int32)
        self._every = np.concatenate(self._slots)
        self.arguments = AttentionArguments(
            reads=self._reads.ctypes.data, slots=self._every.ctypes.data, reads_count=len(self._reads)
        )

    def _add(self, read: Read | Causal | Padded | Band, new: NDArray[np.int64]) -> None:
        if isinstance(read, Causal):
            begin, end = self._see(new[read.first : read.last])
            self._rows.append((read.first, read.last, begin, end, 0, EVERYTHING))
        elif isinstance(read, Padded):
            begin, _ = self._see(read.slots.ravel())
            width = read.slots.shape[1]
            for index, (row, length) in enumerate(zip(read.rows, read.lengths.tolist(), strict=True)):
                first = begin + index * width
                self._rows.append((row, row + 1, first, first + length, *NO_MASK))
        elif isinstance(read, Band):
            begin, end = self._see(_every(read.slots))
            self._rows.append((read.first, read.last, begin, end, read.offset, read.window))
        else:
            begin, end = self._see(_every(read.slots))
            self._rows.append((read.first, read.last, begin, end, *NO_MASK))

    def _see(self, slots: NDArray[np.int64]) -> tuple[int, int]:
        begin = self._count
        self._slots.append(slots)
        self._count += len(slots)
        return begin, self._count


def _every(slots: Slots) -> NDArray[np.int64]:
    if slots.scattered is not None:
        return slots.scattered
    ((first, last),) = slots.runs
    return np.arange(first, last)
