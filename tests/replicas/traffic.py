"""Prompts that share beginnings, and what a correct engine answers."""

from __future__ import annotations

import random

from prefixcache.client import Client
from prefixcache.results import Completion
from tests.engine.paper import generate

VOCABULARY = 256
TIMEOUT = 30.0


def beginning(seed: int, blocks: int = 8) -> list[int]:
    """Return what many prompts begin with."""
    return random.Random(seed).choices(range(VOCABULARY), k=16 * blocks)


def asked(client: Client, prompt: list[int], max_tokens: int = 3, session_id: str = "") -> Completion:
    """Have a prompt answered, and check the answer."""
    completion = client.generate(prompt, max_tokens=max_tokens, session_id=session_id, timeout=TIMEOUT)
    assert completion.token_ids == generate(prompt, max_tokens, VOCABULARY)
    return completion


def at(client: Client, prompt: list[int], max_tokens: int = 3) -> str:
    """Have a prompt answered, check the answer, and return which replica it was."""
    replica = asked(client, prompt, max_tokens).replica
    assert replica is not None
    return replica
