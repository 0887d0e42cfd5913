"""The training of the embedded model, in its smallest form."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from engine.embedded import train
from engine.embedded.beginning import begin
from engine.embedded.dialogues import draw_sheet
from engine.embedded.train import Recipe, Rows, Worker
from engine.embedded.values import Source


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One that was learned from few dialogues."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TOKENIZER_DIALOGUES", 60)
        return train.build_tokenizer(0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    monkeypatch.setattr(train, "build_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(train, "LENGTHS", ((train.STEPS, 128),))
    monkeypatch.setattr(train, "REPORT_EVERY", 1)
    monkeypatch.setattr(train, "WARM_UP", 2)
    monkeypatch.setattr(train, "CALLS", train.STEPS)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(train.app, list(arguments), catch_exceptions=False)
    return result.output


@pytest.mark.usefixtures("small")
def test_it_learns_writes_a_model_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal seeds give equal weights, in one go or in two; the log tells of a loss that falls."""
    options = ("--steps", "6", "--tokens", "2048", "--workers", "1")
    run("--out", str(tmp_path / "one"), *options)
    losses = [
        float(line.split("loss ")[1].split(",")[0]) for line in (tmp_path / "one/train.log").read_text().splitlines()
    ]
    assert len(losses) == 6 and losses[-1] < losses[0]

    class Interrupted(Exception):
        pass

    advance = Worker.advance

    def interrupted(worker: Worker) -> tuple[float, float]:
        if worker.step == 4:
            raise Interrupted
        return advance(worker)

    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(Worker, "advance", interrupted)
    with pytest.raises(Interrupted):
        run("--out", str(tmp_path / "two"), *options)
    monkeypatch.setattr(Worker, "advance", advance)
    run("--out", str(tmp_path / "two"), *options, "--resume")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="is of another training"):
        run("--out", str(tmp_path / "two"), "--steps", "8", "--workers", "1", "--resume")


@pytest.mark.usefixtures("small")
def test_two_workers_learn_the_same_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Processes that share a step keep equal weights: the first one's file is both's."""
    recipe = Recipe(2, 512, 2, 0)
    start_processes(_two_steps, (recipe, tmp_path, tokenizer, train.free_port()), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["masters"] for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def _two_steps(rank: int, recipe: Recipe, out: Path, tokenizer: PreTrainedTokenizerFast, port: int) -> None:
    with pytest.MonkeyPatch.context() as patch, train.together(recipe, rank, port):
        patch.setattr(train, "LENGTHS", ((train.STEPS, 128),))
        patch.setattr(train, "CALLS", 0)  # practised from the beginning
        worker = Worker(recipe, rank, tokenizer)
        worker.advance()
        worker.advance()
        worker.save(out / f"{rank}.pt")


@pytest.fixture(scope="module")
def untrained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(train.build_config(tokenizer))
    begin(model, tokenizer)
    return model


def test_an_untrained_model_copies(untrained: LlamaForCausalLM) -> None:
    """What it begins with: random tokens go on as they went on before."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(6, untrained.config.vocab_size, (1, 100), generator=generator)
    with torch.inference_mode():
        guessed = untrained(torch.cat([once, once], dim=1)).logits[0, 101:-1].argmax(-1)
    assert (guessed == once[0, 2:]).float().mean() > 0.7


def test_an_untrained_model_looks_up(untrained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """And: after the right label for the right thing, more often than not the right value begins."""
    right = asked = 0
    for number in range(8):
        source = Source(Random(f"untrained {number}"))
        sheet = draw_sheet(source, 900, layout="list")
        thing, values = Random(number).choice(list(sheet.things.items()))
        for label, value in values.items():
            beginning = tokenizer.encode(f"{sheet.text}\n\nFor {sheet.spoken(thing)}: {label}")
            first = tokenizer.encode(f" {value}", add_special_tokens=False)[0]
            with torch.inference_mode():
                right += int(untrained(torch.tensor([beginning])).logits[0, -1].argmax()) == first
            asked += 1
    assert right > 0.35 * asked  # by chance: one in as many as there are things


def test_rows_are_dialogues_and_know_what_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """A row is what the chat template makes of a dialogue; the assistant's tokens and their ends are learned."""
    rows = Rows(tokenizer)
    for seed in range(20):
        ids, own = rows.draw(f"{seed}", 600)
        assert len(ids) == len(own) == 600
        text = str(tokenizer.decode(ids))
        assert text.startswith("<|begin|><|system|>")
        learned = str(tokenizer.decode([token for token, mine in zip(ids, own, strict=True) if mine]))
        answers = [part.split("<|")[0] for part in text.split("<|assistant|>")[1:]]
        assert learned.split("<|end|>")[: len(answers) - 1] == answers[:-1]
        assert ids == rows.draw(f"{seed}", 600)[0] != rows.draw(f"{seed + 1}", 600)[0]


def test_lengths_and_rates_follow_the_recipe() -> None:
    """Rows grow, rates rise, stay, and fall to nearly nothing."""
    recipe = Recipe(1000, 8192, 1, 0)
    lengths = [recipe.length(step) for step in range(1000)]
    assert lengths == sorted(lengths) and set(lengths) == {length for _, length in train.LENGTHS}
    rates = [recipe.rate(step) for step in range(1000)]
    assert rates[0] < 0.1 and rates[300] == 1.0 and rates[-1] < 0.01
