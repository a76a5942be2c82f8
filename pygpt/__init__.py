"""GPT-2 on the CPU, for Python: Cython kernels that release the GIL, dispatched by a fixed pool of Python threads.

    from pygpt import GPT2

    with GPT2.load("gpt2_124M.bin", threads=2) as model:
        for token in model.generate([31373, 612], total=10):
            print(token)

How a token comes about, from the outside in:

    __main__      the command: `python -m pygpt 31373 612`
    generate      the loop: tokens in, tokens streamed out; sampling chooses each from the logits, stop says when it ends
    model         GPT2.step(rows): checks everything, then hands one job to the pool; cache keeps what rows left behind, and
                  prefix knows which tokens they were
    pool          wakes the workers once a step (Condition), gathers them at its end (Barrier)
    _kernels      every worker runs the whole forward pass on its share of each kernel; native barriers between kernels
    micro_*.c     the inner loops, one source for every instruction set
    checkpoint    llm.c's files, mapped and used in place; config holds the one table of tensors

    data          what goes in: text and llm.c's token shards, in batches; llmc holds its other files
    trainer       one step after the other: batches, gradients, AdamW (optim); state saves and resumes it, bit for bit

    serial        the same network and its training in plain scalar loops (_reference): the yardstick

One arithmetic: every number comes from the same sequence of IEEE-754 operations whatever the thread count, batch, cache use
and instruction set (of those with fused multiply-add), so results are equal bit for bit. The modules are private but for
the names below, which change incompatibly only with a new minor version before 1.0 and a new major version from then on
(README, Stability); they are imported when first asked for, so that the command starts without NumPy.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._kernels import Trace, cpu_info
    from .cache import KVCache
    from .ceilings import Ceilings
    from .config import Config
    from .errors import CheckpointError, ClosedError, DataError, InputError, NumericalError, PyGPTError
    from .formats.checkpoint import Checkpoint, write_checkpoint
    from .formats.llmc import (
        DebugState,
        Example,
        read_debug_state,
        read_examples,
        read_tokenizer,
        write_debug_state,
        write_examples,
        write_tokenizer,
    )
    from .formats.shards import read_tokens, write_tokens
    from .formats.text import encode_text, read_text, tokens_of_text
    from .generation.logprobs import TokenInfo
    from .generation.prefix import PrefixCache
    from .generation.request import Completion
    from .hub.find import find_model
    from .model import GPT2
    from .pool import ThreadPool, default_threads
    from .reference import SerialGPT2, SerialTrainableGPT2
    from .tokenizer import StreamDecoder, Tokenizer
    from .training.data import DataLoader, split
    from .training.options import TrainingOptions
    from .training.state import TrainingState, open_state
    from .training.trainable import TrainableGPT2
    from .training.trainer import Record, Trainer

_HOME = {
    "Ceilings": "ceilings",
    "Checkpoint": "formats.checkpoint",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "Completion": "generation.request",
    "Config": "config",
    "DataError": "errors",
    "DataLoader": "training.data",
    "DebugState": "formats.llmc",
    "Example": "formats.llmc",
    "GPT2": "model",
    "InputError": "errors",
    "KVCache": "cache",
    "NumericalError": "errors",
    "PrefixCache": "generation.prefix",
    "PyGPTError": "errors",
    "Record": "training.trainer",
    "SerialGPT2": "reference",
    "SerialTrainableGPT2": "reference",
    "StreamDecoder": "tokenizer",
    "ThreadPool": "pool",
    "TokenInfo": "generation.logprobs",
    "Tokenizer": "tokenizer",
    "Trace": "_kernels",
    "TrainableGPT2": "training.trainable",
    "Trainer": "training.trainer",
    "TrainingOptions": "training.options",
    "TrainingState": "training.state",
    "cpu_info": "_kernels",
    "default_threads": "pool",
    "encode_text": "formats.text",
    "find_model": "hub.find",
    "open_state": "training.state",
    "read_debug_state": "formats.llmc",
    "read_examples": "formats.llmc",
    "read_text": "formats.text",
    "read_tokenizer": "formats.llmc",
    "read_tokens": "formats.shards",
    "split": "training.data",
    "tokens_of_text": "formats.text",
    "write_checkpoint": "formats.checkpoint",
    "write_debug_state": "formats.llmc",
    "write_examples": "formats.llmc",
    "write_tokenizer": "formats.llmc",
    "write_tokens": "formats.shards",
}

__all__ = [
    "GPT2",
    "Ceilings",
    "Checkpoint",
    "CheckpointError",
    "ClosedError",
    "Completion",
    "Config",
    "DataError",
    "DataLoader",
    "DebugState",
    "Example",
    "InputError",
    "KVCache",
    "NumericalError",
    "PrefixCache",
    "PyGPTError",
    "Record",
    "SerialGPT2",
    "SerialTrainableGPT2",
    "StreamDecoder",
    "ThreadPool",
    "TokenInfo",
    "Tokenizer",
    "Trace",
    "TrainableGPT2",
    "Trainer",
    "TrainingOptions",
    "TrainingState",
    "__version__",
    "cpu_info",
    "default_threads",
    "encode_text",
    "find_model",
    "open_state",
    "read_debug_state",
    "read_examples",
    "read_text",
    "read_tokenizer",
    "read_tokens",
    "split",
    "tokens_of_text",
    "write_checkpoint",
    "write_debug_state",
    "write_examples",
    "write_tokenizer",
    "write_tokens",
]


def __getattr__(name: str) -> object:
    """Import a public name's module when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'pygpt' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def _command(*first: str) -> int:
    """Run the installed command, with the words `first` before those of the command line; return its exit status."""
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback
    from .__main__ import main

    return main([*first, *sys.argv[1:]])
