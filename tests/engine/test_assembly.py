"""Engines put together from a configuration and served: real models, real tokenizers, real gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine import assembly
from engine.assembly import Engine, load_engine
from engine.config import load
from engine.embedded.vocabulary import bytewise
from engine.scheduler import Scheduler
from prefixcache.cache import PrefixCache
from prefixcache.client import Client
from prefixcache.errors import FailedPrecondition, InvalidArgument, NotFound
from tests.engine.serving import RunningServer

SYSTEM = "You are a careful assistant. " * 8


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """The embedded model, served."""
    with RunningServer(cache_memory="32MiB", threads=2) as server, Client(server.address) as client:
        yield client
        server.check()


def assemble(**options: object) -> Engine:
    return load_engine(load({}, threads=2, **options), lambda reason: None)


def test_the_cache_changes_the_work_and_not_the_answer(client: Client) -> None:
    """Greedy tokens of a cold prompt, of its repeat, and without the cache are the same."""
    prompt = SYSTEM + "What is a prefix?"
    cold = client.generate(prompt, max_tokens=24, ignore_eos=True, timeout=60)
    warm = client.generate(prompt, max_tokens=24, ignore_eos=True, timeout=60)
    bypassed = client.generate(prompt, max_tokens=24, ignore_eos=True, read_cache=False, timeout=60)
    assert (cold.usage.cached_tokens, bypassed.usage.cached_tokens) == (0, 0)
    assert warm.usage.cached_tokens == warm.usage.prompt_tokens - 1
    assert warm.token_ids == cold.token_ids == bypassed.token_ids
    assert warm.text == cold.text


def test_a_shared_system_prompt_is_computed_once(client: Client) -> None:
    """Another question after the same beginning reuses it up to the first token that differs."""
    turns = [{"role": "system", "content": SYSTEM + "Answer briefly."}]
    prompts = [client.tokenize([*turns, {"role": "user", "content": text}], timeout=60) for text in ("One?", "Two?")]
    shared = next(place for place, (one, other) in enumerate(zip(*prompts, strict=False)) if one != other)
    first, second = (client.generate(prompt, max_tokens=4, timeout=60) for prompt in prompts)
    assert first.usage.cached_tokens < shared
    assert (second.usage.cached_tokens, second.miss_reason, second.miss_position) == (shared, "diverged", shared)


def test_the_next_turn_of_a_chat_finds_the_answer_cached(client: Client) -> None:
    """What the model generated is part of the next prompt, and needs no computing again."""
    prompt = client.tokenize([{"role": "user", "content": "Tell me a story."}], timeout=60)
    answer = client.generate(prompt, max_tokens=40, ignore_eos=True, timeout=60)
    found = client.lookup([*prompt, *answer.token_ids, 65, 66, 67], timeout=60)
    assert found.cached_tokens >= (len(prompt) + 39) // 16 * 16


def test_a_seed_gives_the_same_tokens_again(client: Client) -> None:
    """Random sampling is repeatable, and another seed is another answer."""
    one, same, other = (
        client.generate("Once", max_tokens=20, temperature=1.0, seed=seed, timeout=60) for seed in (1, 1, 2)
    )
    assert one.token_ids == same.token_ids != other.token_ids


def test_log_probabilities_come_with_the_tokens(client: Client) -> None:
    """One entry per token; greedy choices are the most probable ones."""
    completion = client.generate("Once", max_tokens=5, logprobs=3, ignore_eos=True, timeout=60)
    assert len(completion.logprobs) == len(completion.token_ids) == 5
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry.top[0] == (token, entry.logprob)
        assert [logprob for _, logprob in entry.top] == sorted((logprob for _, logprob in entry.top), reverse=True)
    assert client.generate("Once", max_tokens=1, timeout=60).logprobs == []


def test_the_model_describes_itself(client: Client) -> None:
    """Name, sizes and precision are those of what was loaded."""
    model = client.model(timeout=60)
    assert (model.name, model.architecture, model.dtype, model.device) == ("embedded", "llama", "float32", "cpu")
    assert (model.max_length, model.vocab_size) == (4096, 2048)
    assert (model.block_size, model.has_chat_template) == (16, True)
    assert model.eos_token_ids == (1,)
    blocks = client.stats(timeout=60).blocks
    assert blocks.total * blocks.bytes_per_block <= 32 * 2**20 < (blocks.total + 1) * blocks.bytes_per_block


def test_the_fingerprint_says_what_may_exchange_hints() -> None:
    """Equal for equal configurations, different if blocks mean something else."""
    one, same, other = (assemble(cache_memory="1MiB", block_size=size).served.fingerprint for size in (16, 16, 8))
    assert one == same != other


def test_sizes_and_limits_reach_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that the scheduler takes are passed on, milliseconds as seconds."""
    passed: dict[str, object] = {}

    def scheduler(cache: PrefixCache, **options: Any) -> Scheduler:
        passed.update(options)
        return Scheduler(cache, **options)

    monkeypatch.setattr(assembly, "Scheduler", scheduler)
    assemble(cache_memory="1MiB", max_pause_ms=40, max_batch_tokens=99, max_running=7)
    assert (passed["max_pause"], passed["max_batch_tokens"], passed["max_running"]) == (0.04, 99, 7)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, saved with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    bytewise().save_pretrained(path)
    return path


def test_a_model_from_a_directory_is_served(directory: Path) -> None:
    """Geometry, vocabulary and lengths come from its own configuration, the template from its tokenizer."""
    with (
        RunningServer(model=str(directory), cache_memory="1MiB", threads=2) as server,
        Client(server.address) as client,
    ):
        model = client.model(timeout=60)
        assert (model.name, model.max_length, model.vocab_size) == ("tiny", 128, 300)
        completion = client.generate([{"role": "user", "content": "hi"}], ignore_eos=True, model="tiny", timeout=60)
        assert completion.finish_reason == "length"
        assert completion.usage.prompt_tokens + completion.usage.completion_tokens == 128


def test_what_cannot_be_loaded_is_refused_with_the_reason(directory: Path, tmp_path: Path) -> None:
    """No such model, no tokenizer, too little memory."""
    with pytest.raises(NotFound, match="there is no directory"):
        assemble(model=str(tmp_path / "nothing"))
    with pytest.raises(InvalidArgument, match="does not hold a single block"):
        assemble(cache_memory="1kB")
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(directory).save_pretrained(bare)
    with pytest.raises(FailedPrecondition, match=r"the tokenizer of '.*bare' cannot be loaded"):
        assemble(model=str(bare), cache_memory="1MiB")
