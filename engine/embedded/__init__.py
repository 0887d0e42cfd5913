"""The model that needs no download: a small Llama, trained here, that answers from the sheet in its prompt.

This directory is the model, as transformers saves one (README.md is its card), and what
it was made with: `values` and `desks` are what it was taught, `dialogues` makes
conversations of them, `vocabulary` its tokenizer, `train` the rest.
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent
