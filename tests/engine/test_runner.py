"""Steps made by hand, on real (tiny, random) models: greedy tokens are those of transformers' `generate`.

No scheduler and no cache here: the tests lay out the block tables themselves, in ways
that a scheduler would rarely come by.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import attention
from engine.kv import KVPool
from engine.model import LoadedModel, from_pretrained_model
from engine.request import Request, Sampled, SamplingParams
from engine.runner import Runner
from engine.sampler import Row, sample
from engine.scheduler import BlockCopy, Chunk, Step
from tests.engine import models

SIZE = 8
BLOCKS = 64
OUTPUT = 8

Generate = Callable[[Sequence[int]], list[int]]
Subject = tuple[LoadedModel, Generate]


def tokens(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


@pytest.fixture(scope="module", params=list(models.ARCHITECTURES))
def subject(request: pytest.FixtureRequest) -> Subject:
    """A model that uses our attention, and transformers' own generation with its eager attention."""
    reference: Any = models.build(request.param)
    reference.set_attn_implementation("eager")
    reference.generation_config.eos_token_id = None

    def generate(prompt: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(prompt)])
        whole = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT, do_sample=False)
        return [int(token) for token in whole[0, len(prompt) :]]

    return from_pretrained_model(models.build(request.param), request.param), generate


# Bytes of keys that make up for a call: always by call, in between, always by copy.
@pytest.fixture(params=[1, 16 * 64, 2**30], ids=["calls", "mixed", "copies"])
def cost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plan believe that calls cost next to nothing, something, or everything."""
    monkeypatch.setitem(attention.CALL_BYTES, "cpu", request.param)


class Bench:
    """A runner, a pool that holds only NaN, and free block ids: in order, or shuffled."""

    def __init__(self, loaded: LoadedModel, *, shuffled: bool = False) -> None:
        pool = KVPool(loaded.geometry, BLOCKS, SIZE, loaded.device)
        for tensor in [*pool.keys, *pool.values]:
            tensor.fill_(torch.nan)  # whoever reads what was never written gets caught
        self.runner = Runner(loaded, pool)
        self.free = list(range(BLOCKS))
        if shuffled:
            random.Random(0).shuffle(self.free)

    def blocks(self, length: int) -> list[int]:
        """Take blocks for this many tokens."""
        count = -(-length // SIZE)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def sequence(self, prompt: list[int], shared: Sequence[int] = (), cached: int | None = None) -> Generation:
        """Return a request whose first blocks are `shared`; `cached` tokens are in its blocks already."""
        missing = len(prompt) + OUTPUT - len(shared) * SIZE
        cached = len(shared) * SIZE if cached is None else cached
        return Generation(prompt, [*shared, *self.blocks(missing)], cached)

    def run(self, work: Sequence[tuple[Generation, int]], copies: Sequence[BlockCopy] = ()) -> None:
        """Run one step that computes the next so many tokens of each generation."""
        chunks = [generation.chunk(count) for generation, count in work]
        for (generation, _), chunk, sampled in zip(
            work, chunks, self.runner.run(Step(chunks, list(copies))), strict=True
        ):
            generation.take(chunk, sampled)

    def finish(self, *generations: Generation, copies: Sequence[BlockCopy] = ()) -> None:
        """Prefill what is missing in one step, then decode all of them together."""
        while missing := [one for one in generations if len(one.output) < OUTPUT]:
            self.run([(one, len(one.request.tokens) - one.computed) for one in missing], copies)
            copies = ()


class Generation:
    """One request as a scheduler would keep it."""

    def __init__(self, prompt: list[int], blocks: list[int], computed: int) -> None:
        self.request = Request("r", prompt, SamplingParams(), 0, sink=lambda _: None)
        self.blocks = blocks
        self.computed = computed

    @property
    def output(self) -> list[int]:
        return self.request.output

    def chunk(self, count: int) -> Chunk:
        end = self.computed + count
        known = self.request.tokens
        return Chunk(self.request, self.computed, known[self.computed : end], self.blocks, end == len(known))

    def take(self, chunk: Chunk, sampled: Sampled | None) -> None:
        assert (sampled is not None) == chunk.sample
        self.computed += len(chunk.tokens)
        if sampled is not None:
            self.request.tokens.append(sampled.token)


def test_cold(subject: Subject) -> None:
    """The whole prompt in one chunk, then token by token, for lengths around the ends of blocks."""
    loaded, generate = subject
    for length in (1, 7, 8, 9, 37):
        bench = Bench(loaded)
        one = bench.sequence(tokens(length, seed=length))
        bench.finish(one)
        assert one.output == generate(one.request.prompt), length


def test_chunked(subject: Subject) -> None:
    """A prompt in chunks of odd sizes, a single token among them."""
    loaded, generate = subject
    bench = Bench(loaded)
    one = bench.sequence(tokens(40, seed=1))
    for count in (7, 9, 1, 16, 6):
        bench.run([(one, count)])
    bench.finish(one)
    assert one.output == generate(one.request.prompt)


@pytest.mark.parametrize("cached", [8, 16, 19, 23, 24, 31])
def test_warm(subject: Subject, cached: int) -> None:
    """Another request's blocks are reused; of the one that matches in part, the matching slots are copied."""
    loaded, generate = subject
    bench = Bench(loaded)
    first = bench.sequence(tokens(32, seed=2))
    bench.finish(first)
    prompt = first.request.tokens[:cached] + tokens(6, seed=3)
    whole, part = divmod(cached, SIZE)
    second = bench.sequence(prompt, first.blocks[:whole], cached)
    copies = [BlockCopy(first.blocks[whole], second.blocks[whole], part)] if part else []
    bench.finish(second, copies=copies)
    assert second.output == generate(prompt)
    assert first.output == generate(first.request.prompt)


def test_exact_repeat(subject: Subject) -> None:
    """Only the last token of a prompt is computed when all before it is cached."""
    loaded, generate = subject
    bench = Bench(loaded)
    first = bench.sequence(tokens(32, seed=4))
    bench.finish(first)
    again = bench.sequence(first.request.tokens[:32], first.blocks[:3], cached=31)
    bench.finish(again, copies=[BlockCopy(first.blocks[3], again.blocks[3], SIZE - 1)])
    assert again.output == first.output == generate(first.request.prompt)


@pytest.mark.usefixtures("cost")
@pytest.mark.parametrize("shuffled", [False, True], ids=["adjacent", "scattered"])
def test_ragged(subject: Subject, shuffled: bool) -> None:
    """Prefills and decodes, sharing a prefix, sharing more of it, or sharing nothing, in the same steps."""
    loaded, generate = subject
    bench = Bench(loaded, shuffled=shuffled)
    system = bench.sequence(tokens(43, seed=5))
    bench.run([(system, 43)])
    prompt, blocks = system.request.tokens, system.blocks
    near = [bench.sequence(prompt[:40] + tokens(2 + i, seed=10 + i), blocks[:5]) for i in range(3)]
    far = [bench.sequence(prompt[:16] + tokens(9 * i + 1, seed=20 + i), blocks[:2]) for i in range(2)]
    alone = [bench.sequence(tokens(length, seed=30 + length)) for length in (1, 12)]
    bench.run([(near[0], 1), (alone[1], 5), (far[1], 3), (system, 1), (far[0], 1)])
    bench.run([(far[1], 4), (system, 1), (near[1], 3), (near[0], 1), (alone[0], 1)])
    everyone = [system, *near, *far, *alone]
    bench.finish(*everyone)
    for one in everyone:
        assert one.output == generate(one.request.prompt)


@pytest.mark.usefixtures("cost")
def test_scattered_blocks(subject: Subject) -> None:
    """Block ids in any order, and two runs that are not adjacent, change nothing."""
    loaded, generate = subject
    prompt = tokens(45, seed=6)
    for blocks in ([9, 3, 50, 2, 1, 63, 0], [20, 21, 22, 23, 5, 6, 7], [40, 38, 36, 34, 32, 30, 28]):
        bench = Bench(loaded)
        one = Generation(prompt, blocks, 0)
        bench.run([(one, 30)])
        bench.finish(one)
        assert one.output == generate(prompt)


def note_logits(seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runner's logits be put into `seen`, step by step, before they are sampled from."""

    def noting(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
        seen.append(logits.clone())
        return sample(logits, rows)

    monkeypatch.setattr("engine.runner.sample", noting)


def test_logits_are_those_of_eager_attention(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked and decoded, float32 logits differ by rounding only."""
    loaded, _ = subject
    seen: list[Tensor] = []
    note_logits(seen, monkeypatch)
    bench = Bench(loaded, shuffled=True)
    one = bench.sequence(tokens(30, seed=7))
    bench.run([(one, 11)])
    bench.finish(one)
    reference = models.build(loaded.name)
    reference.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([one.request.tokens[:-1]]), use_cache=False).logits[0, 29:]
    ours = torch.cat(seen)
    assert ours.shape == logits.shape
    assert float((ours - logits).abs().max()) < 1e-5 * float(logits.abs().max())


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2"])
def test_half_precision(architecture: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 logits, cached and in company, are as near to those of exact arithmetic as eager attention's are."""
    loaded = from_pretrained_model(models.build(architecture, torch.bfloat16), architecture, native=native)
    seen: list[Tensor] = []
    note_logits(seen, monkeypatch)
    bench = Bench(loaded)
    first = bench.sequence(tokens(32, seed=8))
    bench.run([(first, 32)])
    second = bench.sequence(first.request.tokens[:24] + tokens(5, seed=9), first.blocks[:3])
    bench.run([(second, 5), (first, 1)])
    references = []
    for dtype in (torch.bfloat16, torch.float32):
        reference = models.build(architecture, torch.bfloat16).to(dtype)  # type: ignore[arg-type]
        reference.set_attn_implementation("eager")
        with torch.inference_mode():
            logits = reference(input_ids=torch.tensor([second.request.prompt]), use_cache=False).logits[0, -1]
        references.append(logits.float())
    eager, exact = references
    ours, its = (float((logits - exact).norm() / exact.norm()) for logits in (seen[1][0], eager))
    assert ours < 1.2 * its < 0.1


def test_sampling_parameters_and_seeds_reach_the_sampler() -> None:
    """Requests in one step are sampled each by its own parameters, with the history that it has."""
    loaded = from_pretrained_model(models.build("llama"), "llama")
    prompt = tokens(10, seed=11)

    def request(seed: int, **params: Any) -> Request:
        return Request("r", prompt, SamplingParams(**params), seed, sink=lambda _: None)

    def outputs(requests: list[Request]) -> list[list[Sampled]]:
        bench = Bench(loaded)
        blocks = [bench.blocks(20) for _ in requests]
        sampled: list[list[Sampled]] = [[] for _ in requests]
        for step in range(6):
            start = len(prompt) - 1 + step if step else 0
            chunks = [Chunk(r, start, r.tokens[start:], b, True) for r, b in zip(requests, blocks, strict=True)]
            for one, its, result in zip(requests, sampled, bench.runner.run(Step(chunks, [])), strict=True):
                assert result is not None
                one.tokens.append(result.token)
                its.append(result)
        return sampled

    kinds: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"temperature": 1.5}),
        (2, {"temperature": 1.5}),
        (3, {"temperature": 1.5, "top_k": 5}),
        (4, {"presence_penalty": 2.0, "frequency_penalty": 2.0, "logit_bias": {7: 30.0}}),
        (5, {"logprobs": 2}),
    ]
    together = outputs([request(seed, **params) for seed, params in kinds])
    alone = [outputs([request(seed, **params)])[0] for seed, params in kinds]
    assert [[one.token for one in its] for its in together] == [[one.token for one in its] for its in alone]
    assert together[1] == together[2] != together[0]
    assert together[4][0].token == 7
    assert len(together[5][0].top) == 2 and together[5][0].top[0][0] == together[5][0].token


def test_nothing_to_sample() -> None:
    """A chunk in the middle of a prompt gives None, alone and beside one that samples."""
    loaded = from_pretrained_model(models.build("llama"), "llama")
    bench = Bench(loaded)
    one, other = bench.sequence(tokens(20, seed=12)), bench.sequence(tokens(5, seed=13))
    assert bench.runner.run(Step([one.chunk(8)], [])) == [None]
    first, second = bench.runner.run(Step([one.chunk(8), other.chunk(5)], []))
    assert first is None and second is not None


@pytest.mark.parametrize("blocks", [1, 2, 64])
def test_warm_up(blocks: int) -> None:
    """It runs in a pool of any size and leaves nothing behind that matters."""
    loaded = from_pretrained_model(models.build("llama"), "llama")
    warm = Runner(loaded, KVPool(loaded.geometry, blocks, SIZE))
    warm.warm_up()
    request = Request("r", tokens(7, seed=14), SamplingParams(), 0, sink=lambda _: None)
    step = Step([Chunk(request, 0, request.tokens, [0], True)], [])
    assert warm.run(step) == Runner(loaded, KVPool(loaded.geometry, blocks, SIZE)).run(step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_on_the_gpu(architecture: str) -> None:
    """Warm and ragged, the tokens are those of the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        loaded = from_pretrained_model(models.build(architecture, device=device), architecture)
        bench = Bench(loaded)
        first = bench.sequence(tokens(32, seed=15))
        bench.finish(first)
        second = bench.sequence(first.request.tokens[:24] + tokens(5, seed=16), first.blocks[:3])
        third = bench.sequence(tokens(11, seed=17))
        bench.finish(second, third)
        results.append([first.output, second.output, third.output])
    assert results[0] == results[1]
