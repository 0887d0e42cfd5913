"""Prompts to token ids, and token ids back to text while they are being generated.

`Tokenizer` may be used from many threads. A `TextStream` belongs to one request.
The rules of a stream, whatever pieces the tokens arrive in:

- the pieces it returns, joined, are `Tokenizer.decode` of all tokens;
- a piece never ends in half a character, since what came out cannot be taken back;
- with stop strings, they are the text before the stop that is complete first (of
  those complete at the same character, before the longest);
- the cost of a token does not depend on how many came before it.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefixcache.errors import FailedPrecondition, InvalidArgument

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes and a token at least one, so what is more
# than three tokens back cannot be the beginning of a character still to come.
_UNDECIDED_TOKENS = 3
_MESSAGE_LIMIT = 300


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the model's chat template; messages and tools are JSON objects."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    add_generation_prompt: bool = True


Prompt = str | Sequence[int] | Chat
"""Plain text, token ids used as they are, or a conversation."""


class Place(NamedTuple):
    """A place in a prompt's text: `characters` (Unicode code points) of `text` lie before it."""

    text: str
    characters: int


class Tokenizer:
    """A model's own tokenizer and chat template. `vocab_size` is that of the model's embedding."""

    def __init__(self, pretrained: PreTrainedTokenizerBase, vocab_size: int) -> None:
        if not pretrained.is_fast:
            raise FailedPrecondition(
                f"the tokenizer {type(pretrained).__name__} has no tokenizer.json, which is needed to "
                "tokenize many prompts at a time; convert it with transformers and save it again"
            )
        self.vocab_size = vocab_size
        self._pretrained = pretrained
        # Taken from the wrapper once: its own calls reconfigure the shared tokenizer
        # (truncation, padding) and are not safe in several threads.
        self._backend = pretrained.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        _keep_spaces(self._backend.post_processor)
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        tokens = self._backend.get_vocab(with_added_tokens=True)
        self._longest_token = max((len(text.encode("utf-8", "replace")) for text in tokens), default=1)

    @classmethod
    def load(cls, source: str, vocab_size: int) -> Tokenizer:
        """Load the tokenizer in the directory, or of the hub id, `source`; FailedPrecondition if it cannot be."""
        try:
            pretrained = AutoTokenizer.from_pretrained(os.path.expanduser(source))
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FailedPrecondition(
                f"the tokenizer of {source!r} cannot be loaded ({reason}): check that its files are beside the model's"
            ) from error
        return cls(pretrained, vocab_size)

    @property
    def has_chat_template(self) -> bool:
        return self._pretrained.chat_template is not None

    def encode(self, prompt: Prompt, limit: int | None = None) -> list[int]:
        """Return the token ids of `prompt`.

        Text gets the special tokens that the tokenizer itself adds; a conversation those
        of its template. Raises FailedPrecondition if there is no chat template,
        InvalidArgument if the template refuses the conversation, if no token results, if
        an id is not in the model's vocabulary, or (before the work is done, when that is
        certain) if more than `limit` tokens result.
        """
        if isinstance(prompt, str):
            ids = self._encode(prompt, limit, add_special_tokens=True)
        elif isinstance(prompt, Chat):
            ids = self._encode(self.render(prompt), limit, add_special_tokens=False)
        else:
            ids = list(prompt)
        if not ids:
            raise InvalidArgument("the prompt has no tokens; send at least one character or token id")
        self._check(ids)
        if limit is not None and len(ids) > limit:
            raise _too_long(str(len(ids)), limit)
        return ids

    def render(self, chat: Chat) -> str:
        """Return the text that the model's chat template makes of a conversation."""
        if not self.has_chat_template:
            raise FailedPrecondition(
                "this model has no chat template, so it cannot read messages; send the prompt as text or "
                "as token ids, in the form the model was trained on"
            )
        try:
            text = self._pretrained.apply_chat_template(
                list(chat.messages),
                tools=list(chat.tools) or None,
                add_generation_prompt=chat.add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # a template is the model's program: it may raise anything
            reason = " ".join(str(error).split())[:_MESSAGE_LIMIT] or type(error).__name__
            raise InvalidArgument(f"the model's chat template refuses these messages: {reason}") from error
        assert isinstance(text, str)
        return text

    def locate(self, prompt: Prompt, tokens: int) -> Place:
        """Return the text of a prompt as the model reads it, and where in it the first `tokens` of its tokens end.

        A conversation is rendered by its template; token ids are decoded, special ones
        included. A character whose tokens lie on both sides lies behind the place.
        Tokenizes the prompt again; raises what `encode` raises.
        """
        if not isinstance(prompt, str | Chat):
            ids = list(prompt)
            text = self.join(ids)
            return Place(text, _agreement(self.join(ids[:tokens]), text) if tokens < len(ids) else len(text))
        text = self.render(prompt) if isinstance(prompt, Chat) else prompt
        offsets = self._backend.encode(text, add_special_tokens=isinstance(prompt, str)).offsets
        # Special tokens that the tokenizer itself adds stand for no part of the text.
        behind = (start for start, end in offsets[tokens:] if start < end)
        return Place(text, next(behind, len(text)) if tokens else 0)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return self.join([token for token in ids if not self.silent(token)])

    def join(self, ids: list[int]) -> str:
        """Return the text of `ids`, with that of special tokens."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def silent(self, token: int) -> bool:
        """Whether a token has no text: a special one, or one that pads the vocabulary."""
        return token in self._special or self._backend.id_to_token(token) is None

    def fingerprint(self) -> bytes:
        """Return bytes that are equal exactly for tokenizers that tokenize alike."""
        template = json.dumps(self._pretrained.chat_template, sort_keys=True)
        return f"{self._backend.to_str()}\n{template}".encode()

    def _encode(self, text: str, limit: int | None, *, add_special_tokens: bool) -> list[int]:
        # Without a normalizer no text disappears, so the longest token bounds the number from below.
        if limit is not None and self._backend.normalizer is None:
            fewest = len(text.encode()) // self._longest_token
            if fewest > limit:
                raise _too_long(f"at least {fewest}", limit)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _check(self, ids: list[int]) -> None:
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            position = next(i for i, token in enumerate(ids) if not 0 <= token < self.vocab_size)
            raise InvalidArgument(
                f"token id {ids[position]} at position {position} of the prompt is not in the model's "
                f"vocabulary, which ends at {self.vocab_size - 1}"
            )


def _keep_spaces(processor: Any) -> None:
    """Have a post-processor leave the spaces in front of a word to the word's token; this changes no token id."""
    if isinstance(processor, processors.Sequence):
        for part in processor:  # type: ignore[attr-defined]  # the annotations lack it
            _keep_spaces(part)
    elif hasattr(processor, "trim_offsets"):
        processor.trim_offsets = False


def _agreement(before: str, text: str) -> int:
    """Return how many characters at its beginning `text` shares with `before`, which is compared at C speed."""
    return bisect_left(range(1, len(before) + 1), True, key=lambda end: not text.startswith(before[:end]))


def _too_long(tokens: str, limit: int) -> InvalidArgument:
    return InvalidArgument(
        f"the prompt has {tokens} tokens, but the model takes at most {limit} and one for the output: shorten it"
    )


class TextStream:
    """The text of one request's output, token by token.

    `stop` is the stop string that was found, if one was; `tokens` counts the tokens
    pushed, up to the one that completed it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        self.stop: str | None = None
        self.tokens = 0
        self._tokenizer = tokenizer
        self._stops = [_Stop(text) for text in stops]
        self._held = ""
        # The tokens whose text came out last, so that the next ones are decoded in their
        # context (a space in front of a word, say), followed by those held back.
        self._window: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Take the next token and return the text that became final; "" after a stop."""
        if self.stop is not None:
            return ""
        self.tokens += 1
        if self._tokenizer.silent(token):
            return ""
        return self._pass_stops(self._detokenize(token))

    def flush(self) -> str:
        """Return what was held back; no token follows."""
        if self.stop is not None:
            return ""
        rest = self._tokenizer.join(self._window)[self._shown :] if self._window else ""
        self._window, self._context, self._shown = [], 0, 0
        text = self._pass_stops(rest)
        if self.stop is None:
            text, self._held = text + self._held, ""
        return text

    def _detokenize(self, token: int) -> str:
        window = self._window
        window.append(token)
        text = self._tokenizer.join(window)
        if not text.endswith(REPLACEMENT):
            return self._advance(text, len(window))
        # The end may be half a character. Let go of what is far enough back, at a cut
        # between characters: one where both sides decode to the same alone as together.
        newest = len(window) - _UNDECIDED_TOKENS
        for cut in range(newest, max(self._context, newest - _UNDECIDED_TOKENS), -1):
            before = self._tokenizer.join(window[:cut])
            if before + self._tokenizer.join(window[cut:]) == text:
                return self._advance(before, cut)
        return ""

    def _advance(self, text: str, cut: int) -> str:
        """Return what is new in `text`, that of the window up to `cut`; the new tokens become the context."""
        new = text[self._shown :]
        del self._window[: self._context]
        self._context = cut - self._context
        self._shown = len(self._tokenizer.join(self._window[: self._context]))
        return new

    def _pass_stops(self, text: str) -> str:
        """Return the part of held and new text that is final, and hold back the beginning of a stop."""
        if not self._stops:
            return text
        for index, character in enumerate(text, start=1):
            found = [stop.text for stop in self._stops if stop.advance(character)]
            if found:
                self.stop = max(found, key=len)
                final = (self._held + text[:index])[: -len(self.stop)]
                self._held = ""
                return final
        both = self._held + text
        final_length = len(both) - max(stop.matched for stop in self._stops)
        self._held = both[final_length:]
        return both[:final_length]


class _Stop:
    """Finds one stop string character by character (Knuth, Morris, Pratt): no text is looked at twice.

    `matched` is the length of the longest end of the text so far that begins the stop string.
    """

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0] * (len(text) + 1)
        for length in range(2, len(text) + 1):
            border = self._fallback[length - 1]
            while border and text[border] != text[length - 1]:
                border = self._fallback[border]
            self._fallback[length] = border + (text[border] == text[length - 1])

    def advance(self, character: str) -> bool:
        """Take one more character; return whether it completes the stop string."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._fallback[self.matched]
        if self.text[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.text)
