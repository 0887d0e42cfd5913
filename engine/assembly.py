"""Puts an engine together from a configuration: model, block pool, cache, scheduler, thread."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging
from xxhash import xxh3_128_hexdigest

from engine import embedded
from engine.config import EMBEDDED, EngineConfig
from engine.kv import KVPool, free_memory
from engine.loop import EngineLoop
from engine.model import LoadedModel, load_model
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.secret import read_secret
from engine.tenants import PUBLISHED, tenant_of
from engine.tokenizer import Tokenizer
from engine.wire import ServedModel
from prefixcache.cache import PrefixCache
from prefixcache.eviction import POLICIES

OnDeath = Callable[[BaseException], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that is warmed up but not started; `loop.start()` starts it, and then its thread owns the cache."""

    loop: EngineLoop
    cache: PrefixCache
    tokenizer: Tokenizer
    served: ServedModel
    blocks: int
    bytes_per_block: int


def load_engine(config: EngineConfig, on_death: OnDeath) -> Engine:
    """Load and warm up what `config` names; takes seconds, or minutes for a large model.

    Raises NotFound, InvalidArgument or FailedPrecondition if it cannot be served.
    """
    torch.set_num_threads(config.threads)
    model, tokenizer = _load(config)
    fingerprint = xxh3_128_hexdigest(
        b"%s\n%d\n%s" % (model.fingerprint.encode(), config.block_size, tokenizer.fingerprint())
    )
    geometry = model.geometry
    blocks = geometry.blocks_in(config.cache_bytes(free_memory(model.device)), config.block_size)
    runner = Runner(model, KVPool(geometry, blocks, config.block_size, model.device))
    runner.warm_up()
    cache = PrefixCache(
        blocks,
        config.block_size,
        policy=POLICIES[config.eviction],
        fingerprint=bytes.fromhex(fingerprint),
        secret=read_secret(config.secret_file),
        account_of=tenant_of,
        shared_namespace=PUBLISHED,
        pin_share=config.max_pinned_percent / 100,
        session_idle=config.session_idle_seconds,
    )
    scheduler = Scheduler(
        cache,
        max_length=model.max_length,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        max_pause=config.max_pause_ms / 1000,
        background_pause=config.warm_pause_ms / 1000,
        eos=frozenset(model.eos_token_ids),
    )
    served = ServedModel(
        name=model.name,
        architecture=model.architecture,
        max_length=model.max_length,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        device=model.device,
        block_size=config.block_size,
        has_chat_template=tokenizer.has_chat_template,
        eos_token_ids=model.eos_token_ids,
        fingerprint=fingerprint,
    )
    loop = EngineLoop(scheduler, runner, max_queue=config.max_queue, on_death=on_death)
    return Engine(loop, cache, tokenizer, served, blocks, geometry.bytes_per_block(config.block_size))


def _load(config: EngineConfig) -> tuple[LoadedModel, Tokenizer]:
    source = str(embedded.DIRECTORY) if config.model == EMBEDDED else config.model
    if config.model == EMBEDDED or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # over in no time, or among the lines of a log
    model = load_model(source, config.dtype, config.device, native=config.kernels == "auto")
    return model, Tokenizer.load(source, model.vocab_size)
