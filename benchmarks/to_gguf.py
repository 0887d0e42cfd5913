"""A benchmark model as a GGUF file, by way of llama.cpp's own converter.

    python -m benchmarks.to_gguf MODEL_DIRECTORY OUT.gguf --llama-cpp SOURCES

The weights are what `convert_hf_to_gguf.py` makes of them, in the model's own type. The
vocabulary is replaced, for two reasons: the converter refuses tokenizers that it does not
know, and llama-server sends no event, nor ever its token, while the text so far ends
within a UTF-8 character. Here the text of token 17 is `[17]`, so that every token is
text which can be sent at once. Prompts must be token ids.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

OUTTYPES = {"float32": "f32", "bfloat16": "bf16"}


def write_vocabulary(model: Any) -> None:
    """Write the vocabulary into the file of the converter's `model`: ids as text, one end-of-sequence token."""
    size = model.hparams["vocab_size"]
    out = model.gguf_writer
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list([f"[{token}]" for token in range(size)])
    out.add_token_types([importlib.import_module("gguf").TokenType.NORMAL] * size)
    out.add_token_merges(["[ ]"])  # llama.cpp refuses a file without any
    out.add_eos_token_id(model.hparams["eos_token_id"])


def main(
    model: Annotated[Path, typer.Argument(help="Directory of the model (config.json, *.safetensors).")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    llama_cpp: Annotated[Path, typer.Option(help="Directory of llama.cpp's sources.")],
) -> None:
    """Convert a model of benchmarks.shapes for llama-server."""
    dtype = json.loads((model / "config.json").read_text())["dtype"]
    if dtype not in OUTTYPES:
        raise typer.BadParameter(f"its weights are {dtype}, not one of {', '.join(OUTTYPES)}", param_hint="MODEL")
    script = llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise typer.BadParameter(f"{script} is not there", param_hint="--llama-cpp")
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    family: Any = importlib.import_module("conversion.base").TextModel
    # The first thing that the converter tries for Llama, and the only one for GPT-2.
    family._set_vocab_sentencepiece = write_vocabulary
    family._set_vocab_gpt2 = write_vocabulary
    sys.argv = [str(script), str(model), "--outtype", OUTTYPES[dtype], "--outfile", str(out)]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    typer.run(main)
