"""The doctor on prompts as agents write them: what it finds, where, and what it says that would help."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.doctor import Diagnosis, Pieces, Report, prompt_from
from prefixcache.doctor.rewriting import Plan, Rewriter
from prefixcache.doctor.spots import Edit
from prefixcache.errors import InvalidArgument
from tests.prefixcache.agents import (
    COUNT,
    NAMES,
    QUESTIONS,
    RULES,
    Front,
    chats,
    clock,
    day,
    hexadecimal,
    identifier,
    moment,
    profile,
    shuffled,
    texts,
    with_tools,
)


def diagnose(prompts: Sequence[Any], **options: Any) -> Diagnosis:
    pieces = Pieces()
    return Diagnosis(
        [prompt_from(prompt, pieces, f"prompt {i}") for i, prompt in enumerate(prompts)], pieces, **options
    )


def the_finding(report: Report) -> Any:
    (finding,) = report.findings
    return finding


# Each kind of volatile content


@pytest.mark.parametrize(
    ("kind", "value", "front"),
    [
        ("datetime", "2024-11-22T10:15:03Z", clock),
        ("datetime", "Fri Nov 22 10:15:03 2024", lambda n, _: f"It is {moment(n).ctime()}.\n\n"),
        (
            "datetime",
            "Friday, November 22, 2024 at 10:15 AM",
            lambda n, _: f"Today is {moment(n * 50):%A, %B %d, %Y at %I:%M %p}.\n",
        ),
        (
            "datetime",
            "22.11.2024, 10:15",
            lambda n, _: f"Stand: {moment(n * 50):%d.%m.%Y, %H:%M} Uhr\n",
        ),
        ("date", "2024-11-22", lambda n, _: f"Today's date is {day(n):%Y-%m-%d}.\n"),
        ("date", "November 22, 2024", lambda n, _: f"Today is {day(n):%B %d, %Y}.\n"),
        ("date", "Friday, 22 November", lambda n, _: f"Heute: {day(n):%A, %d %B}\n"),
        ("time", "10:15:03", lambda n, _: f"The clock at the harbour says {moment(n):%H:%M:%S}.\n"),
        ("weekday", "Friday", lambda n, _: f"The opening hours of {day(n):%A} apply.\n"),
        ("timestamp", "1732270503", lambda n, _: f'<meta>{{"ts": {1732270503 + 9 * n}, "source": "web"}}</meta>\n'),
        ("timestamp", "1732270503.25", lambda n, _: f"created={1732270503.25 + n}\n"),
        ("uuid", None, lambda _, source: f"Session: {identifier(source)}\n"),
        ("id", None, lambda _, source: f"[request req_{hexadecimal(source, 16)}]\n"),
        ("id", "TICKET-4711", lambda n, _: f"You are working on TICKET-{4711 + n}.\n"),
        ("hex", None, lambda _, source: f"trace {hexadecimal(source, 32)}f\n"),
        ("email", "Anna@mail.example.org", lambda n, _: f"Logged in as {NAMES[n]}@mail.example.org.\n"),
        ("ip", "10.0.3.0", lambda n, _: f"The request comes from 10.{n}.3.{7 * n}.\n"),
        (
            "url",
            None,
            lambda _, source: f"Page: https://harbour.example/rent?session={hexadecimal(source, 12)}&lang=en\n",
        ),
        ("number", "100", lambda n, _: f"There are {100 + 3 * n} bikes left.\n"),
        ("text", "Anna", lambda n, _: f"You are talking to {NAMES[n]}.\n"),
    ],
)
def test_what_varies_in_front_is_found(kind: str, value: str | None, front: Front) -> None:
    """Its kind, line, column and values; moving it makes almost all of the prompts reusable."""
    prompts = texts(front)
    report = diagnose(prompts).report
    finding = the_finding(report)
    assert finding.kind == kind
    assert (finding.prompts, finding.examples[0].value) == (COUNT, value or finding.examples[0].value)
    assert finding.examples[0].value != finding.examples[1].value
    line = prompts[0].split("\n")[finding.place.line - 1]
    assert line[finding.place.column - 1 :].startswith(finding.examples[0].value)
    assert line[: finding.place.column - 1].endswith(finding.examples[0].before.removeprefix("..."))
    assert report.after.share > max(0.85, report.today.share)
    assert report.saved_tokens == pytest.approx(finding.saved_tokens, rel=0.05)


def test_two_that_vary_in_a_row_are_worth_something_together_only() -> None:
    """Moving one of two ids alone saves nothing, and the report says so of both."""
    prompts = texts(lambda _, source: f"trace={hexadecimal(source, 31)}a span={hexadecimal(source, 15)}b\n")
    report = diagnose(prompts).report
    assert [finding.kind for finding in report.findings] == ["hex", "hex"]
    assert all(finding.saved_alone * 10 < finding.saved_tokens for finding in report.findings)
    assert report.after.share > 0.8 > 0.1 > report.today.share


def test_a_date_and_a_time_with_a_comma_in_between_are_one_finding() -> None:
    """Nobody moves one and leaves the other."""
    report = diagnose(texts(lambda n, _: f"date=2024-11-{n + 1:02} | {moment(n):%H:%M:%S}.\n")).report
    finding = the_finding(report)
    assert finding.kind == "date+time"
    assert finding.title == "date and clock time"


def test_unsorted_keys_of_the_same_object_are_found() -> None:
    """Sorting them is the advice; what is rewritten has all of them in one order, and its layout."""

    def context(_: int, source: random.Random) -> str:
        items = [("currency", "EUR"), ("language", "en"), ("plan", "premium"), ("station", {"name": "north", "no": 3})]
        return f"Guest profile: {json.dumps(dict(shuffled(source, items)), indent=2)}\n"

    diagnosis = diagnose(texts(context))
    finding = the_finding(diagnosis.report)
    assert finding.kind == "keys"
    assert "sort_keys=True" in finding.advice
    assert (finding.place.line, finding.place.column) == (2, 3)
    assert diagnosis.report.after.share > 0.9
    for prompt in diagnosis.rewritten():
        written, _ = json.JSONDecoder().raw_decode(prompt.removeprefix("Guest profile: "))
        assert list(written) == sorted(written)
        assert prompt.startswith('Guest profile: {\n  "currency": "EUR",\n  "language"')


def test_a_name_in_an_object_with_unsorted_keys_is_found_as_well() -> None:
    """The object is known again by its keys, although a value differs in every prompt."""
    report = diagnose(texts(profile)).report
    found = {finding.kind: finding for finding in report.findings}
    assert found.keys() == {"keys", "text"}
    assert {example.value for example in found["text"].examples} == {"Anna", "Bob"}
    assert report.after.share > 0.85


@pytest.mark.parametrize(
    ("kind", "front"),
    [
        (
            "items",
            lambda _, source: f"Topics: {{{str(shuffled(source, ['bikes', 'ferries', 'helmets', 'locks']))[1:-1]}}}\n",
        ),
        (
            "items",
            lambda _, source: (
                f"Stations: {json.dumps(shuffled(source, [{'id': 1}, {'id': 2}, {'no': 3}, {'x': 4}]))}\n"
            ),
        ),
        (
            "lines",
            lambda _, source: (
                "Tools:\n"
                + "".join(f"- {name}: {name}s a bike\n" for name in shuffled(source, ["find", "book", "clean", "lend"]))
                + "\n"
            ),
        ),
        (
            "lines",
            lambda _, source: (
                "Tools:\n"
                + "\n".join(
                    shuffled(source, ["find: finds a bike", "book: books it", "lend: lends it", "mend: mends it"])
                )
                + "\n\n"
            ),
        ),
        (
            "lines",
            lambda _, source: "You can use {}, {}, {} and {} for this.\n".format(
                *shuffled(source, ["search", "book", "cancel", "weather"])
            ),
        ),
        (
            "sections",
            lambda _, source: (
                "Documents:\n\n"
                + "".join(
                    f"## The {name}\nIt is locked at night.\nThe keys are at the desk.\n\n"
                    for name in shuffled(source, ["shed", "ferry", "harbour", "office"])
                )
            ),
        ),
    ],
)
def test_the_same_in_another_order_is_found(kind: str, front: Front) -> None:
    """Lists, sets, bullets, enumerations and documents; rewritten, all prompts have one order and nothing is lost."""
    prompts = texts(front)
    diagnosis = diagnose(prompts)
    finding = the_finding(diagnosis.report)
    assert finding.kind == kind
    assert finding.variants > 10
    assert diagnosis.report.after.share > 0.9
    rewritten = list(diagnosis.rewritten())
    assert len({prompt.partition(RULES)[0] for prompt in rewritten}) == 1
    for before, after in zip(prompts, rewritten, strict=True):
        assert Counter(before) == Counter(after)


def test_retrieved_documents_are_sorted_whole_and_their_scores_moved() -> None:
    """A document is several lines between its tags; the scores of all of them are one finding."""
    bodies = ("Bikes are locked\nat night.", "The ferry leaves\nat nine.", "Keys are at\nthe desk.")

    def documents(_: int, source: random.Random) -> str:
        chosen = shuffled(source, list(bodies))
        return "Context:\n" + "".join(
            f'<document score="0.{source.randrange(1000):03}">\n{body}\n</document>\n' for body in chosen
        )

    diagnosis = diagnose(texts(documents))
    found = {finding.kind: finding for finding in diagnosis.report.findings}
    assert found.keys() == {"sections", "number"}
    assert (found["number"].places, found["number"].place.line) == (3, 2)
    assert diagnosis.report.after.share > 0.8
    for prompt in diagnosis.rewritten():
        context = prompt.partition(RULES)[0]
        documents_in_order = [f'<document score="[number]">\n{body}\n</document>\n' for body in sorted(bodies)]
        assert context == "Context:\n" + "".join(documents_in_order)


def test_lines_that_belong_together_are_not_sorted() -> None:
    """Of records in another order only whole ones could be; taken apart they would mean something else."""

    def records(_: int, source: random.Random) -> str:
        chosen = shuffled(source, ["Name: shed\nStation: 1", "Name: office\nStation: 2", "Name: ferry\nStation: 3"])
        return "\n".join(chosen) + "\n\n"

    diagnosis = diagnose(texts(records))
    assert "lines" not in [finding.kind for finding in diagnosis.report.findings]


def test_tools_in_another_order_are_found() -> None:
    """Sorted, they are the same tools in every request."""
    prompts = with_tools()
    diagnosis = diagnose(prompts)
    finding = the_finding(diagnosis.report)
    assert (finding.kind, finding.place.part) == ("tools", "tool 1")
    assert diagnosis.report.after.share > 0.9
    rewritten = list(diagnosis.rewritten())
    assert len({json.dumps(prompt["tools"]) for prompt in rewritten}) == 1
    assert all(len(after["tools"]) == len(before["tools"]) for before, after in zip(prompts, rewritten, strict=True))
    assert [prompt["messages"] for prompt in rewritten] == [prompt["messages"] for prompt in prompts]


def test_spaces_that_differ_are_found() -> None:
    """Line ends of another system and spaces at line ends; rewritten, all have what most have."""
    variants = (RULES, RULES, RULES.replace("\n", "\r\n"), RULES.replace("euros\n", "euros  \n"))
    prompts = [f"{variants[n % 4]}\nGuest: {QUESTIONS[n % 8]} ({n})\nAnswer:" for n in range(COUNT)]
    diagnosis = diagnose(prompts)
    finding = the_finding(diagnosis.report)
    assert (finding.kind, finding.prompts) == ("spaces", COUNT // 2)
    assert all(prompt.startswith(RULES) for prompt in diagnosis.rewritten())
    assert diagnosis.report.after.share > diagnosis.report.today.share


# Where it is


def test_a_clock_in_a_system_message_goes_to_the_last_user_message() -> None:
    """The template accepts it there, and nothing stable comes behind it."""
    prompts = chats(lambda n, _: f"Now: {moment(n)}\n")
    diagnosis = diagnose(prompts)
    finding = the_finding(diagnosis.report)
    assert (finding.place.part, finding.place.line, finding.place.column) == ("system message", 1, 6)
    assert diagnosis.report.after.share > 0.8
    for number, prompt in enumerate(diagnosis.rewritten()):
        assert prompt["messages"][0]["content"].startswith("Now: [date and time]\n")
        assert prompt["messages"][-1]["content"].endswith(f"\n\n[date and time]: {moment(number)}")
        assert prompt["messages"][1:-1] == prompts[number]["messages"][1:-1]


def test_what_is_moved_stands_in_front_of_a_last_line_that_asks_for_the_answer() -> None:
    """ "Answer:" stays the end of the prompt, or the model would not answer."""
    (first, *_) = diagnose(texts(clock)).rewritten()
    assert first.startswith(f"Current time: [date and time]\n\n{RULES}")
    assert first.endswith("(0)\n[date and time]: 2024-11-22T10:15:03Z\n\nAnswer:")


def test_agents_with_a_preamble_in_common_are_told_apart() -> None:
    """A clock behind the preamble, in front of what only some of the prompts share, is found."""
    duties = ("Book what guests ask for. " * 12, "Refund what was cancelled in time. " * 12, "Calm guests down. " * 12)
    prompts = [f"{RULES}You have a duty. It is {moment(n)}. {duties[n % 3]}{QUESTIONS[n % 8]} {n}" for n in range(60)]
    report = diagnose(prompts).report
    finding = the_finding(report)
    assert (finding.kind, finding.place.line) == ("datetime", RULES.count("\n") + 1)
    assert report.after.share > report.today.share + 0.2


def test_a_clock_of_each_of_many_agents_is_one_finding() -> None:
    """Fifty small ones are not fifty pieces of advice."""
    source = random.Random(1)
    nouns = [hexadecimal(source, 6) + "x" for _ in range(2000)]
    duties = [" ".join(source.sample(nouns, 80)) for _ in range(50)]
    prompts = [f"Agent {duties[n % 50][:20]} at {moment(n)}.\n{duties[n % 50]}\n{n}" for n in range(500)]
    report = diagnose(prompts).report
    finding = the_finding(report)
    assert (finding.kind, finding.prompts, finding.groups) == ("datetime", 500, 50)
    assert report.after.share > 0.7 > 0.2 > report.today.share


def test_token_ids_that_vary_are_found() -> None:
    """Of a prompt that is token ids, the position is that of the token, and counts are exact."""
    prompts = [{"prompt": [7, 8, 9, 5000 + n, *range(300), 400 + n]} for n in range(COUNT)]
    diagnosis = diagnose(prompts)
    finding = the_finding(diagnosis.report)
    assert (finding.place.token, finding.examples[0].value, finding.examples[1].value) == (3, "5000", "5001")
    assert diagnosis.report.counted == "given"
    assert diagnosis.report.today.tokens == COUNT * 305
    assert list(diagnosis.rewritten())[1] == {"prompt": [7, 8, 9, *range(300), 401, 5001]}


# What is no finding


def test_prompts_that_only_end_differently_are_well() -> None:
    """There is nothing to advise, and nothing is rewritten."""
    prompts = texts(lambda _, __: "")
    diagnosis = diagnose(prompts)
    assert (diagnosis.report.findings, diagnosis.report.saved_tokens) == ([], 0)
    assert diagnosis.report.today == diagnosis.report.after
    assert diagnosis.report.today.share > 0.85
    assert list(diagnosis.rewritten()) == prompts


def test_prompts_with_nothing_in_common_are_like_no_other() -> None:
    """No advice is made up for them."""
    source = random.Random(2)
    report = diagnose([" ".join(hexadecimal(source, 5) for _ in range(200)) for _ in range(40)]).report
    assert (report.groups, report.ungrouped, list(report.findings)) == (0, 40, [])


def test_a_paragraph_that_some_prompts_have_is_not_moved() -> None:
    """Moved, it would be computed in every prompt; where it is, once."""
    report = diagnose(texts(lambda n, _: "Premium members borrow a helmet for free.\n\n" if n % 2 else "")).report
    assert report.findings == []


def test_a_conversation_that_grows_is_well() -> None:
    """Each turn repeats those before it, so there is nothing to move."""
    messages = [{"role": "system", "content": RULES}]
    prompts = []
    for number, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": f"{question} It is {moment(number)} now."})
        prompts.append({"messages": list(messages)})
        messages.append({"role": "assistant", "content": f"Let me look that up for you, {NAMES[number]}."})
    report = diagnose(prompts).report
    assert report.findings == []
    assert report.today.share > 0.75


def test_one_prompt_is_no_evidence() -> None:
    """A single prompt has nothing to differ from; no prompt at all is an error."""
    report = diagnose([texts(clock)[0]]).report
    assert (report.prompts, report.ungrouped, report.today.cached, list(report.findings)) == (1, 1, 0, [])
    with pytest.raises(InvalidArgument, match="no prompts"):
        diagnose([])


# Numbers


def test_seconds_come_from_the_prefill_rate() -> None:
    """Tokens divided by tokens per second; without a rate nothing is said."""
    prompts = texts(clock)
    with_rate, without = diagnose(prompts, tokens_per_second=100).report, diagnose(prompts).report
    assert with_rate.saved_seconds == with_rate.saved_tokens / 100
    assert with_rate.findings[0].saved_seconds == with_rate.findings[0].saved_tokens / 100
    assert (without.saved_seconds, without.findings[0].saved_seconds) == (None, None)


def test_a_cache_without_room_for_everything_is_taken_into_account() -> None:
    """Two kinds of prompts in turn, and room for one: nothing survives until it is needed again."""
    prompts = [(RULES if n % 2 else RULES[::-1]) + str(n) for n in range(20)]
    roomy, tight = diagnose(prompts).report, diagnose(prompts, blocks=14).report
    assert roomy.today.share > 0.8 > 0.4 > tight.today.share


def test_prompts_in_different_namespaces_share_nothing() -> None:
    """As in the cache itself."""
    together = [{"prompt": text} for text in texts(lambda _, __: "")]
    apart = [{**prompt, "namespace": str(number)} for number, prompt in enumerate(together)]
    assert diagnose(together).report.today.share > 0.8
    assert diagnose(apart).report.today.cached == 0


def test_who_tokenizes_counts() -> None:
    """With a tokenizer all figures are in its tokens, and the position is that of its token."""

    def tokenize(sources: Any) -> Any:
        for source in sources:
            yield [1, *source.encode()]

    prompts = texts(clock)
    report = diagnose(prompts, tokenize=tokenize).report
    assert (report.counted, report.today.tokens) == ("server", sum(len(text) + 1 for text in prompts))
    assert report.findings[0].place.token == 1 + len("Current time: ")
    common = len("Current time: 2024-11-22T10:")
    assert report.today.share == pytest.approx(common * (COUNT - 1) / report.today.tokens, abs=0.02)


def test_a_prompt_that_cannot_be_tokenized_is_named() -> None:
    """The error says which one it is."""

    def tokenize(sources: Any) -> Any:
        for number, _ in enumerate(sources):
            if number == 2:
                raise InvalidArgument("too long")
            yield [1, 2, 3]

    with pytest.raises(InvalidArgument, match="prompt 2: too long"):
        _ = diagnose(texts(clock), tokenize=tokenize).report


def test_nothing_is_lost_where_edits_meet() -> None:
    """A range that is moved may contain others, spaces to change, and the last line."""
    pieces = Pieces()
    text = pieces.of_text("Now: 2024-11-22  Anna said\nBob:")
    field = [pieces.field("text"), *text]
    places = {piece.text: place for place, piece in enumerate(field)}
    outer = Edit(places["2024-11-22"], places["Bob"] + 1)
    inner = Edit(places["Anna"], places["Anna"] + 1)
    spaces = [Edit(places["2024-11-22"], places["2024-11-22"]), Edit(places["  "], places["  "] + 1)]
    plan = Plan(moves=[(1, inner), (0, outer)], spaces=[(2, edit) for edit in spaces])
    rewriter = Rewriter(pieces, {0: "text", 1: "name"}, {})

    def rewritten(*advice: int) -> str:
        return "".join(piece.text or "" for piece in rewriter.rewrite(field, plan, frozenset(advice)))

    assert rewritten() == "Now: 2024-11-22  Anna said\nBob:"
    assert rewritten(1) == "Now: 2024-11-22  [name] said\n[name]: Anna\n\nBob:"
    assert rewritten(0, 1, 2) == "Now: [text]:\n\n[text]: 2024-11-22  Anna said\nBob"
    assert rewritten(1, 2) == "Now: 2024-11-22[name] said\n[name]: Anna\n\nBob:"


# Any input


LINES = st.sampled_from([*RULES.splitlines(), '{"b": 1, "a": [2, 3]}', "- x", "- y", "[1, [2", "", "  ", "a, b and c"])
VALUES = st.sampled_from(["2024-11-22", "10:15", "Anna", "7", "550e8400-e29b-41d4-a716-446655440000", "", "{", "\r"])


@given(st.lists(st.lists(st.tuples(LINES, VALUES), max_size=6), min_size=1, max_size=8))
def test_rewriting_loses_nothing(prompts: list[list[tuple[str, str]]]) -> None:
    """Whatever the prompts are: all words are still there, and there is never less reuse than today."""
    sources = [".\n".join(f"{line} {value}" for line, value in prompt) + " end" for prompt in prompts]
    diagnosis = diagnose(sources)
    report = diagnosis.report
    assert report.saved_tokens >= 0
    for before, after in zip(sources, diagnosis.rewritten(), strict=True):
        assert not Counter(filter(str.isalnum, before)) - Counter(filter(str.isalnum, after))


@pytest.mark.parametrize("family", ["alike", "unlike", "edited", "cut off", "brackets"])
def test_work_grows_with_the_number_of_prompts_and_no_faster(family: str) -> None:
    """Twice the prompts are about twice the function calls, however they are alike or not."""
    source = random.Random(3)
    vocabulary = [hexadecimal(source, 4) + "x" for _ in range(3000)]
    base = source.choices(vocabulary, k=150)

    def prompt(number: int) -> str:
        match family:
            case "alike":
                return f"{moment(number)} {' '.join(base)} {number}"
            case "unlike":
                return " ".join(source.choices(vocabulary, k=150))
            case "edited":
                at = source.randrange(150)
                return " ".join([*base[:at], source.choice(vocabulary), *base[at + 1 :]])
            case "cut off":
                return " ".join([*base[: source.randrange(150)], *source.choices(vocabulary, k=30)])
            case _:
                return '{"a": [' * 40 + " ".join(base[:20]) + str(number)

    def calls(count: int) -> int:
        prompts = [prompt(number) for number in range(count)]
        made = 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            _ = diagnose(prompts).report
        finally:
            sys.setprofile(None)
        return made

    assert calls(120) < 2.6 * calls(60)


def test_rewritten_prompts_are_what_was_simulated() -> None:
    """The share after the advice is that of the rewritten prompts, counted anew."""
    diagnosis = diagnose(texts(profile), tokenize=lambda sources: [list(source.encode()) for source in sources])
    again = diagnose(list(diagnosis.rewritten()), tokenize=lambda sources: [list(text.encode()) for text in sources])
    assert again.report.today == diagnosis.report.after
