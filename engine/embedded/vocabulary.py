"""The tokenizer of the embedded model: byte-level BPE, and the template of its chats.

Any text survives: what is no token of its own is a sequence of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MAX_LENGTH = 4096
VOCAB_SIZE = 2048

BEGIN, END = "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (BEGIN, END, *(f"<|{role}|>" for role in ROLES))
BYTEWISE_SIZE = 256 + len(SPECIAL_TOKENS)
"""How many tokens there are without any learned ones."""

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
{%- for call in message.tool_calls or [] %}{{ "\\n" if not loop.first }}{{ call.function | default(call) | tojson }}
{%- endfor -%}
{{ "<|end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""

# Words, punctuation and one or two digits, each with the space before it.
_PIECES = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of VOCAB_SIZE tokens for texts like these."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer)


def bytewise() -> PreTrainedTokenizerFast:
    """Return a tokenizer without any merges, for tests and benchmarks: the id of a token below 256 is its byte."""
    tokenizer = Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(_special_tokens())
    return _finished(tokenizer)


def _special_tokens() -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add what all have: how tokens become text, the token at the beginning, the template."""
    tokenizer.decoder = decoders.ByteLevel()
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
