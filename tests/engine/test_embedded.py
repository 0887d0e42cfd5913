"""The embedded model as it is shipped, and what it was taught from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from engine import embedded
from engine.embedded.desks import DESKS, PHRASES, Desk
from engine.embedded.dialogues import DESK, KINDS, LAYOUTS, Conversation, draw_sheet, messages_of
from engine.embedded.values import Source, is_held_out
from engine.embedded.vocabulary import BYTEWISE_SIZE, MAX_LENGTH, VOCAB_SIZE, bytewise
from prefixcache import sample

MEBIBYTE = 2**20


def source(seed: object, held_out: bool = False) -> Source:
    return Source(Random(str(seed)), held_out)


def test_the_model_is_small_and_complete() -> None:
    """At most 20 MB, and everything that transformers wants of a model, beside its card."""
    files = {path.name: path.stat().st_size for path in embedded.DIRECTORY.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) < 20 * MEBIBYTE
    config = AutoConfig.from_pretrained(embedded.DIRECTORY)
    tokenizer = AutoTokenizer.from_pretrained(embedded.DIRECTORY)
    assert config.model_type == "llama"
    assert config.max_position_embeddings == tokenizer.model_max_length == MAX_LENGTH >= 2048
    assert config.vocab_size == len(tokenizer) == VOCAB_SIZE
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_any_text_survives_its_tokenizer() -> None:
    """What is no word of the sheets is bytes; spaces and line breaks stay as they are."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.DIRECTORY)
    text = "".join(map(chr, range(256))) + "世🙂  two  spaces\n\n\ttab 1234567"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chats_have_tools_and_all_roles() -> None:
    """System, user, assistant, tool and calls come out in order; another role is refused."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.DIRECTORY)
    messages: list[Any] = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "T"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[{"t": 1}], tokenize=False, add_generation_prompt=True)
    assert text == (
        '<|begin|><|system|>{"t": 1}\n<|end|><|system|>S<|end|><|user|>U<|end|>'
        '<|assistant|>{"name": "f", "arguments": {"a": 1}}<|end|><|tool|>T<|end|><|assistant|>'
    )
    with pytest.raises(Exception, match="role pope is none of"):
        tokenizer.apply_chat_template([{"role": "pope", "content": ""}], tokenize=False)


def test_without_learned_tokens_an_id_below_256_is_a_byte() -> None:
    """The tokenizer of tests and benchmarks: any text survives, and can be read off the token ids."""
    tokenizer = bytewise()
    text = "".join(map(chr, range(256))) + "世🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == BYTEWISE_SIZE


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("desk", DESKS, ids=lambda desk: desk.name)
def test_answers_stand_on_the_sheet_or_say_that_they_do_not(desk: Desk, layout: str, held_out: bool) -> None:
    """Whatever is asked: the value is in the row of the thing, or nowhere; calls carry what was looked up and said."""
    seen = set()
    for seed in range(12):
        drawn = source(seed, held_out)
        sheet = draw_sheet(drawn, 900, desk, layout)
        rows = sheet.text.split("\n")
        for turn in Conversation(drawn, sheet).turns(30):
            seen.add(turn.kind)
            if turn.kind in ("lookup", "property", "thing"):
                (row,) = [
                    row
                    for row in rows
                    if f" {turn.thing}:" in row or f"{turn.thing} has" in row or f"| {turn.thing} |" in row
                ]
                label, value = answered(turn.answer, sheet.spoken(turn.thing))
                assert f" {value}" in row
                assert sheet.things[turn.thing][label] == value
            elif turn.kind.startswith("unknown"):
                label, value = answered(turn.answer, sheet.spoken(turn.thing))
                assert value == PHRASES.unknown
                assert label not in sheet.things.get(turn.thing, {})
            elif turn.kind == "general":
                label, value = answered(turn.answer, DESK)
                assert value == sheet.general.get(label, PHRASES.unknown)
            elif turn.kind == "tool":
                said, call = turn.answer.split("\n")
                assert answered(said, sheet.spoken(turn.thing))[0] == sheet.desk.tool.lookup
                arguments = json.loads(call)["arguments"]
                assert arguments[sheet.desk.tool.lookup] == sheet.things[turn.thing][sheet.desk.tool.lookup]
                assert arguments[sheet.desk.tool.said] in turn.messages[0]["content"]
            elif turn.kind == "tool result":
                assert json.loads(turn.messages[0]["content"])["number"] in turn.answer
    assert seen == {*KINDS, "tool result"}


def answered(answer: str, spoken: str) -> tuple[str, str]:
    """Take an answer apart into label and value."""
    assert answer.startswith(f"For {spoken}: ") and answer.endswith(".")
    text = answer.removeprefix(f"For {spoken}: ").removesuffix(".")
    labels = [item.label for desk in DESKS for item in (*desk.properties, *desk.general)]
    label = max((label for label in labels if text.startswith(f"{label} ")), key=len)
    return label, text.removeprefix(f"{label} ")


def test_what_is_examined_was_never_taught() -> None:
    """Names, titles, prices, codes, times, dates and numbers are either for training or for examinations."""
    kinds = ("name", "title", "price", "code", "time", "date", "shelf", "number", "extension")
    for kind in kinds:
        taught = {getattr(source(seed), kind)() for seed in range(2000)}
        examined = {getattr(source(seed, held_out=True), kind)() for seed in range(2000)}
        assert not taught & examined
        assert len(examined) > 20


def test_equal_seeds_give_equal_dialogues() -> None:
    """And others give others."""

    def text(seed: int) -> str:
        drawn = source(seed)
        sheet = draw_sheet(drawn, 700)
        return json.dumps([sheet.tools, messages_of(sheet, Conversation(drawn, sheet).turns(8))])

    assert text(1) == text(1) != text(2)


def test_sheets_have_the_length_that_was_asked_for() -> None:
    """To a row, and with two things at least."""
    for seed in range(40):
        sheet = draw_sheet(source(seed), 3000)
        assert 3000 <= len(sheet.text) < 3300
    assert len(draw_sheet(source(1), 0).things) == 2


def test_calls_can_be_practised() -> None:
    """Then every sheet has a tool and what it needs, and every third turn or so is a call, with its result."""
    for seed in range(20):
        drawn = source(seed)
        sheet = draw_sheet(drawn, 600, calls=True)
        assert sheet.tools
        assert sheet.desk.needed in sheet.properties
        kinds = [turn.kind for turn in Conversation(drawn, sheet, calls=True).turns(60)]
        assert 6 < kinds.count("tool") < 30
        assert all(after == "tool result" for before, after in pairwise(kinds) if before == "tool")


def test_the_sample_is_a_sheet_that_was_never_taught() -> None:
    """The sheet of the examples and of `prefixcache chat`, as drawn; what it says can be read off it."""
    sheet = draw_sheet(source("sample 1033", held_out=True), 4300, DESKS[0], "list")
    assert sample.sheet() == sheet.text
    assert sample.facts() == {**sheet.things, "The desk": sheet.general}
    assert all(is_held_out(name.split()[0]) for name in sheet.things)
    ids = AutoTokenizer.from_pretrained(embedded.DIRECTORY).encode(sheet.text)
    assert len(ids) > 1200


def test_the_card_says_what_is_true_of_the_files() -> None:
    """The model's README names its size and context as they are."""
    card = (Path(embedded.DIRECTORY) / "README.md").read_text(encoding="utf-8")
    config = AutoConfig.from_pretrained(embedded.DIRECTORY)
    assert f"{config.num_hidden_layers} layers" in card
    assert f"{config.max_position_embeddings:,} tokens" in card
    assert "license: apache-2.0" in card
