"""Attention over the block pool, as transformers models call it.

Importing this module registers NAME with transformers. A model set to NAME calls
`_attend` in every layer; what to read comes in the model's own keyword arguments
(ARGUMENT), never from a global. The rows of a step are packed as one sequence
`[1, heads, rows, dim]`, and `plan.Plan` says which row reads which slots.

Every read gives a partial result: the output over its keys alone, and the log-sum-exp
of its scores. Two partial results of the same rows merge exactly: the weights of the
two are the softmax of their log-sum-exps.

Shapes here: H query heads, G = H / kv_heads. A read without a mask folds the G heads
of a KV head into the rows, so that one matrix product serves them all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from engine.kv import KVGeometry, KVPool
from engine.plan import Band, Causal, Padded, Plan, Read, Slots
from prefixcache.errors import FailedPrecondition

NAME = "prefix_cache"
ARGUMENT = "prefix_cache_step"

CALL_BYTES = {"cpu": 64 * 2**10, "cuda": 16 * 2**20}
"""Bytes of keys that can be copied in about the time of a kernel call. On the CPU, measured with 4 heads
of 32 and 3 of 64 numbers in float32 and bfloat16: a call, the merge of its result and what surrounds them
take 15 to 20 microseconds; padding 64 tails stops paying at 128 slots (64 KiB) and at 64 slots (48 KiB)."""

SCORES_LIMIT = 2**25
"""Scores (not bytes) that the plain kernel holds at a time."""

# What models pass along that says nothing about the result, because it describes what a
# step already knows or what is wanted besides the output.
_HARMLESS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions"}
    | {"output_hidden_states", "output_router_logits", "return_dict", "layer_idx"}
)

Partial = tuple[Tensor, Tensor]
"""Output `[H, rows, value_dim]` and log-sum-exp `[H, rows]` (float32) over some of the keys."""

Kernel = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, float, float | None], Partial]
"""(query [B, H, L, D], key [B, kv_heads, K, D], value, causal, additive mask, scale, softcap) ->
output [B, H, L, Dv] and log-sum-exp [B, H, L]."""


class Step(Protocol):
    """What travels through the model as ARGUMENT. `attend` is called once per layer, in order."""

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
        """Take `[1, heads, rows, dim]` each and return the output `[1, rows, H, value_dim]`."""


def forward(model: PreTrainedModel, tokens: Tensor, positions: Tensor, keep: Tensor, step: Step) -> Tensor:
    """Run a model set to NAME over packed rows; return the logits `[len(keep), vocabulary]` in float32.

    `tokens`, `positions` (one per row) and `keep` (the rows whose logits are wanted) are
    int64 vectors on the model's device.
    """
    arguments: dict[str, Any] = {ARGUMENT: step}
    selects = _selects_logits(type(model).forward)
    if selects:
        arguments["logits_to_keep"] = keep
    output = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **arguments)
    logits: Tensor = output.logits[0] if selects else output.logits[0, keep]
    return logits.float()


@functools.cache
def _selects_logits(model_forward: Callable[..., object]) -> bool:
    return "logits_to_keep" in inspect.signature(model_forward).parameters


class AttentionStep:
    """One step over a block pool: writes each layer's new keys and values, then reads by plan."""

    def __init__(self, pool: KVPool, plan: Plan) -> None:
        self._pool = pool
        self._plan = plan
        self._layer = 0
        self._device = pool.keys[0].device
        self._reads: dict[int | None, _Reads] = {}
        slots = plan.slots
        self._adjacent = int(slots[-1]) - int(slots[0]) == len(slots) - 1 and bool((slots[1:] > slots[:-1]).all())
        if self._adjacent:
            self._targets = pool.views(int(slots[0]), int(slots[-1]) + 1)
        else:
            self._slots = torch.from_numpy(slots).to(self._device)

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
        layer = self._layer
        self._layer += 1
        if self._adjacent:
            keys, values = self._targets[layer]
            keys.copy_(key.transpose(0, 1))
            values.copy_(value.transpose(0, 1))
        else:
            self._pool.write(layer, self._slots, key[0], value[0])
        reads = self._reads.get(window)
        if reads is None:
            reads = self._reads[window] = _Reads(self._pool, self._plan, window)
        fused = softcap is None and self._device.type == "cpu" and key.shape[-1] == value.shape[-1]
        call = _Call(layer, query, key, value, fused_kernel if fused else plain_kernel, scale, softcap)
        out, lse = reads.run(call)
        if sinks is not None:  # a sink takes part in the softmax and contributes nothing
            out = out * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1)
        return out.transpose(0, 1).to(query.dtype).contiguous()[None]


def call_slots(geometry: KVGeometry, device: str) -> int:
    """Return how many slots of a layer can be copied in about the time of a kernel call."""
    widest = max(layer.kv_heads * layer.key_dim for layer in geometry.layers) * geometry.dtype.itemsize
    return max(CALL_BYTES[torch.device(device).type] // widest, 1)


# Kernels


def fused_kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float, softcap: float | None
) -> Partial:
    """The CPU's own kernel; it has no soft-capping and wants keys and values of one width."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float, softcap: float | None
) -> Partial:
    """The same in plain operations, for any device, width and soft-capping; scores are computed in tiles."""
    batch, heads, rows, _ = query.shape
    tile = max(SCORES_LIMIT // (batch * heads * key.shape[2]), 1)
    if rows > tile:
        if causal:
            mask = torch.full((rows, rows), -torch.inf, device=query.device).triu_(1)
        parts = [
            plain_kernel(
                query[:, :, first : first + tile],
                key,
                value,
                False,
                mask if mask is None or mask.shape[-2] == 1 else mask[..., first : first + tile, :],
                scale,
                softcap,
            )
            for first in range(0, rows, tile)
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    kv_heads = key.shape[1]
    folded = query.reshape(batch, kv_heads, -1, query.shape[3])
    scores = torch.matmul(folded, key.transpose(-1, -2)).float().mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(batch, heads, rows, key.shape[2])
    if causal:
        mask = torch.full((rows, rows), -torch.inf, device=query.device).triu_(1)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.unsqueeze(-1)).exp_().to(value.dtype)
    out = torch.matmul(weights.view(batch, kv_heads, -1, key.shape[2]), value)
    return out.view(batch, heads, rows, value.shape[3]), lse


# Reads, bound to the tensors of a pool


class _Call:
    """What one layer asks: its number, its new tensors `[1, heads, rows, dim]`, and how scores are made."""

    __slots__ = ("kernel", "key", "layer", "query", "scale", "softcap", "value")

    def __init__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float, softcap: float | None
    ) -> None:
        self.layer = layer
        self.query = query
        self.key = key
        self.value = value
        self.kernel = kernel
        self.scale = scale
        self.softcap = softcap


class _Reads:
    """All reads of the layers with one window."""

    def __init__(self, pool: KVPool, plan: Plan, window: int | None) -> None:
        reads = plan.reads(window)
        bound: dict[type, Callable[[Any], _Bound]] = {
            Read: lambda read: _BoundRead(pool, read),
            Causal: _BoundCausal,
            Padded: lambda read: _BoundPadded(pool, read),
            Band: lambda read: _BoundBand(pool, read, window),
        }
        self._base = [bound[type(read)](read) for read in reads.base]
        self._further = [_BoundRead(pool, read) for read in reads.further]
        permutation = reads.permutation()
        self._permutation = None
        if permutation is not None:
            self._permutation = torch.from_numpy(permutation).to(pool.keys[0].device)

    def run(self, call: _Call) -> Partial:
        """Return the result over all keys that the rows see."""
        parts = [read.run(call) for read in self._base]
        out, lse = parts[0]
        if len(parts) > 1:
            out, lse = torch.cat([part for part, _ in parts], 1), torch.cat([part for _, part in parts], 1)
        if self._permutation is not None:
            out, lse = out.index_select(1, self._permutation), lse.index_select(1, self._permutation)
        if self._further and out.dtype != torch.float32:
            out = out.float()
        for read in self._further:
            other, other_lse = read.run(call)
            rows = slice(read.first, read.last)
            _merge(out[:, rows], lse[:, rows], other, other_lse)
        return out, lse


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge another partial result of the same rows into `out` (float32) and `lse`, in place."""
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    out.lerp_(other.to(out.dtype), share)
    torch.logaddexp(lse, other_lse, out=lse)


class _Bound(Protocol):
    def run(self, call: _Call) -> Partial: ...


class _BoundRead:
    def __init__(self, pool: KVPool, read: Read) -> None:
        self.first, self.last = read.first, read.last
        self._source = _Source(pool, read.slots)

    def run(self, call: _Call) -> Partial:
        query = call.query[0, :, self.first : self.last]
        heads, rows, _ = query.shape
        keys, values = self._source.of(call.layer)
        folded = query.reshape(keys.shape[0], 1, -1, query.shape[2])
        out, lse = call.kernel(folded, keys, values, False, None, call.scale, call.softcap)
        return out.view(heads, rows, out.shape[3]), lse.view(heads, rows)


class _BoundCausal:
    def __init__(self, read: Causal) -> None:
        self._rows = slice(read.first, read.last)

    def run(self, call: _Call) -> Partial:
        query, key, value = (tensor[:, :, self._rows] for tensor in (call.query, call.key, call.value))
        out, lse = call.kernel(query, key, value, True, None, call.scale, call.softcap)
        return out[0], lse[0]


class _BoundPadded:
    """Always by the plain kernel: on the CPU it is the quicker one for many short sequences."""

    def __init__(self, pool: KVPool, read: Padded) -> None:
        count, width = read.slots.shape
        device = pool.keys[0].device
        adjacent = read.rows[-1] - read.rows[0] == count - 1  # they are in ascending order
        self._rows = slice(read.rows[0], read.rows[-1] + 1) if adjacent else torch.tensor(read.rows, device=device)
        self._source = _Source(pool, Slots(scattered=read.slots.ravel()))
        self._shape = (count, width)
        hidden = torch.arange(width) >= torch.from_numpy(read.lengths)[:, None]
        self._mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None].to(device)

    def run(self, call: _Call) -> Partial:
        query = call.query[0, :, self._rows]
        heads, count, width = query.shape
        keys, values = (tensor.view(tensor.shape[0], *self._shape, -1) for tensor in self._source.of(call.layer))
        grouped = query.reshape(keys.shape[0], -1, count, width).transpose(1, 2)
        out, lse = plain_kernel(grouped, keys, values, False, self._mask, call.scale, call.softcap)
        return out.transpose(1, 2).reshape(heads, count, out.shape[3]), lse.transpose(1, 2).reshape(heads, count)


class _BoundBand:
    def __init__(self, pool: KVPool, read: Band, window: int | None) -> None:
        assert window is not None
        self._rows = slice(read.first, read.last)
        self._source = _Source(pool, read.slots)
        place = torch.arange(read.last - read.first)[:, None] + read.offset
        key = torch.arange(self._source.count)
        hidden = (key > place) | (key <= place - window)
        self._mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).to(pool.keys[0].device)

    def run(self, call: _Call) -> Partial:
        keys, values = self._source.of(call.layer)
        query = call.query[:, :, self._rows]
        out, lse = call.kernel(
            query, keys.transpose(0, 1), values.transpose(0, 1), False, self._mask, call.scale, call.softcap
        )
        return out[0], lse[0]


class _Source:
    """The keys and values in one run of slots (a view) or in scattered ones (a copy), layer by layer."""

    def __init__(self, pool: KVPool, slots: Slots) -> None:
        self._pool = pool
        self._index: Tensor | None = None
        if slots.scattered is not None:
            self._index = torch.from_numpy(slots.scattered).to(pool.keys[0].device)
            self.count = len(slots.scattered)
        else:
            ((first, last),) = slots.runs
            self._views = pool.views(first, last)
            self.count = last - first

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values `[kv_heads, 1, count, dim]`; a copy is valid until the next one is made."""
        if self._index is None:
            return self._views[layer]
        keys, values = self._pool.gather(layer, self._index)
        return keys.unsqueeze(1), values.unsqueeze(1)


# Registration with transformers


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    prefix_cache_step: Step | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; FailedPrecondition for what could not be honoured."""
    if prefix_cache_step is None:
        raise FailedPrecondition(f"{type(module).__name__} was not given the step: its model drops keyword arguments")
    if attention_mask is not None:
        raise FailedPrecondition(f"{type(module).__name__} brings an attention mask of its own")
    if dropout or is_causal is False:
        raise FailedPrecondition(f"{type(module).__name__} wants dropout or attention that is not causal")
    if not others.keys() <= _HARMLESS:
        for name in others.keys() - _HARMLESS:
            if others[name] is not None and others[name] is not False:
                raise FailedPrecondition(
                    f"{type(module).__name__} passes {name!r}, which this engine does not know how to honour"
                )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return prefix_cache_step.attend(query, key, value, scale, sliding_window, softcap, s_aux), None


def _no_mask(*_: object, **__: object) -> None:
    """The plan knows who sees what."""


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)
