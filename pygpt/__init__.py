"""GPT-2 on the CPU, for Python: Cython kernels that release the GIL, dispatched by a fixed pool of Python threads.

    from pygpt import GPT2

    with GPT2.load("gpt2_124M.bin", threads=2) as model:
        for token in model.generate([31373, 612], total=10):
            print(token)

The rooms, from the outside in. Each imports only rooms below it:

    commands      `pygpt 31373 612` and its subcommands: options, reports, progress
    cluster       batch jobs: the callable that answers rows on any cluster
    server        OpenAI's API over HTTP, and a page
    inspection    what the layers and heads do: logit lens, attribution, ablation, patching
    training      parameters, batches, AdamW, saved states; reference: the scalar twin of network and training
    model         GPT2, the class for users: it joins network and engine
    generation    the engine: requests in, tokens out; sampling, stop conditions, prefix caches
    hub           finds model files and downloads them
    network       one step over rows of tokens, and key-value caches
    formats       files: checkpoints, safetensors, token shards, text
    pool          wakes the workers once a step (Condition), and waits for them at its end (Barrier)
    _kernels      the forward pass, which every worker runs on its share; csrc has the inner loops of each instruction set

One arithmetic: each number comes from one fixed sequence of IEEE-754 operations. So the bits do not depend on thread count,
batch, cache use and instruction set (of the sets with fused multiply-add). Only the names below are public; README has the
rules for their changes. Python imports a name when it is first used, so the command starts without NumPy.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._kernels import Trace as Trace
    from ._kernels import cpu_info as cpu_info
    from .activations import add as add
    from .activations import scale as scale
    from .activations import zero as zero
    from .ceilings import Ceilings as Ceilings
    from .cluster import Complete as Complete
    from .config import Config as Config
    from .cpus import default_threads as default_threads
    from .errors import CheckpointError as CheckpointError
    from .errors import ClosedError as ClosedError
    from .errors import DataError as DataError
    from .errors import InputError as InputError
    from .errors import NumericalError as NumericalError
    from .errors import PyGPTError as PyGPTError
    from .formats.checkpoint import Checkpoint as Checkpoint
    from .formats.checkpoint import write_checkpoint as write_checkpoint
    from .formats.llmc import DebugState as DebugState
    from .formats.llmc import Example as Example
    from .formats.llmc import read_debug_state as read_debug_state
    from .formats.llmc import read_examples as read_examples
    from .formats.llmc import read_tokenizer as read_tokenizer
    from .formats.llmc import read_tokens as read_tokens
    from .formats.llmc import write_debug_state as write_debug_state
    from .formats.llmc import write_examples as write_examples
    from .formats.llmc import write_tokenizer as write_tokenizer
    from .formats.llmc import write_tokens as write_tokens
    from .formats.text import encode_text as encode_text
    from .formats.text import read_text as read_text
    from .formats.text import tokens_of_text as tokens_of_text
    from .formats.vocabulary import load_tokenizer as load_tokenizer
    from .generation.completion import Completion as Completion
    from .generation.engine import Engine as Engine
    from .generation.engine import Event as Event
    from .generation.engine import Job as Job
    from .generation.logprobs import TokenInfo as TokenInfo
    from .generation.prefix import PrefixCache as PrefixCache
    from .generation.request import Request as Request
    from .hub.find import find_model as find_model
    from .inspection.autoencoder import SparseAutoencoder as SparseAutoencoder
    from .inspection.lens import Logit as Logit
    from .inspection.lens import induction_scores as induction_scores
    from .inspection.lens import logit_attribution as logit_attribution
    from .inspection.lens import logit_lens as logit_lens
    from .inspection.lens import loss_by_position as loss_by_position
    from .inspection.names import named_activations as named_activations
    from .inspection.names import save_activations as save_activations
    from .inspection.names import their_names as their_names
    from .inspection.patching import ablate_heads as ablate_heads
    from .inspection.patching import attribution_patching as attribution_patching
    from .inspection.patching import mean_loss as mean_loss
    from .inspection.patching import patch_activations as patch_activations
    from .inspection.show import heat_map as heat_map
    from .inspection.show import text_table as text_table
    from .model import GPT2 as GPT2
    from .network import KVCache as KVCache
    from .network import Network as Network
    from .pool import ThreadPool as ThreadPool
    from .reference import SerialGPT2 as SerialGPT2
    from .tokenizer import StreamDecoder as StreamDecoder
    from .tokenizer import Tokenizer as Tokenizer
    from .training.data import DataLoader as DataLoader
    from .training.data import split as split
    from .training.options import TrainingOptions as TrainingOptions
    from .training.parallel import open_ranks as open_ranks
    from .training.parallel.ranks import Ranks as Ranks
    from .training.serial import SerialTrainableGPT2 as SerialTrainableGPT2
    from .training.state import TrainingState as TrainingState
    from .training.state import open_state as open_state
    from .training.trainable import TrainableGPT2 as TrainableGPT2
    from .training.trainer import Record as Record
    from .training.trainer import Trainer as Trainer

_PUBLIC = {
    "errors": "CheckpointError ClosedError DataError InputError NumericalError PyGPTError",
    "config": "Config",
    "cpus": "default_threads",
    "_kernels": "Trace cpu_info",
    "pool": "ThreadPool",
    "activations": "add scale zero",
    "formats.checkpoint": "Checkpoint write_checkpoint",
    "formats.vocabulary": "load_tokenizer",
    "formats.text": "encode_text read_text tokens_of_text",
    "formats.llmc": "DebugState Example read_debug_state read_examples read_tokenizer read_tokens "
    "write_debug_state write_examples write_tokenizer write_tokens",
    "tokenizer": "StreamDecoder Tokenizer",
    "hub.find": "find_model",
    "network": "KVCache Network",
    "generation.request": "Request",
    "generation.completion": "Completion",
    "generation.logprobs": "TokenInfo",
    "generation.prefix": "PrefixCache",
    "generation.engine": "Engine Event Job",
    "model": "GPT2",
    "reference": "SerialGPT2",
    "ceilings": "Ceilings",
    "cluster": "Complete",
    "training.parallel": "open_ranks",
    "training.parallel.ranks": "Ranks",
    "training.options": "TrainingOptions",
    "training.data": "DataLoader split",
    "training.serial": "SerialTrainableGPT2",
    "training.state": "TrainingState open_state",
    "training.trainable": "TrainableGPT2",
    "training.trainer": "Record Trainer",
    "inspection.lens": "Logit induction_scores logit_attribution logit_lens loss_by_position",
    "inspection.patching": "ablate_heads attribution_patching mean_loss patch_activations",
    "inspection.autoencoder": "SparseAutoencoder",
    "inspection.names": "named_activations save_activations their_names",
    "inspection.show": "heat_map text_table",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = ["__version__", *_HOME]


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
    """Run the installed command with the words `first`, then the words of the command line. Return its exit status."""
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback
    from .__main__ import start

    return start([*first, *sys.argv[1:]])
