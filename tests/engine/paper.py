"""A runner on paper: the model's arithmetic replaced by something a test can check completely.

The keys and values of a token are the whole sequence up to it. So before a token is
computed, every earlier slot of its block table must hold exactly this sequence's
prefix; if any block was shared wrongly, overwritten or never computed, `run` fails.
The next token is a hash of the whole sequence: any mix-up changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from engine.request import Sampled
from engine.scheduler import Step
from prefixcache.tokens import pack


def next_token(tokens: Sequence[int], vocab: int) -> int:
    """What the paper model says after `tokens`."""
    return xxh3_64_intdigest(pack(tokens)) % vocab


def generate(prompt: Sequence[int], count: int, vocab: int) -> list[int]:
    """What a correct engine generates after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, vocab))
    return tokens[len(prompt) :]


class PaperRunner:
    """Keeps what every slot of every block holds, and computes steps on that."""

    def __init__(self, total_blocks: int, block_size: int, vocab: int) -> None:
        self.block_size = block_size
        self.vocab = vocab
        self.slots: list[list[bytes]] = [[b""] * block_size for _ in range(total_blocks)]
        self.computed_tokens = 0
        self.largest_step = 0

    def run(self, step: Step) -> list[Sampled | None]:
        """Compute a step, asserting that everything it reads is right."""
        for copy in step.copies:
            self.slots[copy.target][: copy.tokens] = self.slots[copy.source][: copy.tokens]
        written: set[tuple[int, int]] = set()
        for chunk in step.chunks:  # all writes come before all reads, as in a layer
            for position, token in enumerate(chunk.tokens, chunk.start):
                assert chunk.request.tokens[position] == token
                block, slot = chunk.blocks[position // self.block_size], position % self.block_size
                assert (block, slot) not in written, "two chunks of a step write the same slot"
                written.add((block, slot))
                self.slots[block][slot] = pack(chunk.request.tokens[: position + 1])
        sampled: list[Sampled | None] = []
        for chunk in step.chunks:
            end = chunk.start + len(chunk.tokens)
            tokens = chunk.request.tokens[:end]
            whole = pack(tokens)
            for position in range(end):
                held = self.slots[chunk.blocks[position // self.block_size]][position % self.block_size]
                assert held == whole[: 4 * (position + 1)], f"position {position} holds another sequence"
            sampled.append(Sampled(next_token(tokens, self.vocab)) if chunk.sample else None)
        count = sum(len(chunk.tokens) for chunk in step.chunks)
        self.computed_tokens += count
        self.largest_step = max(self.largest_step, count)
        return sampled
