"""GPT-2 on the CPU, for Python: Cython kernels that release the GIL, dispatched by a fixed pool of Python threads.

    from pygpt import GPT2

    with GPT2.load("gpt2_124M.bin", threads=2) as model:
        for token in model.generate([31373, 612], total=10):
            print(token)

How a token comes about, from the outside in:

    __main__      the command: `python -m pygpt 31373 612`
    generate      the loop: tokens in, tokens streamed out; sampling chooses each from the logits
    model         GPT2.step(rows): checks everything, then hands one job to the pool; cache keeps what rows left behind
    pool          wakes the workers once a step (Condition), gathers them at its end (Barrier)
    _kernels      every worker runs the whole forward pass on its share of each kernel; native barriers between kernels
    micro_*.c     the inner loops, one source for every instruction set
    checkpoint    llm.c's files, mapped and used in place; config holds the one table of tensors

    serial        the same network in plain scalar loops (_reference): the yardstick

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
    from .checkpoint import Checkpoint, find_model, write_checkpoint
    from .config import Config
    from .errors import CheckpointError, ClosedError, InputError, NumericalError, PyGPTError
    from .model import GPT2
    from .pool import ThreadPool, default_threads
    from .serial import SerialGPT2
    from .tokenizer import StreamDecoder, Tokenizer

_HOME = {
    "Ceilings": "ceilings",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "Config": "config",
    "GPT2": "model",
    "InputError": "errors",
    "KVCache": "cache",
    "NumericalError": "errors",
    "PyGPTError": "errors",
    "SerialGPT2": "serial",
    "StreamDecoder": "tokenizer",
    "ThreadPool": "pool",
    "Tokenizer": "tokenizer",
    "Trace": "_kernels",
    "cpu_info": "_kernels",
    "default_threads": "pool",
    "find_model": "checkpoint",
    "write_checkpoint": "checkpoint",
}

__all__ = [
    "GPT2",
    "Ceilings",
    "Checkpoint",
    "CheckpointError",
    "ClosedError",
    "Config",
    "InputError",
    "KVCache",
    "NumericalError",
    "PyGPTError",
    "SerialGPT2",
    "StreamDecoder",
    "ThreadPool",
    "Tokenizer",
    "Trace",
    "__version__",
    "cpu_info",
    "default_threads",
    "find_model",
    "write_checkpoint",
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
