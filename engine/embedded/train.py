"""Trains the embedded model: `python -m engine.embedded.train --out DIRECTORY`.

Everything it learns from is drawn from `dialogues` while it learns; there is no corpus.
Equal seeds and numbers of workers give equal weights on the same machine and versions.
A run that was interrupted goes on where it stopped with `--resume`.

Rows grow with the training: what is asked of a short sheet is learned first, in a few
hundred steps, and then stretched. Matrices are trained by Muon (Jordan et al., 2024, as
in torch.optim), embeddings and norms by Adam; weights are bfloat16 with float32 masters.
On a CPU each worker is a process with one thread, and takes so few tokens at a time
that they stay in its core's cache.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.embedded import vocabulary
from engine.embedded.beginning import PUT_IN, ROPE_THETA, begin
from engine.embedded.dialogues import Conversation, draw_sheet, messages_of
from engine.embedded.values import Source

STEPS = 7500
LENGTHS = ((600, 256), (1700, 512), (3400, 1024), (7300, 2048), (STEPS, 4096))
"""How long rows are up to which of STEPS; with more or fewer steps, in proportion."""
HELD = 700
"""Up to which of STEPS what `beginning` has put in stays as it is, and the rest learns to use it."""
CALLS = 4600
"""From which of STEPS on every other row practises calls: what stands in quotes is spelled in tokens of its own."""
WARM_UP, COOL_DOWN = 60, 0.4
"""Steps in which the learning rates rise, and the share of all steps in which they fall to zero."""
MATRIX_RATE, OTHER_RATE = 0.004, 5e-4
NORM_LIMIT = 1.0
TEXT_SHARE, TEXT_WEIGHT = 0.1, 0.3
"""How many of the tokens that are not the assistant's are learned too, and what they weigh."""
CHARACTERS_PER_TOKEN = 3.2
TOKENIZER_DIALOGUES = 3000
SAVE_EVERY, REPORT_EVERY = 200, 50


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on."""

    steps: int
    tokens: int
    """Tokens a step."""
    workers: int
    seed: int

    def length(self, step: int) -> int:
        """Return how many tokens a row has."""
        return next(length for until, length in LENGTHS if step * STEPS < until * self.steps)

    def rate(self, step: int) -> float:
        """Return what the learning rates are multiplied by."""
        return min(1.0, (step + 1) / WARM_UP, (self.steps - step) / (COOL_DOWN * self.steps))


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer learned from dialogues like those of the training."""

    def texts() -> Iterator[str]:
        for index in range(TOKENIZER_DIALOGUES):
            source = Source(Random(f"tokenizer {seed} {index}"))
            sheet = draw_sheet(source, 1500)
            yield from map(json.dumps, sheet.tools)
            for message in messages_of(sheet, Conversation(source, sheet).turns(14)):
                yield message["content"]

    return vocabulary.learn(texts())


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the configuration of the model: 3.9 million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=vocabulary.MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
    )


class Rows:
    """Draws rows of token ids: a dialogue each, with as many turns as there is room for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._ids: dict[str, int] = tokenizer.get_vocab()

    def draw(self, seed: str, length: int, calls: bool = False) -> tuple[list[int], list[bool]]:
        """Return `length` token ids, and which of them are the assistant's."""
        source = Source(Random(seed))
        characters = int(source.random.uniform(0.1, 0.8) * length * CHARACTERS_PER_TOKEN)
        sheet = draw_sheet(source, characters, calls=calls)
        ids = [self._ids[vocabulary.BEGIN]]
        own = [False]
        if sheet.tools:
            self._add(ids, own, "system", "".join(f"{json.dumps(tool)}\n" for tool in sheet.tools))
        conversation = Conversation(source, sheet, calls)
        for message in messages_of(sheet, ()):
            self._add(ids, own, message["role"], message["content"])
        while len(ids) < length:
            for message in conversation.turn().messages:
                self._add(ids, own, message["role"], message["content"])
        return ids[:length], own[:length]

    def _add(self, ids: list[int], own: list[bool], role: str, text: str) -> None:
        tokens = self._encode(text, add_special_tokens=False).ids
        assistant = role == "assistant"
        ids += [self._ids[f"<|{role}|>"], *tokens, self._ids[vocabulary.END]]
        own += [False, *[assistant] * len(tokens), assistant]


class Worker:
    """One process of a training: its model, and masters of the weights that are equal in all processes."""

    def __init__(self, recipe: Recipe, rank: int, tokenizer: PreTrainedTokenizerFast) -> None:
        self.recipe = recipe
        self.step = 0
        self._rank = rank
        self._rows = Rows(tokenizer)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(build_config(tokenizer))
        begin(self.model, tokenizer)
        self.model.train()
        module: nn.Module = self.model
        module.to(self._device)
        self._masters = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        module.to(torch.bfloat16)
        self._weights = dict(module.named_parameters())
        matrices = [name for name, weight in self._weights.items() if weight.ndim == 2 and "embed" not in name]
        self._optimizers = [
            (torch.optim.Muon([self._masters[name] for name in matrices], weight_decay=0.01), MATRIX_RATE),
            (
                torch.optim.AdamW(
                    [master for name, master in self._masters.items() if name not in matrices],
                    betas=(0.9, 0.98),
                    weight_decay=0.0,
                ),
                OTHER_RATE,
            ),
        ]
        self._copy_masters()

    def advance(self) -> tuple[float, float]:
        """Make a step; return the loss and the share of right tokens among the assistant's."""
        recipe = self.recipe
        length = recipe.length(self.step)
        rows = max(recipe.tokens // length // recipe.workers, 1)
        at_once = rows if self._device.type == "cuda" else max(512 // length, 1)
        sums = torch.zeros(3, device=self._device)
        practise = self.step * STEPS >= CALLS * recipe.steps
        for first in range(0, rows, at_once):
            drawn = [
                self._rows.draw(
                    f"{recipe.seed} {self.step} {self._rank} {row}",
                    length + 1,
                    calls=practise and (self.step + self._rank + row) % 2 == 0,
                )
                for row in range(first, min(first + at_once, rows))
            ]
            sums += self._learn(drawn, rows * length)
        gradient = torch.cat([weight.grad.float().flatten() for weight in self._weights.values()] + [sums])  # type: ignore[union-attr]
        if recipe.workers > 1:
            distributed.all_reduce(gradient)
        loss, right, count = gradient[-3:].tolist()
        self._update(gradient[:-3] / recipe.workers)
        self.step += 1
        return loss / max(count, 1), right / max(count, 1)  # no answer may have found room in any row

    def _learn(self, drawn: list[tuple[list[int], list[bool]]], tokens: int) -> Tensor:
        """Add to the gradients; return sums over the assistant's tokens: loss, right ones, all."""
        ids = torch.tensor([ids for ids, _ in drawn])
        own = torch.tensor([own for _, own in drawn])[:, 1:]
        generator = torch.Generator().manual_seed(self.step)
        taken = own | (torch.rand(own.shape, generator=generator) < TEXT_SHARE)
        targets, own, ids = ids[:, 1:][taken].to(self._device), own[taken].to(self._device), ids.to(self._device)
        hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[taken.to(self._device)]
        logits = self.model.lm_head(hidden).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        (torch.where(own, losses, losses * TEXT_WEIGHT).sum() / tokens).backward()
        right = (logits.argmax(-1) == targets) & own
        return torch.stack([losses.detach()[own].sum(), right.sum(), own.sum()])

    def _update(self, gradient: Tensor) -> None:
        gradient *= NORM_LIMIT / torch.clamp(gradient.norm(), min=NORM_LIMIT)
        start = 0
        held = PUT_IN if self.step * STEPS < HELD * self.recipe.steps else ()
        for name, master in self._masters.items():
            own = gradient[start : start + master.numel()].view_as(master)
            master.grad = None if any(part in name for part in held) else own
            start += master.numel()
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.recipe.rate(self.step)
            optimizer.step()
        self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, weight in self._weights.items():
            weight.copy_(self._masters[name])
            weight.grad = None

    def save(self, path: Path) -> None:
        """Write what `resume` goes on from; a crash meanwhile leaves the file of before."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "masters": self._masters,
            "optimizers": [optimizer.state_dict() for optimizer, _ in self._optimizers],
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a file of `save`. Raises ValueError if it is of another recipe."""
        state: dict[str, Any] = torch.load(path, map_location=self._device, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} is of another training ({state['recipe']}): give its options, or another --out")
        self.step = state["step"]
        for name, master in self._masters.items():
            master.copy_(state["masters"][name])
        for (optimizer, _), saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._copy_masters()


@contextmanager
def together(recipe: Recipe, rank: int, port: int) -> Iterator[None]:
    """Let the workers of a training find each other at a port of this machine."""
    if recipe.workers == 1:
        yield
        return
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=recipe.workers)
    yield
    distributed.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def work(rank: int, recipe: Recipe, out: Path, resume: bool, port: int) -> None:
    """Train as one of `recipe.workers` processes; the first one reports and saves."""
    tokenizer = build_tokenizer(recipe.seed)
    with together(recipe, rank, port):
        worker = Worker(recipe, rank, tokenizer)
        checkpoint = out / "checkpoint.pt"
        if resume and checkpoint.exists():
            worker.resume(checkpoint)
        for recent, speed in _steps(worker, quiet=rank > 0):
            if rank > 0:
                continue
            if worker.step % REPORT_EVERY == 0:
                loss, right = (sum(column) / len(recent) for column in zip(*recent, strict=True))
                with open(out / "train.log", "a", encoding="utf-8") as log:
                    print(
                        f"step {worker.step} of {recipe.steps}, rows of {recipe.length(worker.step - 1)}: "
                        f"loss {loss:.4f}, right {right:.2%}; {speed:,.0f} tokens/s",
                        file=log,
                    )
            if worker.step % SAVE_EVERY == 0 or worker.step == recipe.steps:
                worker.save(checkpoint)
                worker.model.save_pretrained(out)
                tokenizer.save_pretrained(out)


def _steps(worker: Worker, quiet: bool) -> Iterator[tuple[list[tuple[float, float]], float]]:
    """Make all steps behind a progress bar; after each, yield the latest losses and shares, and tokens per second."""
    recipe = worker.recipe
    recent: list[tuple[float, float]] = []
    began, first = time.monotonic(), worker.step
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, quiet=quiet),
    ) as bar:
        task = bar.add_task("training", total=recipe.steps, completed=worker.step)
        while worker.step < recipe.steps:
            recent = [*recent, worker.advance()][-REPORT_EVERY:]
            loss, right = recent[-1]
            bar.update(task, completed=worker.step, description=f"loss {loss:.3f}, right {right:.1%}")
            yield recent, (worker.step - first) * recipe.tokens / (time.monotonic() - began)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Directory for model, tokenizer, checkpoint and log.")],
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens a step; of one row at least.")] = 4096,
    workers: Annotated[int, typer.Option(min=1, help="Processes; 1 with a GPU.")] = 2,
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train the embedded model from nothing but the grammar beside this file."""
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / "train.log").unlink(missing_ok=True)
    recipe = Recipe(steps, tokens, workers, seed)
    if workers == 1:
        work(0, recipe, out, resume, 0)
    else:
        start_processes(work, (recipe, out, resume, free_port()), nprocs=workers)


if __name__ == "__main__":
    app()
