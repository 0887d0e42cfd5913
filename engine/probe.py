"""Whether a model runs on our attention: found out by running it, not by its name.

A short random prompt goes through the model's own eager attention and through ours, the
latter split into prefix, suffixes of two sequences in one step, and a decode. Every
layer must call our attention, and the logits must agree. On the way the probe learns
what each layer really caches, and how wide the logits are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from engine.attention import NAME, Step, forward, plain_kernel
from engine.kv import KVGeometry, KVPool, LayerGeometry
from engine.native.kernels import Kernels
from engine.native.step import attention_step, plan_step
from engine.plan import Span
from prefixcache.errors import FailedPrecondition, PrefixCacheError

TOKENS = 48
WINDOW_LIMIT = 128
"""A sliding window up to this is exceeded by a third of the prompt; wider ones would make loading slow."""
BLOCK_SIZE = 4

# Three of four rows must agree, measured by the norm of the difference relative to that of the
# row. Not all of them: a mixture of experts may, for a row, choose another expert among equals.
AGREEING_SHARE = 0.75
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Measured on seventeen architectures: at most 1e-6 in float32, 5e-3 in float16 and 4e-2 in bfloat16."""

ADVICE = "serve another model, or one of this architecture that transformers' attention interface supports"


Forward = Callable[[Tensor, Tensor, Tensor, Step], Tensor]
"""(tokens, positions, keep, step) -> logits `[len(keep), vocabulary]` in float32; see `attention.forward`."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer passes to attention, besides its tensors; `heads` are those of the query."""

    geometry: LayerGeometry
    heads: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool


@dataclass(frozen=True, slots=True)
class Findings:
    """What the probe learnt about a model. `calls` are its layers' in the order in which they run."""

    geometry: KVGeometry
    vocab_size: int
    calls: tuple[AttentionCall, ...]
    kernels: Kernels | None
    prompts: tuple[Tensor, Tensor]
    references: tuple[Tensor, Tensor]
    """The logits `[tokens, vocabulary]` of both prompts with the model's own attention."""
    logits: tuple[Tensor, Tensor]
    """The same with our attention, partly cached."""

    def run(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """Return the logits of both prompts by `forward`, computed cold, with a cached prefix, and decoded."""
        with torch.inference_mode():
            return _cached(forward, self.geometry, self.kernels, self.references[0].device.type, *self.prompts)


def difference(logits: tuple[Tensor, Tensor], references: tuple[Tensor, Tensor], share: float = 1.0) -> float:
    """Return how far `share` of the rows are off at most, relative to the reference's norm; NaN if one is NaN."""
    worst = []
    for found, reference in zip(logits, references, strict=True):
        by_row = (found - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)
        worst.append(by_row.quantile(share))
    return float(torch.stack(worst).max())


def probe(model: PreTrainedModel, max_length: int, kernels: Kernels | None = None) -> Findings:
    """Set `model` to our attention and prove that it works; FailedPrecondition if it does not."""
    architecture = model.config.model_type
    with torch.inference_mode():
        try:
            model.set_attn_implementation(NAME)
            calls = _discover(model)
            _check_layers(model.config.get_text_config(decoder=True), calls)
            geometry = KVGeometry(tuple(call.geometry for call in calls), model.dtype)
            length = _length(max_length, [call.window for call in calls if call.window is not None])
            generator = torch.Generator().manual_seed(0)
            embeddings = model.get_input_embeddings().weight
            assert isinstance(embeddings, Tensor)
            prompts = _two_prompts(torch.randint(embeddings.shape[0], (2, length), generator=generator))
            model.set_attn_implementation("eager")
            references = (_eager(model, prompts[0]), _eager(model, prompts[1]))
            model.set_attn_implementation(NAME)
            logits = _cached(partial(forward, model), geometry, kernels, model.device.type, *prompts)
            off = difference(logits, references, AGREEING_SHARE)
        except PrefixCacheError as error:
            raise FailedPrecondition(
                f"models of architecture {architecture!r} cannot be served: {error}; {ADVICE}"
            ) from None
        except Exception as error:  # any code of any model runs here
            raise FailedPrecondition(
                f"models of architecture {architecture!r} cannot be served: they fail when run with this engine's "
                f"attention ({type(error).__name__}: {error}); {ADVICE}"
            ) from error
    if not off <= TOLERANCE[model.dtype]:
        raise FailedPrecondition(
            f"models of architecture {architecture!r} cannot be served: with this engine's attention their "
            f"logits are off by {off:.1e} of their size (in {model.dtype}, "
            f"{TOLERANCE[model.dtype]:.0e} is allowed); {ADVICE}"
        )
    return Findings(geometry, references[0].shape[-1], calls, kernels, prompts, references, logits)


def _length(max_length: int, windows: list[int]) -> int:
    exceedable = [window * 3 // 2 for window in windows if window <= WINDOW_LIMIT]
    return min(max([TOKENS, *exceedable]), max_length)


class _Discovery:
    """Attention that caches nothing and notes what each layer passes."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

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
        geometry = LayerGeometry(key.shape[1], key.shape[3], value.shape[3])
        self.calls.append(AttentionCall(geometry, query.shape[1], scale, window, softcap, sinks is not None))
        out, _ = plain_kernel(query, key, value, True, None, scale, softcap)
        return out.transpose(1, 2).contiguous()


def _discover(model: PreTrainedModel) -> tuple[AttentionCall, ...]:
    discovery = _Discovery()
    tokens = torch.arange(2, device=model.device)
    forward(model, tokens, tokens, tokens, discovery)
    return tuple(discovery.calls)


def _check_layers(config: PreTrainedConfig, calls: tuple[AttentionCall, ...]) -> None:
    """Raise FailedPrecondition if layers keep a state that is not here, or a window is not told of."""
    expected = config.num_hidden_layers
    if len(calls) != expected:
        raise FailedPrecondition(f"its {expected} layers call the attention interface {len(calls)} times")
    windows = [call.window for call in calls]
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        limit = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        if limit is not None and not any(windows):
            raise FailedPrecondition(f"its attention is limited to {limit} tokens in a way that layers do not pass on")
        return
    for kind, window in zip(kinds, windows, strict=True):
        if kind not in ("full_attention", "sliding_attention"):
            raise FailedPrecondition(f"it has layers of the kind {kind!r}")
        if (kind == "sliding_attention") != (window is not None):
            raise FailedPrecondition(f"a layer of the kind {kind!r} passes {window} as its sliding window")


def _two_prompts(draw: Tensor) -> tuple[Tensor, Tensor]:
    """Return two prompts that share their first half, up to a block boundary."""
    shared = draw.shape[1] // 2 // BLOCK_SIZE * BLOCK_SIZE
    return draw[0], torch.cat((draw[0, :shared], draw[1, shared:]))


def _eager(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    output = model(
        input_ids=tokens[None].to(model.device),
        position_ids=torch.arange(len(tokens), device=model.device)[None],
        use_cache=False,
    )
    logits: Tensor = output.logits[0]
    return logits.float()


def _cached(
    forward: Forward, geometry: KVGeometry, kernels: Kernels | None, device: str, one: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits of both prompts, computed in three steps over blocks that are nowhere adjacent."""
    length = len(one)
    per_prompt = -(-length // BLOCK_SIZE)
    ids = list(range(2 * per_prompt))[::-1]
    shared = length // 2 // BLOCK_SIZE
    blocks = ids[:per_prompt]
    tables = [blocks, blocks[:shared] + ids[per_prompt : 2 * per_prompt - shared]]
    pool = KVPool(geometry, 2 * per_prompt, BLOCK_SIZE, device)
    begin = shared * BLOCK_SIZE
    steps = [
        [(0, 0, begin)],
        [(0, begin, length - 1), (1, begin, length)],
        [(0, length - 1, length)],
    ]
    prompts = [one, other]
    parts: list[list[Tensor]] = [[], []]
    for step in steps:
        chunks = [chunk for chunk in step if chunk[1] < chunk[2]]
        if not chunks:  # the model takes less than two blocks
            continue
        spans = [Span(start, end - start, tables[index]) for index, start, end in chunks]
        plan = plan_step(spans, pool, kernels)
        tokens = torch.cat([prompts[chunks[place][0]][chunks[place][1] : chunks[place][2]] for place in plan.order])
        positions = torch.from_numpy(plan.positions).to(device)
        keep = torch.arange(plan.rows, device=device)
        logits = forward(tokens.to(device), positions, keep, attention_step(pool, plan, kernels))
        for place, (index, start, end) in enumerate(chunks):
            first = plan.first_row[place]
            parts[index].append(logits[first : first + end - start])
    if shared:
        parts[1].insert(0, parts[0][0])  # it was computed once
    return torch.cat(parts[0]), torch.cat(parts[1])
