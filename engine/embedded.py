"""The model that needs no download: a small Llama and a byte-level tokenizer, made in memory.

Both are the same in every process: the weights come from a generator with a fixed
seed, and the id of a token below 256 is the byte it stands for. The weights are
random, so the output is no language; everything around it is real. Whoever has
trained weights replaces `build_model`.
"""

from __future__ import annotations

import math

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_LENGTH = 8192
SEED = 0

BEGIN, END = "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (BEGIN, END, *(f"<|{role}|>" for role in ROLES))
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# A turn is its role's token, the text, and the end token. Tools stand in front of the
# conversation as a system turn of their own.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
<|system|>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant", "tool") -%}
{{ raise_exception("role " ~ message.role ~ " is none of system, user, assistant, tool") }}
{%- endif -%}
{{ "<|" ~ message.role ~ "|>" }}{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}{{ call | tojson }}
{% endfor -%}
{{ "<|end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def build_config() -> LlamaConfig:
    """Return the configuration of the model: 4.8 million parameters."""
    ids = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
        pad_token_id=None,
        tie_word_embeddings=False,
    )


def build_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the model in evaluation mode on the CPU.

    Matrices are drawn with a standard deviation of 1/sqrt(inputs), far above the usual
    0.02: each layer then changes its input about as much as it keeps, and greedy output
    does not fall into repeating one token.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):  # the model's own initialization is overwritten below
        model = LlamaForCausalLM(build_config())
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:  # the weights of the norms
                parameter.fill_(1.0)
            else:
                inputs = 1 if "embed_tokens" in name else parameter.shape[1]
                parameter.normal_(0.0, 1 / math.sqrt(inputs), generator=generator)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.train(False)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per byte, and the special tokens of the chat template."""
    vocabulary = {_letter(byte): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _letter(byte: int) -> str:
    """Return the character that stands for a byte in a byte-level vocabulary.

    Printable ones stand for themselves, the others get the code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))
