"""transformers' continuous batching, with its block sharing on, behind OpenAI's completions.

    python -m benchmarks.serving.transformers_worker --model DIR --dtype float32 --port 8000

Only what the benchmark asks for: one prompt of token ids, streamed greedy tokens, end
of sequence ignored. What the cache had is what its own prefix search returned.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from aiohttp import web
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

MAX_REQUEST_BYTES = 64 * 2**20


def blocks(config: Any, dtype: torch.dtype, page: int, memory: int) -> int:
    """How many blocks of `page` tokens fit into `memory` bytes."""
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token: int = 2 * config.num_hidden_layers * heads * width * dtype.itemsize
    return memory // (per_token * page)


class Worker:
    """One model and its batching manager; `cached` holds what the prefix search found for requests in progress."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._numbers = itertools.count()
        self._cached: dict[str, int] = {}
        self._watch_prefix_search()
        dtype = getattr(torch, options.dtype)
        # Every thread that computes has a team of its own: this one loads alone, the manager's gets the cores.
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa").eval()
        torch.set_num_threads(options.threads)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=options.page_size,
                num_blocks=blocks(model.config, dtype, options.page_size, options.cache_bytes),
                max_batch_tokens=options.max_batch_tokens,
                max_requests_per_batch=options.max_requests,
                allow_block_sharing=True,
            ),
        )
        self._manager.start()

    def _watch_prefix_search(self) -> None:
        search: Any = PagedAttentionCache.search_prefix_match

        def watched(cache: PagedAttentionCache, request_id: str, prompt_ids: list[int]) -> int:
            found: int = search(cache, request_id, prompt_ids)
            self._cached.setdefault(request_id, found)
            return found

        setattr(PagedAttentionCache, search.__name__, watched)

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": Path(self._options.model).name, "owned_by": "transformers"}]})

    async def version(self, _: web.Request) -> web.Response:
        names = ("dtype", "threads", "page_size", "max_batch_tokens", "cache_bytes")
        options = {name: getattr(self._options, name) for name in names}
        return web.json_response({"version": transformers.__version__, "torch": torch.__version__, **options})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = str(next(self._numbers))
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._manager.register_result_handler(name, outputs.put_nowait)
        self._manager.add_request(
            body["prompt"], request_id=name, max_new_tokens=body["max_tokens"], streaming=True, eos_token_id=-1
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent = 0
        while True:
            output = await outputs.get()
            if output.error is not None:
                await response.write(_event({"error": {"message": output.error}}))
                break
            new = output.generated_tokens[sent:]
            sent += len(new)
            if new:
                await response.write(_event({"choices": [{"index": 0, "token_ids": new}]}))
            if output.is_finished():
                usage = {
                    "prompt_tokens": len(body["prompt"]),
                    "completion_tokens": sent,
                    "prompt_tokens_details": {"cached_tokens": self._cached.pop(name, None)},
                }
                await response.write(_event({"choices": [], "usage": usage}))
                break
        await response.write(b"data: [DONE]\n\n")
        return response

    async def stop(self, _: web.Application) -> None:
        await asyncio.to_thread(self._manager.stop, True, 10.0, False, True)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--page-size", type=int, default=256, help="transformers' own default")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-requests", type=int, default=64)
    parser.add_argument("--cache-bytes", type=int, default=2 * 2**30)
    worker = Worker(options := parser.parse_args())
    app = web.Application(client_max_size=MAX_REQUEST_BYTES)
    app.router.add_get("/v1/models", worker.models)
    app.router.add_get("/version", worker.version)
    app.router.add_post("/v1/completions", worker.completions)
    app.on_cleanup.append(worker.stop)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
