"""The tensors behind the block pool: keys and values of every layer, by slot.

A slot is one token position of one block: slot = block id * block size + offset. Per
layer the pool holds keys `[kv_heads, slots, key_dim]` and values
`[kv_heads, slots, value_dim]`, so that adjacent blocks are one zero-copy view. Layers
of equal shape are stacked in one allocation; a view over all layers, or a copy of a
block in all layers, is then a single call.

Nothing here knows which block holds what. A block that was never written holds
arbitrary bits, and whoever reads must not read such slots.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefixcache.errors import FailedPrecondition, InvalidArgument

_CGROUPS = (  # limit, usage, statistics; version 2 and version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What one attention layer keeps per token: `kv_heads` keys of `key_dim` and values of `value_dim`."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The layers of a model in the order in which they run, and the precision of the cache."""

    layers: tuple[LayerGeometry, ...]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)
        return numbers * self.dtype.itemsize

    def bytes_per_block(self, block_size: int) -> int:
        return self.bytes_per_token * block_size

    def blocks_in(self, memory: int, block_size: int) -> int:
        """Return how many blocks fit into `memory` bytes; InvalidArgument if not even one does."""
        block = self.bytes_per_block(block_size)
        if memory < block:
            raise InvalidArgument(
                f"a cache memory of {memory} bytes does not hold a single block: {block_size} tokens of this "
                f"model take {block} bytes; give more memory or choose a smaller block size"
            )
        return memory // block


class KVPool:
    """Keys and values for `blocks` blocks of `block_size` tokens.

    `keys[layer]` and `values[layer]` are `[kv_heads, slots, dim]`. Raises
    FailedPrecondition if the device has not that much memory.
    """

    def __init__(self, geometry: KVGeometry, blocks: int, block_size: int, device: str = "cpu") -> None:
        self.geometry = geometry
        self.blocks = blocks
        self.block_size = block_size
        members: dict[LayerGeometry, list[int]] = defaultdict(list)
        for index, layer in enumerate(geometry.layers):
            members[layer].append(index)
        self._members = list(members.values())
        self._stacks = []
        slots = blocks * block_size
        try:
            for layer, indices in members.items():
                shape = (len(indices), layer.kv_heads, slots)
                keys = torch.empty(*shape, layer.key_dim, dtype=geometry.dtype, device=device)
                values = torch.empty(*shape, layer.value_dim, dtype=geometry.dtype, device=device)
                self._stacks.append((keys, values))
        except RuntimeError as error:
            size = geometry.bytes_per_block(block_size) * blocks
            raise FailedPrecondition(
                f"the {size} bytes of cache memory cannot be had on {device} ({error}): give less cache memory"
            ) from None
        self._scratch = torch.empty(0, dtype=geometry.dtype, device=device)
        everything = self.views(0, slots)
        self.keys = [keys.squeeze(1) for keys, _ in everything]
        self.values = [values.squeeze(1) for _, values in everything]

    def views(self, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
        """Return, for each layer, the keys and values in slots first..last-1, without copying.

        Their shape is `[kv_heads, 1, last - first, dim]`.
        """
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for (keys, values), indices in zip(self._stacks, self._members, strict=True):
            some = zip(_cut(keys, first, last), _cut(values, first, last), strict=True)
            pairs.update(zip(indices, some, strict=True))
        return [pairs[layer] for layer in range(len(pairs))]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` `[kv_heads, n, dim]` in the `n` slots that the int64 tensor names."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values `[kv_heads, n, dim]` in the `n` slots of the int64 tensor.

        They are valid until the next call: all calls share one piece of memory, since
        touching fresh memory would cost more than the copying itself.
        """
        keys, values = self._gather((self.keys[layer], self.values[layer]), slots)
        return keys, values

    def gather_keys(self, layer: int, slots: Tensor) -> Tensor:
        """Return copies of the keys alone; see `gather`."""
        (keys,) = self._gather((self.keys[layer],), slots)
        return keys

    def _gather(self, sources: tuple[Tensor, ...], slots: Tensor) -> list[Tensor]:
        shapes = [(source.shape[0], len(slots), source.shape[2]) for source in sources]
        sizes = [math.prod(shape) for shape in shapes]
        if self._scratch.numel() < sum(sizes):
            self._scratch = sources[0].new_empty(sum(sizes))
        copies = torch.split(self._scratch[: sum(sizes)], sizes)
        return [
            torch.index_select(source, 1, slots, out=copy.view(shape))
            for source, copy, shape in zip(sources, copies, shapes, strict=True)
        ]

    def copy_block(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` slots of block `source` to block `target`, in all layers."""
        first, into = source * self.block_size, target * self.block_size
        for stack in self._stacks:
            for tensor in stack:
                tensor[:, :, into : into + tokens] = tensor[:, :, first : first + tokens]


def _cut(stack: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    return stack[:, :, None, first:last].unbind(0)


def free_memory(device: str) -> int:
    """Return how many bytes could be allocated on `device` now.

    On a CPU: what the machine has available, or what the control group of this
    process still allows, whichever is less.
    """
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min([_available(), *_allowed(Path("/sys/fs/cgroup"))])


def _available() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _allowed(root: Path) -> list[int]:
    """Return what the memory control group mounted at `root` leaves; nothing if there is no limit."""
    for limit_file, usage_file, statistics_file in _CGROUPS:
        try:
            limit, usage = (root / limit_file).read_text().strip(), int((root / usage_file).read_text())
            statistics = dict(line.split() for line in (root / statistics_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            reclaimable = int(statistics.get("inactive_file", 0))  # file pages that the kernel drops first
            return [max(int(limit) - usage + reclaimable, 0)]
    return []
