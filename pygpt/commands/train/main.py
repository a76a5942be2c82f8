"""Train GPT-2 on text or token shards. Begin with a checkpoint (fine-tuning) or with random weights.

    pygpt train --data my.txt --init gpt2_124M.bin --out mine.bin
    pygpt train --data my.txt --shape L=4,NH=4,C=128,maxT=256 -B 8 -T 128 --steps 500 --lr 1e-3 --out mine.bin
    pygpt train --resume mine.state
    pygpt train --check gpt2_124M_debug_state.bin --init gpt2_124M.bin

The defaults are those of llm.c's CPU program. --out mine.bin saves the model as mine.bin and the training state as mine.state.
At Ctrl-C or SIGTERM, training finishes the step and saves. docs/reference/train.md describes the states, stdout and the log."""

import argparse
import hashlib
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import __version__
from ..._kernels import cpu_info
from ...config import Config
from ...errors import InputError, NumericalError, PyGPTError, plural
from ...formats.files import check_writable, only_writer
from ...formats.llmc import read_debug_state
from ...formats.open import set_tokenizer, vocabulary_beside, write_beside
from ...hub.find import find_model
from ...training.data import DataLoader
from ...training.parallel import TIMEOUT_S, Ranks
from ...training.state import TrainingState, open_state
from ...training.trainable import SerialTrainableGPT2, TrainableGPT2
from ...training.trainer import Trainer, open_ranks
from ..bench.measuring import laps
from ..console import Parser, Progress, check_stdout, say, status_of, whole
from ..options import TOKENIZER_HELP, add_text_options, parse_number
from .job import (
    BEST,
    PATHS,
    WHOLE,
    Job,
    Output,
    Report,
    beginning,
    best_of,
    flag,
    new,
    new_vocabulary,
    open_data,
    prepare,
    resumed,
    sample,
    with_tokenizer,
)

NAMES = {"tokenizer", "data", "val", "init", "out", "resume", "log", "plot", "check"}  # options that take the name of a file
# The class of the engine by --reference.
ENGINES: dict[bool, type[TrainableGPT2 | SerialTrainableGPT2]] = {False: TrainableGPT2, True: SerialTrainableGPT2}
FORWARD, GRADIENT = 1e-2, 2e-2  # tolerances
STEPS, LR, WEIGHT_DECAY = 10, 1e-4, 0.01
OVERHEAD = 1.1  # of messages over the bytes' own time
LINES = 8  # of the estimate's table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    stop = Stop()
    return status_of(lambda: run_ranks(arguments, stop)) or (128 + stop.signal if stop.signal else 0)


def run_ranks(arguments: Sequence[str] | None, stop: "Stop") -> None:
    """Run the command on the ranks that mpiexec or srun started, or on this process alone. Only the first rank prints."""
    timeout, parse = TIMEOUT_S, partial(build_parser().parse_args, arguments)
    with suppress(InputError):  # reported when the ranks can agree on it
        timeout = parse().timeout or TIMEOUT_S
    with open_ranks(timeout) as ranks:
        streams = sys.stdout, sys.stderr
        try:
            if ranks.rank:
                sys.stdout = sys.stderr = None  # as for closed streams, print() does nothing
            options = ranks.together(parse)
            assert options is not None
            run(options, stop, ranks)
        except PyGPTError as error:
            if ranks.agreed:
                raise
            raise PyGPTError(f"{ranks.name(ranks.rank)}: {error}") from error
        finally:
            if sys.exc_info()[0] is not None and not ranks.agreed:
                sys.stdout, sys.stderr = streams


# By group, each option as "flag metavar" (a switch has no metavar) and its help. WHOLE has the limits of whole numbers.
OPTIONS = {
    "data": {
        "--data FILE": "UTF-8 text, JSON lines (.jsonl) or llm.c's token shards (.bin); a file or a quoted pattern",
        "--val FILE": "validation data, in the same forms as --data",
        "--val-tokens N": "validate on the first N tokens of --data instead",
        "--val-fraction F": "validate on this last part of --data instead, such as 0.1",
        "-B N": "sequences in a batch (default 4)",
        "-T N": "tokens in a sequence (default 64)",
        "--shuffle": "shuffle the batches, differently in every epoch",
        "--seed N": "seed of random weights and of --shuffle (default 1)",
    },
    "model": {
        "--init FILE": "begin with this checkpoint, or with `random` weights (default: pygpt's model, see pygpt --help)",
        "--shape SHAPE": "random weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl or L=4,NH=4,C=128,maxT=256[,V=50257]",
        "--tokenizer FILE": TOKENIZER_HELP,
        "--train-tokenizer N": "make a vocabulary of N ids from --data (needs tokenizers); it is saved as FILE.tokenizer.json",
        "--chars": "make a vocabulary of the characters of --data",
        "--threads N": "threads (default $PYGPT_THREADS, else one per usable core)",
        "--reference": "train with the slow serial reference",
    },
    "optimizer": {
        "--steps N": "total number of updates (default 40)",
        "--lr X": "learning rate (default 1e-4)",
        "--schedule NAME": "constant (default), or cosine or linear, which fall to --min-lr",
        "--warmup N": "raise the learning rate during the first N steps (default 0)",
        "--min-lr X": "final learning rate of the cosine and linear schedules (default 0)",
        "--beta1 X": "AdamW's decay rate for the mean of gradients (default 0.9)",
        "--beta2 X": "AdamW's decay rate for the mean of squared gradients (default 0.999)",
        "--eps X": "AdamW's term added to the square root (default 1e-8)",
        "--weight-decay X": "AdamW's weight decay of all tensors (default 0)",
        "--decay-matrices-only": "exclude biases and layer norms from weight decay",
        "--clip X": "scale the gradient down to at most this norm (default 0: no limit)",
        "--accumulate N": "average the gradients of N batches for each step (default 1)",
    },
    "ranks": {
        "--parts S": "parts of a step, a multiple of the number of ranks (default 1)",
        "--timeout S": "end a rank after S seconds without a message (default 600)",
        "--estimate": "do not train, but estimate the time of a step on --ranks over --gbit",
        "--ranks N": "the number of ranks for --estimate (default: --parts, else 8)",
        "--gbit G": "the network's speed for --estimate in Gbit/s (default 10)",
    },
    "saving": {
        "--out FILE": "save the model as FILE.bin or FILE.safetensors, and the state as FILE.state (default: save nothing)",
        "--version N": "version of FILE.bin: 3 (float32, default) or 5 (bfloat16)",
        "--save-every N": "save every N steps (default 100; 0: only at the end)",
        "--resume STATE": "continue the run of this state; its options are the defaults",
        "--force": "replace existing files",
    },
    "reports": {
        "--val-every N": "validate every N steps (default 10)",
        "--keep-best": "save the model of the best validation as FILE.best.bin",
        "--patience N": "stop early after N validations in a row without a better one (default: never)",
        "--val-batches N": "use N batches for each validation (default 5)",
        "--sample-every N": "print a sample of text every N steps (default 20; 0: never)",
        "--sample-tokens N": "tokens in a sample (default 64)",
        "--log FILE": "write a line of JSON for each step",
        "--plot PATH": "draw the loss: a .svg, .png or .pdf file, or a folder (needs matplotlib)",
        "--check STATE": "do not train, but compare the gradients with llm.c's debug state",
    },
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options. Missing options are None: a resumed run has its own values."""
    parser = Parser(prog="pygpt train", usage="pygpt train [options]", description=__doc__)
    for title, rows in OPTIONS.items():
        add = parser.add_argument_group(title).add_argument
        for row, text in rows.items():
            word, _, metavar = row.partition(" ")
            name = word.lstrip("-").replace("-", "_")
            kind = whole(*WHOLE[name]) if name in WHOLE else number if metavar in ("F", "G", "X") else str
            words = ["-t", word] if name == "threads" else [word]
            if metavar:
                add(*words, metavar=metavar, type=kind, help=text)
            else:
                add(*words, action="store_true", default=None, help=text)
        if title == "data":
            add_text_options(add)
    return parser


def number(text: str) -> float:
    """Read any number, as a type for argparse. The user of the number checks its limits."""
    try:
        return parse_number("", text)
    except InputError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: it must be a number such as 0.0001 or 1e-4") from None


class Stop:
    """In a `with` block, keep the first Ctrl-C, SIGTERM or SIGHUP in `signal`. A second signal, other than SIGHUP, takes effect
    immediately."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(which) != signal.SIG_IGN:  # a signal ignored by the parent, as with nohup, stays ignored
                self._before[which] = signal.signal(which, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for which, before in self._before.items():
            signal.signal(which, before)

    def _note(self, which: int, frame: object) -> None:
        self.signal = signal.Signals(which)
        signal.signal(which, signal.SIG_IGN if which == signal.SIGHUP else self._before[which])  # a terminal repeats SIGHUP


def run(options: argparse.Namespace, stop: Stop, ranks: Ranks) -> None:
    """Check everything that can be checked, then train and save."""
    given = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    for name in NAMES & {*given}:
        if not given[name]:
            raise ranks.common(InputError(f"{flag(name)} is empty: it must be the name of a file"))
    if options.check is not None or options.estimate:
        return ranks.together(partial(run_estimate if options.estimate else run_check, given), first=True)
    with ExitStack() as stack:
        run = ranks.together(lambda: opened(options, given, ranks, stack))
        assert run is not None
        if ranks.size > 1:
            ranks.check_equal(run.facts())
            warn_about_cores(ranks, run.trainer.engine.threads)
        with stop:
            run.train(stop)
        ranks.together(partial(run.report.draw, run.job.plot), first=True)
    return None


def opened(options: argparse.Namespace, given: dict[str, Any], ranks: Ranks, stack: ExitStack) -> "Run":
    """Open everything that a run needs."""
    if surplus := {"ranks", "gbit"} & {*given}:
        raise InputError(f"{flag(min(surplus))} is for --estimate: the launcher, such as mpiexec, starts the ranks")
    state: TrainingState | None = None
    changes: list[str] = []
    if options.resume is None:
        job, settings = new(given)
        config, init = beginning(given)
        output = None if options.out is None else Output.named(options.out, config)
        if job.keep_best and output is None:
            raise InputError("--keep-best saves a model beside that of --out: give --out")
    else:
        begun = os.stat(options.resume).st_ino if os.path.exists(options.resume) else None
        state, notice = open_state(options.resume)
        stack.enter_context(state)
        say(notice)
        job, settings, changes = resumed(given, state)
        config, init = state.config, None
        output = Output.named(options.out, config) if options.out else Output.of_state(options.resume, config)
        with_tokenizer(config, new_vocabulary(given))
        if config.tokenizer is None and os.path.exists(path := vocabulary_beside(state.path.removesuffix(".1"))):
            set_tokenizer(config, path)
    if ranks.rank == 0:  # only this rank writes
        if output is not None:
            check_writable(output.model)
            check_writable(output.state)
            stack.enter_context(only_writer(output.state))
            if state is not None and os.stat(options.resume).st_ino != begun:
                raise PyGPTError(f"{options.resume}: another process has just written it: run the command again")
        prepare(job, config, output, state, force="force" in given)
    train, validation = open_data(job, config)
    kind = ENGINES[job.reference]
    if state is not None:  # it has the weights
        engine = kind(config, threads=options.threads)
    elif init is None:
        engine = kind.random(config, seed=job.seed, threads=options.threads)
    else:
        engine = kind.load(init, threads=options.threads)
    engine.config.tokenizer = config.tokenizer
    stack.enter_context(engine)
    trainer = Trainer(engine, train, settings, ranks)
    if state is not None:
        trainer.restore(state)
        trainer.options = settings
        state.close()  # an open state would keep its disk space after newer saves replace it
    for change in changes:
        say(change)
    if output is None:
        say("this run will not be saved: to save it, name a file with --out")
    progress, log = Progress("steps", settings.steps, trainer.done), job.log if ranks.rank == 0 else None
    lines = Report(progress, log, None if state is None else trainer.done, keep=job.plot is not None)
    return Run(trainer, validation, job, output, stack.enter_context(lines), state)


def warn_about_cores(ranks: Ranks, threads: int) -> None:
    """Print a notice if ranks of a host share processors, or if a rank has more threads than processors."""
    if not hasattr(os, "sched_getaffinity"):
        return
    hosts: dict[str, list[tuple[set[int], int]]] = {}
    for host, cpus, count in ranks.gather((platform.node(), os.sched_getaffinity(0), threads)):
        hosts.setdefault(host, []).append((cpus, count))
    for host, found in hosts.items():
        every, total = set().union(*(cpus for cpus, _ in found)), sum(count for _, count in found)
        if sum(len(cpus) for cpus, _ in found) > len(every) or any(count > len(cpus) for cpus, count in found):
            say(
                f"{host}: {len(found)} ranks with {total} threads share {len(every)} processors, which can be slow: give each "
                f"rank {threads} of its own with mpiexec -bind-to core:{threads} (MPICH), mpirun --bind-to core --map-by "
                f"slot:PE={threads} (Open MPI) or srun -c {threads}, and the same number with -t"
            )


@dataclass
class Run:
    """A run with all its open files. state: the training state that it resumes, or None."""

    trainer: Trainer
    validation: DataLoader | None
    job: Job
    output: Output | None
    report: Report
    state: TrainingState | None
    saving = False
    ended_by: signal.Signals | None = None  # as all ranks know it

    def __post_init__(self) -> None:
        self.begun = self.trainer.done  # number of updates at the beginning
        here = self.output is not None and self.state is not None and self.state.path == os.path.realpath(self.output.state)
        self.saved = self.begun if here else 0  # number of updates in this run's state on the disk; 0 without a state
        self.best = best_of(self.state)  # the best validation loss, and its step

    def facts(self) -> dict[str, Any]:
        """Return what must be equal on all ranks before the first step."""
        trainer = self.trainer
        versions = {"pygpt": __version__, "NumPy": np.__version__, "mpi4py": trainer.ranks.version, "byte order": sys.byteorder}
        return {
            **versions,
            "fused multiply-add": cpu_info()["fused"],
            "the model": repr(trainer.engine.config),
            **{flag(name): value for name, value in trainer.options.as_dict().items()},
            **{flag(name): value for name, value in vars(self.job).items() if name not in PATHS},
            "training data of SHA-256": trainer.loader.fingerprint,
            "validation data of SHA-256": self.validation and self.validation.fingerprint,
            "the step": trainer.done,
            "the position in the data": trainer.loader.state(),
            "weights of SHA-256": hashlib.sha256(trainer.engine.parameters.data).hexdigest(),
        }

    def stopped(self, stop: Stop) -> bool:
        """Return whether a rank has received a signal, the same on all ranks."""
        self.ended_by = next(filter(None, self.trainer.ranks.gather(stop.signal)), None)
        stop.signal = stop.signal or self.ended_by  # a signal that came meanwhile counts at the next call, on all ranks
        return self.ended_by is not None

    def train(self, stop: Stop) -> None:
        """Train until all steps are done or a signal comes. Report, save, and print what was saved."""
        trainer, job, output, ranks = self.trainer, self.job, self.output, self.trainer.ranks
        try:
            with self.report.progress:
                while not self.stopped(stop) and not self.look():
                    ranks.together(partial(self.report.step, trainer.step()), first=True)
                    if job.save_every and trainer.done % job.save_every == 0 and trainer.done < trainer.options.steps:
                        self.save()
            self.stopped(stop)  # a signal may have come after the last step
            if self.ended_by is None or trainer.done > max(self.saved, self.begun):
                self.save()
        except Exception as error:
            self.rescue(error)
            raise
        made = plural(trainer.done, "step")
        if self.ended_by is None and trainer.done == self.begun:
            made += " were done before: a larger --steps continues the run"
        ended = made if self.ended_by is None else f"stopped by {self.ended_by.name} after {made}"
        if output is None or not self.saved:
            say(f"{ended}; nothing was saved")
        elif self.ended_by is None:
            say(f"{ended}; saved {output.model} and {output.state}")
            if job.keep_best and self.best is not None:
                here = "is" if os.path.exists(output.best) else "does not exist: it would be"
                say(f"{output.best} {here} the model of step {self.best[1]}, with the best validation loss {self.best[0]:.6f}")
        else:
            say(f"{ended}; saved; to continue, run: pygpt train --resume {shlex.quote(output.state)}")

    def look(self) -> bool:
        """Validate and print a sample if this step is due; return whether all steps are done."""
        trainer, job, done, lines = self.trainer, self.job, self.trainer.done, self.report
        last = done >= trainer.options.steps
        if self.validation is not None and (done % job.val_every == 0 or last):
            loss = trainer.evaluate(self.validation, min(job.val_batches, self.validation.batches))
            lines.validated(done, loss)
            if self.best is None or loss < self.best[0]:
                self.best = loss, done
                if self.output is not None and job.keep_best:
                    self.save_model(self.output.best)
            if job.patience is not None and done - self.best[1] >= job.patience * job.val_every and not last:
                say(f"stopped early: the validation loss is not below that of step {self.best[1]}")
                last = True
        if job.sample_every and done and done % job.sample_every == 0:
            show = lambda: lines.sampled(done, sample(trainer.engine, job.sample_tokens, seed=done))  # noqa: E731
            trainer.ranks.together(show, first=True)
        if last:
            lines.finished(done)
        return last

    def save(self) -> None:
        """Save the state, then the model, each atomically. Raises PyGPTError if writing fails."""
        if self.output is None:
            return
        self.saving = True
        self.trainer.save(self.output.state, vars(self.job) | ({BEST: [*self.best]} if self.best else {}))
        self.saved = self.trainer.done
        self.save_model(self.output.model)
        self.saving = False

    def save_model(self, path: str) -> None:
        """Save the model atomically, on the first rank. Raises PyGPTError if writing fails."""

        def write() -> None:
            try:
                self.trainer.engine.save(path, version=self.job.version)
                write_beside(path, self.trainer.engine.config)
            except OSError as error:
                raise PyGPTError(f"{path}: cannot write the model file: {error.strerror or error}") from error

        self.trainer.ranks.together(write, first=True)

    def rescue(self, error: Exception) -> None:
        """Save the run after an error if its weights are useful, and print which state exists. The weights are those after the
        last good step. If their loss is not finite, save them only if there is no earlier save."""
        ranks = self.trainer.ranks
        if self.output is None or not ranks.agreed:  # to save takes all ranks
            return
        suspect, older, engine = isinstance(error, NumericalError), max(self.saved, self.begun), self.trainer.engine
        worth = self.trainer.done > older and not (suspect and older)
        arrays = engine.parameters, engine.first_moments, engine.second_moments
        if worth and all(ranks.gather(all(np.isfinite(array).all() for array in arrays))) and not self.saving:
            try:
                self.save()
            except PyGPTError as second:
                say(str(second))
        if self.saved and not isinstance(error, BrokenPipeError):
            state, other = self.output.state, ""
            if suspect and self.saved == self.trainer.done and os.path.exists(f"{state}.1"):
                other = f" ({state}.1 after fewer)"
            say(f"{state} contains the run after {plural(self.saved, 'step')}{other}; then training failed:")


def run_check(given: dict[str, Any]) -> None:
    """Run --check. Raises PyGPTError if a difference is too large, InputError for options that do not go with --check."""
    if surplus := sorted({*given} - {"check", "init", "threads", "reference"}):
        raise InputError(f"--check does not train, so leave out {flag(surplus[0])}; it takes --init, -t and --reference")
    path, _ = find_model(given.get("init"))
    with ENGINES["reference" in given].load(path, threads=given.get("threads")) as engine:
        state = read_debug_state(given["check"], engine.config)

        def mean_loss() -> float:
            loss = float(engine.forward(state.inputs, state.targets).mean(dtype="f8"))
            engine.backward()
            return loss

        loss = mean_loss()
        with engine.model() as model:
            logits = max(largest(model.logits(row.tolist()), state.logits[b]) for b, row in enumerate(state.inputs))
        rows = [("logits", logits, FORWARD), ("loss", largest(np.array(loss), np.array(state.loss)), FORWARD)]
        rows += [(f"d{name}", largest(engine.gradient(name), state.gradients[name]), GRADIENT) for name in state.gradients]
        print(f"{'tensor':<12} {'difference':>12} {'tolerance':>10}")
        for name, difference, tolerance in rows:
            print(f"{name:<12} {difference:>12.3e} {tolerance:>10.0e}  {'OK' if difference <= tolerance else 'NOT OK'}")
        for step in range(STEPS):
            loss = mean_loss()
            engine.update(lr=LR, step=step + 1, weight_decay=WEIGHT_DECAY)
            print(f"step {step}: loss {loss:.6f}", flush=True)
    if not all(difference <= tolerance for _, difference, tolerance in rows):
        text = f"the engine's results differ by more than the tolerance: check that {path} is the same model"
        raise PyGPTError(f"{given['check']}: {text}")


def largest(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest absolute difference. If an array holds NaN, return NaN, which is outside every tolerance."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return float(np.abs(found.astype("f8") - expected).max())


def run_estimate(given: dict[str, Any]) -> None:
    """Run --estimate: print a line for each of some numbers of ranks. Raises InputError for a bad number of ranks or speed."""
    parts = given.get("parts") or given.get("ranks", 8)
    job, options = new({"data": "none", **given, "parts": parts})
    ranks, gbit, tokens = given.get("ranks", parts), given.get("gbit", 10.0), options.accumulate * job.B * job.T
    if parts % ranks:
        raise InputError(f"--ranks is {ranks}: it must divide --parts, which is {parts}")
    if not 0.001 <= gbit <= 1e6:
        raise InputError(f"--gbit is {gbit}: it must be from 0.001 to 1000000")
    config, _ = beginning(given)
    if config.maxT < job.T:
        raise InputError(f"-T is {job.T}: the model takes sequences of at most {config.maxT} tokens")
    check_stdout("the estimate")
    batch, update, threads = measure(config, job.B, job.T, given.get("threads"))
    P = config.parameters(padded=True)
    print(f"model: {P} parameters; step: {parts} parts of {options.accumulate} x {job.B} x {job.T} tokens")
    print(f"measured with {plural(threads, 'thread')}: {batch:.3f} s for {job.B} x {job.T} tokens, {update:.3f} s an update")
    print(f"network: {gbit:g} Gbit/s; memory of a rank: weights, gradients and moments, without activations\n")
    print("ranks  compute s  messages s   step s  tokens/s  speed-up  efficiency      MB")
    counts = [count for count in range(1, ranks + 1) if parts % count == 0]
    alone = 0.0
    for count in [*counts[: LINES - 1], *counts[LINES - 1 :][-1:]]:
        per = parts // count
        add = update * 5 / 7  # a copy and a sum pass over 5 arrays, an update over 7
        compute = per * options.accumulate * batch + (per - 1) * add + update / count
        messages = OVERHEAD * 2 * 4 * P * (count - 1) / count * 8 / (gbit * 1e9)
        step = compute + messages
        alone = alone or step
        print(
            f"{count:>5} {compute:>10.2f} {messages:>11.2f} {step:>8.2f} {parts * tokens / step:>9.0f} {alone / step:>9.2f} "
            f"{alone / step / count:>11.2f} {(8 + 8 / count) * P / 1e6:>7.0f}"
        )


def measure(config: Config, B: int, T: int, threads: int | None) -> tuple[float, float, int]:
    """Return the seconds of one micro-batch and of one update on this machine, the best of three, and the threads."""
    ids = np.arange(B * T, dtype=np.int32).reshape(B, T) % config.V
    with TrainableGPT2(config, threads=threads) as engine:
        parts = partial(engine.forward, ids, ids), engine.backward, engine.gradient_norm, partial(engine.update, lr=0.0, step=1)
        found = [laps(*parts)[1] for _ in range(3)]
        return min(sum(seconds[:2]) for seconds in found), min(sum(seconds[2:]) for seconds in found), engine.threads
