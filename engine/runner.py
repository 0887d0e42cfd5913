"""Runs one step: block copies, one forward pass over all chunks, sampling.

The chunks of a step are packed as one sequence of rows, in the order that the plan
chose. Nothing is kept between steps but the block pool; the runner never sees the
cache, and trusts the block tables.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.kv import KVPool
from engine.model import LoadedModel
from engine.native.step import attention_step, plan_step
from engine.plan import Span
from engine.request import Request, Sampled, SamplingParams
from engine.sampler import Row, sample
from engine.scheduler import Chunk, Step

WARM_UP_TOKENS = 16


class Runner:
    """The model and the block pool, for one thread."""

    def __init__(self, loaded: LoadedModel, pool: KVPool) -> None:
        self._loaded = loaded
        self._pool = pool

    @torch.inference_mode()
    def run(self, step: Step) -> list[Sampled | None]:
        """Compute a step; return an entry per chunk, None where nothing was to be sampled."""
        for copy in step.copies:
            self._pool.copy_block(copy.source, copy.target, copy.tokens)
        chunks = step.chunks
        spans = [Span(chunk.start, len(chunk.tokens), chunk.blocks) for chunk in chunks]
        plan = plan_step(spans, self._pool, self._loaded.kernels)
        tokens: list[int] = []
        for index in plan.order:
            tokens += chunks[index].tokens
        sampled = [index for index, chunk in enumerate(chunks) if chunk.sample]
        ends = [plan.first_row[index] + spans[index].length - 1 for index in sampled]
        device = self._loaded.device
        logits = self._loaded.forward(
            torch.from_numpy(np.array(tokens, dtype=np.int64)).to(device),
            torch.from_numpy(plan.positions).to(device),
            torch.tensor(ends, dtype=torch.int64, device=device),
            attention_step(self._pool, plan, self._loaded.kernels),
        )
        results: list[Sampled | None] = [None] * len(chunks)
        if sampled:
            for index, result in zip(sampled, sample(logits, [_row(chunks[index]) for index in sampled]), strict=True):
                results[index] = result
        return results

    def warm_up(self) -> None:
        """Run a short prefill and a decode through the first blocks, which must hold nothing yet."""
        room = min(WARM_UP_TOKENS, self._loaded.max_length, self._pool.blocks * self._pool.block_size)
        tokens = [0] * room
        blocks = list(range(-(-room // self._pool.block_size)))
        request = Request("warm-up", tokens, SamplingParams(), 0, sink=lambda _: None)
        if room > 1:
            self.run(Step([Chunk(request, 0, tokens[:-1], blocks, False)], []))
        self.run(Step([Chunk(request, room - 1, tokens[-1:], blocks, True)], []))


def _row(chunk: Chunk) -> Row:
    request = chunk.request  # a chunk that samples ends where its request's tokens end
    return Row(request.params, request.seed, request.tokens, len(request.prompt))
