"""The embedded model: the same everywhere, made quickly, good enough to show caching with."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import torch

from engine import embedded

PRINT_DIGEST = "from tests.engine.test_embedded import digest; print(digest())"


def digest() -> str:
    """Return a hash of everything that the embedded model consists of."""
    hashed = hashlib.sha256(embedded.build_tokenizer().backend_tokenizer.to_str().encode())
    for name, value in sorted(embedded.build_model().state_dict().items()):
        hashed.update(name.encode() + value.numpy().tobytes())
    return hashed.hexdigest()


def test_model_and_tokenizer_are_equal_in_every_process() -> None:
    """Replicas may exchange hints about it: the bytes of weights and tokenizer do not depend on the process."""
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-c", PRINT_DIGEST]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == digest()


def test_building_the_model_leaves_the_global_random_state_alone() -> None:
    """Nobody else's random numbers change because a model was made."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    embedded.build_model()
    assert torch.equal(torch.rand(3), expected)


def test_a_token_below_256_is_a_byte() -> None:
    """Any text survives, and can be read off the token ids."""
    tokenizer = embedded.build_tokenizer()
    text = "".join(map(chr, range(256))) + "世🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_greedy_output_does_not_degenerate() -> None:
    """Random weights, but not one token over and over, and different prompts differ."""
    model, tokenizer = embedded.build_model(), embedded.build_tokenizer()
    outputs = []
    for prompt in ("Hello", "What is a prefix cache?"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        with torch.inference_mode():
            for _ in range(40):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        outputs.append(ids[0, length:].tolist())
        assert len(set(outputs[-1])) >= 8
    assert outputs[0] != outputs[1]


def test_the_configuration_is_the_weights_configuration() -> None:
    """Lengths and special tokens that the server reports are those of the tokenizer."""
    config, tokenizer = embedded.build_config(), embedded.build_tokenizer()
    assert config.vocab_size == len(tokenizer) == embedded.VOCAB_SIZE
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
