"""GPT-2 on the CPU, for Python: Cython kernels that release the GIL, dispatched by a fixed pool of Python threads.

    from pygpt import GPT2

    with GPT2.load("gpt2_124M.bin", threads=2) as model:
        for token in model.generate([31373, 612], total=10):
            print(token)

Only the names below are public; README has the rules for their changes. docs/explanation/architecture.md shows the rooms.
Python imports a name when it is first used, so the command starts without NumPy."""

__version__ = "0.2.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    # isort: off
    from ._kernels import Trace as Trace, cpu_info as cpu_info
    from .activations import add as add, scale as scale, zero as zero
    from .ceilings import Ceilings as Ceilings
    from .cluster import Complete as Complete
    from .config import Config as Config
    from .cpus import default_threads as default_threads
    from .errors import CheckpointError as CheckpointError, ClosedError as ClosedError, DataError as DataError
    from .errors import InputError as InputError, NumericalError as NumericalError, PyGPTError as PyGPTError
    from .formats.checkpoint import Checkpoint as Checkpoint, write_checkpoint as write_checkpoint
    from .formats.llmc import DebugState as DebugState, Example as Example, read_debug_state as read_debug_state
    from .formats.llmc import read_examples as read_examples, read_tokenizer as read_tokenizer
    from .formats.llmc import write_debug_state as write_debug_state, write_examples as write_examples
    from .formats.llmc import read_tokens as read_tokens, write_tokenizer as write_tokenizer, write_tokens as write_tokens
    from .formats.text import encode_text as encode_text, read_text as read_text, tokens_of_text as tokens_of_text
    from .formats.vocabulary import load_tokenizer as load_tokenizer
    from .generation.completion import Completion as Completion
    from .generation.engine import Engine as Engine, Event as Event, Job as Job
    from .generation.logprobs import TokenInfo as TokenInfo
    from .generation.prefix import PrefixCache as PrefixCache
    from .generation.request import Request as Request
    from .hub.find import find_model as find_model
    from .inspection.inside import Logit as Logit, SparseAutoencoder as SparseAutoencoder, ablate_heads as ablate_heads
    from .inspection.inside import attribution_patching as attribution_patching, induction_scores as induction_scores
    from .inspection.inside import logit_attribution as logit_attribution, logit_lens as logit_lens
    from .inspection.inside import loss_by_position as loss_by_position, mean_loss as mean_loss
    from .inspection.inside import named_activations as named_activations, patch_activations as patch_activations
    from .inspection.inside import save_activations as save_activations, their_names as their_names
    from .inspection.show import heat_map as heat_map, text_table as text_table
    from .model import GPT2 as GPT2
    from .network import KVCache as KVCache, Network as Network
    from .pool import ThreadPool as ThreadPool
    from .reference import SerialGPT2 as SerialGPT2
    from .tokenizer import StreamDecoder as StreamDecoder, Tokenizer as Tokenizer
    from .training.data import DataLoader as DataLoader, split as split
    from .training.parallel import Ranks as Ranks
    from .training.parameters import TrainingOptions as TrainingOptions
    from .training.state import TrainingState as TrainingState, open_state as open_state
    from .training.trainable import SerialTrainableGPT2 as SerialTrainableGPT2, TrainableGPT2 as TrainableGPT2
    from .training.trainer import Record as Record, Trainer as Trainer, open_ranks as open_ranks

# The public names after the module of each, in the order of the reference.
_PUBLIC = """
errors CheckpointError ClosedError DataError InputError NumericalError PyGPTError, config Config, cpus default_threads,
_kernels Trace cpu_info, pool ThreadPool, activations add scale zero, formats.checkpoint Checkpoint write_checkpoint,
formats.vocabulary load_tokenizer, formats.text encode_text read_text tokens_of_text,
formats.llmc DebugState Example read_debug_state read_examples read_tokenizer read_tokens write_debug_state write_examples
write_tokenizer write_tokens, tokenizer StreamDecoder Tokenizer, hub.find find_model, network KVCache Network,
generation.request Request, generation.completion Completion, generation.logprobs TokenInfo, generation.prefix PrefixCache,
generation.engine Engine Event Job, model GPT2, reference SerialGPT2, ceilings Ceilings, cluster Complete,
training.parallel Ranks, training.parameters TrainingOptions, training.data DataLoader split,
training.state TrainingState open_state, training.trainable SerialTrainableGPT2 TrainableGPT2,
training.trainer Record Trainer open_ranks,
inspection.inside Logit SparseAutoencoder ablate_heads attribution_patching induction_scores
logit_attribution logit_lens loss_by_position mean_loss named_activations patch_activations save_activations their_names,
inspection.show heat_map text_table"""
_HOME = {name: module for module, *names in map(str.split, _PUBLIC.split(",")) for name in names}

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
