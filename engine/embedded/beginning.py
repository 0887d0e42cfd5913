"""What the embedded model knows before it has learned anything: to copy, and to look up.

Both would emerge by themselves, but late: without them, training on ten million tokens
had led to answers with the right label and the value of another thing. So they are put
in by hand, as linear algebra on random vectors, and training refines them.

The residual stream, by dimension:

    content    what token this is: a random unit vector each
    before     what the token before it was; written by the first head of the first layer
    names      which names are near; written by its second head
    is_name    whether a token is (part of) a name, by its letters
    constant   the same for all tokens: what attends by position alone is made of it

In the second layer the first head looks for places that follow the same token and says
what stands there (an induction head: Olsson et al., 2022, arXiv:2209.11895); its second
one also wants the same names to be near, which finds the fact that is asked for. What
is near is told by the fast rotations of RoPE; contents are compared by the slow ones
only, so that distance matters little.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PUT_IN = ("embed_tokens", "layers.0.self_attn", "layers.1.self_attn")
"""Where the circuits are: parts of the names of weights."""
ROPE_THETA = 1e8
LAST_PAIRS = range(6)
"""The pairs of dimensions, of those that rotate together, that tell the last token from others."""
NEAR_PAIRS = range(5, 11)
"""Those that tell what is within some thirty tokens."""
SLOW_PAIRS = 14
"""From this one on, pairs turn by less than a third within 2,048 tokens."""

# Found by trying some two hundred combinations on sheets and questions, without training:
# more than half of the answers then began with the right value.
CONSTANT = 0.2
WRITTEN = 0.15
LAST = 3.0
NEAR = 1.6
NAMED = 1.5
SAME_TOKEN = 4.0
SAME_NAMES = 3.5
COPIED = 0.15
FOUND = 0.5


@torch.no_grad()
def begin(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put the circuits into a freshly initialized model with heads of a quarter of its width."""
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    size = width // heads
    content, before, names = (slice(place * size, (place + 1) * size) for place in range(3))
    is_name, constant = width - 2, width - 1
    generator = torch.Generator().manual_seed(1)
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, content] = functional.normalize(torch.randn(len(embedding), size, generator=generator), dim=1)
    embedding[:, constant] = CONSTANT
    embedding[:, is_name] = CONSTANT * _names(tokenizer)

    one, two = slice(size), slice(size, 2 * size)
    attentions = [layer.self_attn for layer in model.model.layers[:2]]
    for attention in attentions:
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[: two.stop] = 0
        attention.o_proj.weight[:, : two.stop] = 0
    first, second = attentions
    identity = torch.eye(size)
    half = size // 2
    rotation = ROPE_THETA ** (-torch.arange(half) / half)

    for pair in LAST_PAIRS:  # largest where positions differ by one
        first.q_proj.weight[pair, constant] = LAST
        first.k_proj.weight[pair, constant] = LAST * rotation[pair].cos()
        first.k_proj.weight[half + pair, constant] = LAST * rotation[pair].sin()
    for pair in NEAR_PAIRS:  # the nearer, the more
        first.q_proj.weight[two.start + pair, constant] = NEAR
        first.k_proj.weight[two.start + pair, constant] = NEAR
    first.q_proj.weight[two.start + half - 1, constant] = NAMED
    first.k_proj.weight[two.start + half - 1, is_name] = NAMED
    for head, written in ((one, before), (two, names)):
        first.v_proj.weight[head, content] = identity
        first.o_proj.weight[written, head] = identity * WRITTEN

    slow = [*range(SLOW_PAIRS, half), *range(half + SLOW_PAIRS, size)]
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q[: len(slow)]
    for number, (row, direction) in enumerate(zip(slow, basis, strict=True)):
        second.q_proj.weight[row, content] = direction * SAME_TOKEN
        second.k_proj.weight[row, before] = direction * SAME_TOKEN
        asked, found, gain = (content, before, SAME_TOKEN) if number % 2 else (names, names, SAME_NAMES)
        second.q_proj.weight[two.start + row, asked] = direction * gain
        second.k_proj.weight[two.start + row, found] = direction * gain
    for head, said in ((one, COPIED), (two, FOUND)):
        second.v_proj.weight[head, content] = identity
        second.o_proj.weight[content, head] = identity * said


def _names(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return 1 for tokens that begin with a capital or go on within a word, 0 for others: `[vocabulary]`."""
    space = "\u0120"  # what byte-level tokens have for it
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    bare = [token.removeprefix(space) for token in tokens]
    return torch.tensor(
        [
            float(text.isalpha() and (text[0].isupper() or text == token))
            for text, token in zip(bare, tokens, strict=True)
        ]
    )
