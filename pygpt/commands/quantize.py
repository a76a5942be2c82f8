"""Write a model in another weight format, as a .gguf file (for llama.cpp, too) or a .safetensors file (mapped in place).

The four matrices of each layer and wte (head and embedding) are quantised. Positions and vectors keep their format."""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from ..errors import InputError
from ..formats.dtypes import BFLOAT16, FLOAT16, FLOAT32, Q4_0, Q8_0, Format, ModelFile
from ..formats.gguf import write_gguf
from ..formats.open import blocks_of, open_model, sha256_of, vocabulary_beside, write_beside
from ..formats.panels import formats_of, write_panels
from .console import Parser, Progress, command, say
from .convert import check_target, describe, writing

EXAMPLES = """\
examples:
  pygpt quantize gpt2_124M.bin gpt2_q8.safetensors                    8.5 bits a weight, mapped in place
  pygpt quantize --format q4_0 gpt2_124M.bin gpt2_q4.gguf             4.5 bits, the head 8.5; for llama.cpp, too
  pygpt quantize --format q4_0 --head q4_0 gpt2-hf/ gpt2.safetensors  from a Hugging Face folder, the head also in q4_0
"""

FORMATS = {"q8_0": Q8_0, "q4_0": Q4_0, "f16": FLOAT16, "bf16": BFLOAT16, "f32": FLOAT32}
HEADS = {"q4_0": "q8_0"}  # head's format by layers' format, if they differ: a head in q4_0 loses too much accuracy


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = Parser(prog="pygpt quantize", usage="pygpt quantize [options] SRC DST", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("source", metavar="SRC", help="a .bin, .gguf or .safetensors file, or a Hugging Face model's folder")
    parser.add_argument("target", metavar="DST", help="the file to write, .gguf or .safetensors; replaced when complete")
    add = partial(parser.add_argument, metavar="NAME", type=str.lower, choices=[*FORMATS])
    add("--format", default="q8_0", help=f"{', '.join(FORMATS)} (default q8_0)")
    add("--head", help="the head's format (default: --format; q8_0 for q4_0)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, quantise, and report."""
    head = HEADS.get(options.format, options.format) if options.head is None else options.head
    if not options.target.endswith((".gguf", ".safetensors")):
        raise InputError(f"{options.target}: DST must end in .gguf or .safetensors; use `pygpt convert` for a .bin file")
    check_target(options.source, options.target)
    with open_model(options.source) as model:
        before = describe(options.source, model)
        quantise(model, options.target, FORMATS[options.format], FORMATS[head])
    size = os.path.getsize(options.target)
    say(f"{before} -> {options.target} ({FORMATS[options.format].name}, head {FORMATS[head].name}, {size} bytes)")


def quantise(model: ModelFile, target: str, kind: Format, head: Format) -> None:
    """Write the model to `target`, a .gguf or .safetensors file. Raises PyGPTError if it cannot be written."""
    gguf = target.endswith(".gguf")
    formats = formats_of(model.config, kind, head, BFLOAT16 if not gguf and model.formats["wpe"] == BFLOAT16 else FLOAT32)
    with Progress("weights", model.config.parameters(padded=False)) as progress:

        def watched(name: str, kind: Format) -> Iterator[Any]:
            return progress.watch(blocks_of(model, name, kind), lambda piece: piece.size * kind.block_values)

        tensors = {name: watched(name, kind) for name, kind in formats.items()}
        with writing(target):
            if gguf:
                write_gguf(target, model.config, formats, tensors)
            else:
                write_panels(target, model.config, formats, tensors, sha256_of(model.path))
            own, old = model.config.tokenizer, os.path.exists(vocabulary_beside(target))  # an old one would count
            if not gguf or (own is not None and (old or not own().splits_before_space)):  # else GGUF describes it
                write_beside(target, model.config)


main = command(build_parser, run)
