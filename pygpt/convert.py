"""Convert a model file to another version of llm.c's format. `python -m pygpt.convert --help` says how.

Versions 1 and 3 hold float32 (3 with padded rows of wte), version 5 bfloat16. To bfloat16, each value is rounded to the
nearest, ties to even; everything else is exact, and padding is zeros whatever it was. The values pass through some at a
time, so that a model needs no memory of its size. Refuses to convert a file in place, or to the version that it has.

stdout stays empty. Exit status: 0, with one line on stderr; 1 for a failure at run time; 2 for bad input; 130 after Ctrl-C.
Unless it is 0 the older DST, if any, is as it was, and no half-written file is left.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from .checkpoint import VALUE_BYTES, Checkpoint, file_bytes, write_checkpoint
from .cli import HelpFormatter, Parser, say, status_of
from .errors import InputError, PyGPTError

EXAMPLES = """\
examples:
  python -m pygpt.convert gpt2_124M.bin gpt2_124M_bf16.bin              to bfloat16: half the size, and the faster one
  python -m pygpt.convert gpt2_124M_bf16.bin gpt2_float32.bin           and back, each value exactly as it is
  python -m pygpt.convert --version 1 gpt2_124M.bin gpt2_unpadded.bin   for programs that read version 1 only
"""

DEFAULTS = {1: 5, 3: 5, 5: 3}  # target by source


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="pygpt.convert",
        usage="python -m pygpt.convert [options] SRC DST",
        description="Convert an llm.c checkpoint (.bin) between versions 1, 3 (float32) and 5 (bfloat16, nearest even).",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="the file to convert")
    parser.add_argument("target", metavar="DST", help="the file to write; an older one is replaced once the new one is whole")
    parser.add_argument("--version", metavar="N", help="1, 3 or 5 (default 5 for a file of version 1 or 3, 3 for one of 5)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, convert, say what was done."""
    if options.version not in (None, *map(str, VALUE_BYTES)):
        raise InputError(f"version (--version) is {options.version[:40]!r}: it must be 1, 3 or 5")
    say(convert(options.source, options.target, None if options.version is None else int(options.version)))


def convert(source: str, target: str, version: int | None = None) -> str:
    """Write the model of file `source` to file `target` in `version`; return a line that says what was done.

    Raises InputError and CheckpointError for what cannot be converted, PyGPTError when writing fails.
    """
    with Checkpoint(source) as checkpoint:
        config, found = checkpoint.config, checkpoint.version
        version = DEFAULTS[found] if version is None else version
        if version == found:
            raise InputError(f"{source}: of version {found} already: there is nothing to convert")
        check_target(source, target)
        tensors = {name: checkpoint.pieces(name) for name, _, _, _ in config.tensors(padded=False)}
        try:
            write_checkpoint(target, config, tensors, version=version)
        except OSError as error:
            raise PyGPTError(f"{target}: cannot write the model file: {error.strerror or error}") from error
    return f"{describe(source, found, file_bytes(config, found))} -> {describe(target, version, file_bytes(config, version))}"


def check_target(source: str, target: str) -> None:
    """Refuse a target that is the source, is no file, or has no folder."""
    if not target:
        raise InputError("DST is empty: it must be the name of a file")
    folder = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(folder):
        raise InputError(f"{target}: there is no folder {folder}")
    if os.path.exists(target):
        if os.path.samefile(source, target):
            raise InputError(f"{target}: SRC and DST are the same file: give DST another name")
        if not os.path.isfile(target):
            raise InputError(f"{target}: not a regular file: it is not replaced")


def describe(path: str, version: int, size: int) -> str:
    """A file in a few words."""
    kind = "bfloat16" if VALUE_BYTES[version] == 2 else "float32"
    return f"{path} (version {version}, {kind}, {size} bytes)"


if __name__ == "__main__":
    sys.exit(main())
