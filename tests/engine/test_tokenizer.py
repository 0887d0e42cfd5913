"""The tokenizer and the text stream, over tokenizers of every kind of decoder."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from engine.embedded.vocabulary import BYTEWISE_SIZE, bytewise
from engine.tokenizer import Chat, TextStream, Tokenizer
from prefixcache.errors import FailedPrecondition, InvalidArgument

SPACE = "\u2581"


def byte_level() -> Tokenizer:
    return Tokenizer(bytewise(), BYTEWISE_SIZE + 10)


def wrapped(backend: Backend, size: int) -> Tokenizer:
    pretrained = PreTrainedTokenizerFast(tokenizer_object=backend)
    return Tokenizer(pretrained, size)


def sentencepiece() -> Tokenizer:
    """Spaces are letters, the first one is stripped, unknown characters fall back to bytes."""
    words = ["<unk>", "<s>", SPACE, *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"abcdefgh.,", SPACE + "a", SPACE + "b", "ab", SPACE + SPACE, "é", "世"]
    merges = [(SPACE, "a"), (SPACE, "b"), ("a", "b"), (SPACE, SPACE)]
    backend = Backend(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return wrapped(backend, len(words))


def metaspace() -> Tokenizer:
    """Spaces are letters and the decoder strips the first."""
    words = ["<unk>", SPACE, *"abcdefgh.,", SPACE + "a", SPACE + "ab", "ab", "é", "世"]
    backend = Backend(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[(SPACE, "a"), ("a", "b"), (SPACE + "a", "b")],
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return wrapped(backend, len(words))


BYTES, SENTENCEPIECE, METASPACE = byte_level(), sentencepiece(), metaspace()


def streamed(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[str, TextStream]:
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(token) for token in ids]
    return "".join([*pieces, stream.flush()]), stream


def before_first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The slow definition: the stop with the smallest end, of these the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text())
def test_a_stream_of_byte_tokens_gives_the_text_back(text: str) -> None:
    """Any Unicode text, one byte per token, comes out whole."""
    ids = list(text.encode())
    assert streamed(BYTES, ids)[0] == text == BYTES.decode(ids)


@given(st.lists(st.integers(0, BYTEWISE_SIZE + 9)))
@settings(max_examples=300)
def test_a_stream_of_random_bytes_equals_decoding_them_at_once(ids: list[int]) -> None:
    """Invalid UTF-8, special tokens and ids without a token stream to the text that decode gives."""
    assert streamed(BYTES, ids)[0] == BYTES.decode(ids)


@given(st.lists(st.sampled_from([b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xe2", b"\x82", b"\xac", b"\xc3", b"a"])))
@settings(max_examples=300)
def test_pieces_of_characters_stream_to_what_decoding_gives(parts: list[bytes]) -> None:
    """Beginnings, middles and ends of characters in any order give the same replacement characters."""
    ids = list(b"".join(parts))
    assert streamed(BYTES, ids)[0] == BYTES.decode(ids)


@given(st.text(alphabet="abcdefgh., é世🙂\n"))
@settings(max_examples=300)
def test_sentencepiece_text_streams_with_its_spaces(text: str) -> None:
    """Prefix spaces stay, the first is stripped, characters out of the vocabulary come from bytes."""
    ids = SENTENCEPIECE._backend.encode(text).ids
    assert streamed(SENTENCEPIECE, ids)[0] == SENTENCEPIECE.decode(ids) == text


@given(st.text(alphabet="abcdefgh., é世"))
def test_metaspace_text_streams_with_its_spaces(text: str) -> None:
    """The decoder that strips the first space strips no other one in a stream."""
    ids = METASPACE._backend.encode(text).ids
    assert streamed(METASPACE, ids)[0] == METASPACE.decode(ids)


@given(st.text(alphabet="é🙂a", min_size=1, max_size=20))
def test_no_piece_ends_in_half_a_character(text: str) -> None:
    """While a character is incomplete nothing of it comes out."""
    stream = TextStream(BYTES)
    seen = ""
    for token in text.encode():
        seen += stream.push(token)
        assert text.startswith(seen)
    assert seen == text


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=300)
def test_stop_strings_cut_the_text(text: str, stop_list: list[str]) -> None:
    """The output is the text before the stop that is complete first, however long its beginning was held."""
    stops = tuple(stop_list)
    out, stream = streamed(BYTES, list(text.encode()), stops)
    expected, stop = before_first_stop(text, stops)
    assert (out, stream.stop) == (expected, stop)
    if stop is not None:
        assert stream.tokens == len(expected) + len(stop)


@given(
    st.lists(st.integers(0, 255)),
    st.lists(st.text(alphabet="a\ufffd\x01é", min_size=1), min_size=1, max_size=3),
)
def test_stop_strings_cut_the_text_of_random_bytes(ids: list[int], stop_list: list[str]) -> None:
    """The rule holds whatever the tokens are."""
    stops = tuple(stop_list)
    assert streamed(BYTES, ids, stops)[0] == before_first_stop(BYTES.decode(ids), stops)[0]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    """The beginning of a stop string comes out as soon as it cannot become one any more."""
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(token) for token in b"xENx"] == ["x", "", "", "ENx"]


def test_nothing_comes_after_a_stop() -> None:
    """Tokens that were on their way when the stop was found add neither text nor count."""
    stream = TextStream(BYTES, ["."])
    assert [stream.push(token) for token in b"a.b"] == ["a", "", ""]
    assert (stream.flush(), stream.tokens, stream.stop) == ("", 2, ".")


def test_a_long_run_of_invalid_bytes_is_not_held_back() -> None:
    """Text follows the tokens by a few only, and the window stays small, even if no byte is valid."""
    stream = TextStream(BYTES)
    seen = sum(len(stream.push(0xFF)) for _ in range(1000))
    assert seen >= 1000 - 8
    assert len(stream._window) <= 16
    assert seen + len(stream.flush()) == 1000


def test_text_gets_the_tokenizers_own_special_tokens() -> None:
    """Plain text begins with the beginning-of-sequence token, token ids stay as they are."""
    begin = 256
    assert BYTES.encode("hi") == [begin, *b"hi"]
    assert BYTES.encode([104, 105]) == [104, 105]


def test_a_conversation_is_rendered_with_the_models_template() -> None:
    """Roles, tools and the header of the next turn are in the tokens, and nothing is added twice."""
    chat = Chat([{"role": "user", "content": "hi"}], tools=[{"name": "f", "a": 1}])
    text = BYTES.render(chat)
    assert text == '<|begin|><|system|>{"name": "f", "a": 1}\n<|end|><|user|>hi<|end|><|assistant|>'
    assert BYTES.encode(chat)[:2] == [256, 258]
    assert not BYTES.render(Chat(chat.messages, add_generation_prompt=False)).endswith("<|assistant|>")


def test_messages_without_a_chat_template_say_what_to_send_instead() -> None:
    """A model without a template asks for text or token ids."""
    with pytest.raises(FailedPrecondition, match=r"no chat template.*send the prompt as text or as token ids"):
        METASPACE.encode(Chat([{"role": "user", "content": "hi"}]))


def test_what_a_template_refuses_is_the_callers_mistake() -> None:
    """The template's own words reach the caller."""
    with pytest.raises(InvalidArgument, match="chat template refuses these messages: role pirate is none of"):
        BYTES.encode(Chat([{"role": "pirate", "content": "hi"}]))


@pytest.mark.parametrize(("ids", "at"), [([1, 999], "999 at position 1"), ([-1], "-1 at position 0")])
def test_token_ids_out_of_range_are_refused(ids: list[int], at: str) -> None:
    """The message names the id, its position and the last one allowed."""
    with pytest.raises(InvalidArgument, match=f"token id {at} .* ends at 271"):
        BYTES.encode(ids)


def test_a_prompt_without_tokens_is_refused() -> None:
    """Text that tokenizes to nothing is an empty prompt."""
    with pytest.raises(InvalidArgument, match="no tokens"):
        METASPACE.encode("")


def test_a_prompt_over_the_limit_is_refused() -> None:
    """Just over the limit it is counted, far over it is not even tokenized."""
    assert len(BYTES.encode("x" * 9, limit=10)) == 10
    with pytest.raises(InvalidArgument, match="has 11 tokens, but the model takes at most 10"):
        BYTES.encode("x" * 10, limit=10)
    with pytest.raises(InvalidArgument, match=r"has at least \d+ tokens, but the model takes at most 10"):
        BYTES.encode("x" * 100_000, limit=10)


def test_fingerprints_tell_tokenizers_apart() -> None:
    """Equal for two built alike, different for different vocabularies."""
    assert byte_level().fingerprint() == BYTES.fingerprint()
    assert METASPACE.fingerprint() != SENTENCEPIECE.fingerprint()


# The place in the text where tokens end


def gpt2_like() -> Tokenizer:
    """A byte-level vocabulary with merges, whose post-processor keeps spaces out of the offsets of words."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    merges = [("h", "i"), ("Ġ", "hi"), ("Ċ", "Ċ"), ("ð", "Ł"), ("ĻĤ", "Ġ"), ("Ļ", "Ĥ")]
    words = [*letters, *dict.fromkeys(a + b for a, b in merges)]
    backend = Backend(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return wrapped(backend, len(words) + 2)


def lowercase() -> Tokenizer:
    """A normalizer changes the text before it is cut into words, and spaces belong to no token."""
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(backend, 4)


def test_the_place_in_text_is_exact_for_bytes() -> None:
    """A token per byte behind one without text: characters of several tokens count once all of them are there."""
    text = "a🙂é b"
    assert [BYTES.locate(text, tokens) for tokens in range(11)] == [
        (text, characters) for characters in (0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5)
    ]


def test_the_place_leaves_spaces_to_the_words_behind_them() -> None:
    """Spaces and newlines are counted with the tokens they belong to, special tokens at both ends count nothing."""
    tokenizer, text = gpt2_like(), "hi hi\n\n hi  🙂!"
    tokens = ["", "hi", " hi", "\n\n", " hi", " ", " ", "", "🙂", "!", ""]
    assert len(tokenizer.encode(text)) == len(tokens)
    for count in range(len(tokens) + 1):
        assert tokenizer.locate(text, count) == (text, len("".join(tokens[:count])))


def test_the_place_is_in_the_text_as_it_was_sent() -> None:
    """Where a normalizer changes the text, the place is in the original, in front of the first word not covered."""
    text = "HELLO Wörld hello"
    assert [lowercase().locate(text, tokens)[1] for tokens in range(4)] == [0, 6, 12, len(text)]
    assert [SENTENCEPIECE.locate("ab 世🙂", tokens)[1] for tokens in range(9)] == [0, 1, 2, 3, 4, 4, 4, 4, 5]
    assert [METASPACE.locate("ab ab", tokens)[1] for tokens in range(3)] == [0, 2, 5]


def test_the_place_in_a_conversation_is_in_what_the_template_renders() -> None:
    """Special tokens of a template are part of the text, each as long as its name."""
    chat = Chat([{"role": "user", "content": "hé"}])
    text = "<|begin|><|user|>hé<|end|><|assistant|>"
    ends = [0, 9, 17, 18, 18, 19, 26, len(text)]
    assert [BYTES.locate(chat, tokens) for tokens in range(len(ends))] == [(text, end) for end in ends]


@given(st.lists(st.integers(0, BYTEWISE_SIZE + 9)), st.integers(0, 60))
def test_the_place_in_token_ids_is_where_their_texts_agree(ids: list[int], tokens: int) -> None:
    """Token ids are decoded, special ones included; what comes before the place is in the text of those tokens."""
    text, characters = BYTES.locate(ids, tokens)
    assert text == BYTES.join(ids)
    before = BYTES.join(ids[:tokens])
    assert text[:characters] == before[:characters]
    if tokens >= len(ids):
        assert characters == len(text)
    elif characters < min(len(before), len(text)):
        assert before[characters] != text[characters]


def test_the_place_in_token_ids_leaves_half_a_character_out() -> None:
    """A character that the tokens cut lies behind the place, and it is whole in the text."""
    ids = [258, *"a🙂b".encode()]
    ends = [0, 10, 11, 11, 11, 11, 12, 13]
    assert [BYTES.locate(ids, tokens) for tokens in range(len(ends))] == [("<|system|>a🙂b", end) for end in ends]


@given(st.text(max_size=30), st.integers(0, 130))
def test_the_place_of_bytes_is_the_longest_whole_text(text: str, tokens: int) -> None:
    """For any text it is the longest beginning that the bytes of the tokens contain."""
    if text:
        characters = BYTES.locate(text, tokens).characters
        bytes_before = max(tokens - 1, 0)
        assert len(text[:characters].encode()) <= bytes_before
        assert characters == len(text) or len(text[: characters + 1].encode()) > bytes_before
