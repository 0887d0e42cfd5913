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
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from engine.kv import KVGeometry, KVPool
from engine.packing import linear, multiplies
from engine.plan import Band, Causal, Padded, Plan, Read, Slots
from prefixcache.errors import FailedPrecondition

NAME = "prefix_cache"
ARGUMENT = "prefix_cache_step"

CALL_BYTES = {"cpu": 64 * 2**10, "cuda": 16 * 2**20}
"""Bytes of keys that can be copied in about the time of a kernel call. On the CPU, measured with 4 heads
of 32 and 3 of 64 numbers in float32 and bfloat16: a call, the merge of its result and what surrounds them
take 15 to 20 microseconds, in which 64 slots (48 KiB) to 128 (64 KiB) are copied."""

SCORES_LIMIT = 2**25
"""Scores (not bytes) that the plain kernel holds at a time."""
HEAD_SCORES = 2**19
"""The same of the CPU's kernel, so that they stay in the caches."""
CAUSAL_ROWS = 128
"""Rows of a tile where a row sees only those before it: what lies above the diagonal is computed in vain."""
FEW_SCORES = {torch.float32: 2**19, torch.bfloat16: 2**13, torch.float16: 2**13}
"""Up to so many scores PyTorch's fused kernel, a single call, is quicker (measured)."""

# What models pass along that says nothing about the result, because it describes what a
# step already knows or what is wanted besides the output.
_HARMLESS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions"}
    | {"output_hidden_states", "output_router_logits", "return_dict", "layer_idx"}
)

Partial = tuple[Tensor, Tensor]
"""Output `[H, rows, value_dim]` and log-sum-exp `[H, rows]` (float32) over some of the keys."""

Kernel = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, float, float | None], Partial]
"""(query [B, H, L, D], key [B, kv_heads, K, D], value, causal, additive mask that broadcasts to
[B, H, L, K], scale, softcap) ->
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

    @functools.cached_property
    def _targets(self) -> list[tuple[Tensor, Tensor]] | None:
        """Where the keys and values of each layer's rows go, if those places are adjacent."""
        slots = self._plan.slots
        first, last = int(slots[0]), int(slots[-1])
        if last - first == len(slots) - 1 and bool((slots[1:] > slots[:-1]).all()):
            return self._pool.views(first, last + 1)
        return None

    @functools.cached_property
    def _slots(self) -> Tensor:
        return torch.from_numpy(self._plan.slots).to(self._device)

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
        reads = self._reads.get(window)
        if reads is None:
            reads = self._reads[window] = _Reads(self._pool, self._plan, window)
        call = _Call(layer, query, key, value, _kernel(query), scale, softcap)
        out, lse = reads.run(call)
        if sinks is not None:  # a sink takes part in the softmax and contributes nothing
            out = out * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1)
        return out.transpose(0, 1).to(query.dtype).contiguous()[None]

    def _next_layer(self) -> int:
        self._layer += 1
        return self._layer - 1

    def _write(self, key: Tensor, value: Tensor) -> int:
        """Store the new keys and values of the next layer, and return its number."""
        layer = self._next_layer()
        if self._targets is not None:
            keys, values = self._targets[layer]
            keys.copy_(key.transpose(0, 1))
            values.copy_(value.transpose(0, 1))
        else:
            self._pool.write(layer, self._slots, key[0], value[0])
        return layer


def _kernel(query: Tensor) -> Kernel:
    return head_kernel if query.device.type == "cpu" and multiplies(query.dtype) else plain_kernel


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


def head_kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float, softcap: float | None
) -> Partial:
    """For many scores on the CPU: two matrix products per KV head and a tile of rows, with a softmax in between.

    oneDNN multiplies two to four times as fast as the fused kernel, which also converts
    what it reads in half precision. There, scores are in the precision of the model, as
    in transformers' own attention. Products over several heads at once would first copy
    keys and values of other than whole pools.
    """
    batch, heads, rows, width = query.shape
    kv_heads, count = key.shape[1:3]
    fusable = softcap is None and width == value.shape[3]
    if fusable and heads * rows * count <= FEW_SCORES[query.dtype]:
        return fused_kernel(query, key, value, causal, mask, scale, None)
    group = heads // kv_heads
    out = query.new_empty(batch, heads, rows, value.shape[3])
    lse = torch.empty(batch, heads, rows)
    tile = max(HEAD_SCORES // (group * count) // 16, 1) * 16
    if causal:
        tile = min(tile, CAUSAL_ROWS)
        future = _future(query, min(tile, rows))
    for place in range(batch):
        for head in range(kv_heads):
            members = slice(head * group, (head + 1) * group)
            # Dense rows, as the pool's are: a chunk's own are parts of longer ones, which oneDNN takes slowly.
            keys, values = key[place, head].contiguous(), value[place, head].contiguous()
            for first in range(0, rows, tile):
                last = min(first + tile, rows)
                seen = last if causal else count
                some = query[place, members, first:last].reshape(-1, width)
                scores = _scores(some, keys[:seen], scale).view(group, last - first, seen)
                hidden = None
                if causal:
                    hidden = future[: last - first, : last - first]
                elif mask is not None:
                    hidden = mask.expand(batch, heads, rows, count)[place, members, first:last]
                weights, total, lse[place, members, first:last] = _weights(scores, softcap, hidden)
                sums = linear(weights.view(-1, seen), values[:seen].t()).view(group, last - first, -1)
                out[place, members, first:last] = _divided(sums, total)
    return out, lse


def _scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the scaled products `[rows, keys]`."""
    if query.dtype == torch.float32:
        return linear(query * scale, keys)
    scores = query.new_empty(len(query), len(keys))
    return torch.addmm(scores, query, keys.t(), beta=0, alpha=scale, out=scores)  # scaled before it is rounded


def plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float, softcap: float | None
) -> Partial:
    """The same in plain matrix products, for any device, precision, width and soft-capping; in tiles of rows."""
    batch, heads, rows, _ = query.shape
    kv_heads, count = key.shape[1:3]
    tile = max(SCORES_LIMIT // (batch * heads * count) // 16, 1) * 16
    outs, lses = [], []
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        seen = last if causal else count
        folded = query[:, :, first:last].reshape(batch, kv_heads, -1, query.shape[3])
        scores = torch.matmul(folded, key[:, :, :seen].transpose(-1, -2)).mul_(scale)
        hidden = None
        if causal:
            hidden = _future(scores, last - first)
        elif mask is not None:
            hidden = mask.expand(batch, heads, rows, count)[:, :, first:last]
        weights, total, lse = _weights(scores.view(batch, heads, last - first, seen), softcap, hidden)
        sums = torch.matmul(weights.view(batch, kv_heads, -1, seen), value[:, :, :seen])
        outs.append(_divided(sums.view(batch, heads, last - first, -1), total))
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def _future(like: Tensor, rows: int) -> Tensor:
    """Return what hides the later ones of `rows` rows from the earlier ones."""
    return like.new_full((rows, rows), -torch.inf).triu_(1)


def _weights(scores: Tensor, softcap: float | None, hidden: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return weights of the scores `[..., keys]`, what their sums `[..., 1]` are still to be divided by, if anything,
    and the log-sum-exp `[...]` in float32. The scores may be overwritten.

    Scores are capped first, then masked: `hidden` is added to those of the last keys, as many as it has. In half
    precision the divisor is the sum of the rounded weights, so that what rounding loses is not lost a second time.
    """
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores[..., -hidden.shape[-1] :] += hidden
    largest = scores.amax(-1, keepdim=True)
    if scores.dtype == torch.float32:
        weights = scores.softmax(-1)
        return weights, None, (largest - weights.amax(-1, keepdim=True).log_()).squeeze(-1)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)
    return weights, total, (total.log() + largest).squeeze(-1)


def _divided(sums: Tensor, total: Tensor | None) -> Tensor:
    return sums if total is None else sums.div_(total)


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
            Band: lambda read: _BoundBand(pool, read),
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
    """One row of each of several sequences, whose keys lie anywhere.

    On the CPU, values are summed where they lie, and in float32 scores are computed
    where the keys lie: the first is an embedding bag, with weights; the second a matrix
    product of which only some entries are wanted (SDDMM), which PyTorch has for sparse
    matrices. So nothing is copied, and a step pays once for the indices.
    """

    def __init__(self, pool: KVPool, read: Padded) -> None:
        count, width = read.slots.shape
        device = pool.keys[0].device
        adjacent = read.rows[-1] - read.rows[0] == count - 1  # they are in ascending order
        self._rows = slice(read.rows[0], read.rows[-1] + 1) if adjacent else torch.tensor(read.rows, device=device)
        self._pool = pool
        self._shape = (count, width)
        self._slots = torch.from_numpy(read.slots.ravel()).to(device)
        hidden = torch.arange(width) >= torch.from_numpy(read.lengths)[:, None]
        self._mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None].to(device)
        self._indices: dict[tuple[int, int], _Indices] = {}

    def run(self, call: _Call) -> Partial:
        query = call.query[0, :, self._rows]
        heads, count, width = query.shape
        keys, values = self._pool.keys[call.layer], self._pool.values[call.layer]
        kv_heads = keys.shape[0]
        grouped = query.reshape(kv_heads, -1, count, width).transpose(1, 2)  # [kv_heads, count, G, dim]
        if query.device.type != "cpu":
            copies = self._pool.gather(call.layer, self._slots)
            keys, values = (copy.view(kv_heads, *self._shape, -1) for copy in copies)
            out, lse = plain_kernel(grouped, keys, values, False, self._mask, call.scale, call.softcap)
        else:
            indices = self._indices.get((kv_heads, heads))
            if indices is None:
                indices = self._indices[kv_heads, heads] = _Indices(self._slots, self._shape, keys.shape[:2], heads)
            if query.dtype == torch.float32:
                scores = indices.products(grouped, keys)
            else:
                copy = self._pool.gather_keys(call.layer, self._slots).view(kv_heads, *self._shape, -1)
                scores = torch.matmul(grouped, copy.transpose(-1, -2))
            weights, total, lse = _weights(scores.mul_(call.scale), call.softcap, self._mask)
            out = _divided(indices.sums(weights, values), total)
        return out.transpose(1, 2).reshape(heads, count, out.shape[3]), lse.transpose(1, 2).reshape(heads, count)


class _Indices:
    """Where the keys of rows that are read together lie in the pool, for operations that take indices.

    Rows are ordered by KV head, sequence and head of the group; each has `width` keys.
    """

    def __init__(self, slots: Tensor, shape: tuple[int, int], pool: torch.Size, heads: int) -> None:
        (count, width), (kv_heads, every) = shape, pool
        self._shape = (kv_heads, count, heads // kv_heads, width)
        self._size = (heads * count, kv_heads * every)
        kind = torch.int32 if max(self._size[1], heads * count * width) < 2**31 else torch.int64
        places = (
            slots.to(kind).view(1, count, 1, width) + (torch.arange(kv_heads, dtype=kind) * every)[:, None, None, None]
        )
        self._places = places.expand(self._shape).reshape(-1)
        self._begins = torch.arange(0, heads * count * width + 1, width, dtype=kind)
        self._pattern: Tensor | None = None

    def products(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the products `[kv_heads, count, G, width]` of `query` `[kv_heads, count, G, dim]` and its keys."""
        if self._pattern is None:
            nothing = query.new_zeros(self._places.shape)
            self._pattern = torch.sparse_csr_tensor(
                self._begins, self._places, nothing, self._size, check_invariants=False
            )
        width = query.shape[-1]
        found = torch.sparse.sampled_addmm(self._pattern, query.reshape(-1, width), keys.view(-1, width).t(), beta=0)
        products: Tensor = found.values().view(self._shape)
        return products

    def sums(self, weights: Tensor, values: Tensor) -> Tensor:
        """Return the values summed under `weights` `[kv_heads, count, G, width]`: `[kv_heads, count, G, value_dim]`."""
        flat = values.view(-1, values.shape[-1])
        begins = self._begins[:-1]
        out: Tensor = embedding_bag(self._places, flat, begins, mode="sum", per_sample_weights=weights.view(-1))
        return out.view(*self._shape[:-1], -1)


class _BoundBand:
    def __init__(self, pool: KVPool, read: Band) -> None:
        self._rows = slice(read.first, read.last)
        self._source = _Source(pool, read.slots)
        place = torch.arange(read.last - read.first)[:, None] + read.offset
        key = torch.arange(self._source.count)
        hidden = (key > place) | (key <= place - read.window)
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


# Registration with transformers, and with the warning that PyTorch gives once for sparse matrices

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0], [], [], (0, 0))


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
