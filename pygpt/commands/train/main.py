"""Train GPT-2 on text or token shards: fine-tune a checkpoint, or begin with random weights.

    pygpt train --data my.txt --init gpt2_124M.bin --out mine.bin
    pygpt train --data my.txt --shape L=4,NH=4,C=128,maxT=256 -B 8 -T 128 --steps 500 --lr 1e-3 --out mine.bin
    pygpt train --resume mine.state
    pygpt train --check gpt2_124M_debug_state.bin --init gpt2_124M.bin

The defaults are those of llm.c's CPU program.

--out mine.bin saves the model as mine.bin, and the training state as mine.state. `pygpt chat -m mine.bin` answers with the
model. The state holds weights, AdamW's moments, step, options and the place in the data. --resume continues from it with the
same bits as a run that never stopped, with any number of threads. The state before it stays as mine.state.1; if mine.state is
damaged, --resume uses that one. Ctrl-C and SIGTERM finish the step and save; a second one ends at once. Existing files are
replaced only if they belong to the resumed run, or with --force.

stdout has a line for each step and each validation. Samples of text stand between lines of ---; they begin with
<|endoftext|> and are drawn at random, with the step as seed. --log FILE has a line of JSON for each step:

    step            updates made before it, from 0
    loss, norm      of the step's batches before the update; of their gradient before clipping
    lr, ms, tokens_per_s
    val_loss        of the same weights, if they were validated; a last line has only this and step

Exit status: 0; 1 for a failure at run time, such as a loss that is not finite, or if --check finds a difference; 2 for bad
input; 130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of stdout has gone. The run is saved in the last three cases. It
is saved after an error, too, except if the loss is not finite and there is an earlier save.
"""

import argparse
import os
import shlex
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ...config import Config
from ...errors import InputError, NumericalError, PyGPTError
from ...formats.open import open_floats
from ...hub.find import find_model
from ...reference import SerialTrainableGPT2
from ...training.data import DataLoader
from ...training.state import TrainingState, open_state
from ...training.trainable import TrainableGPT2
from ...training.trainer import Trainer
from ..console import HelpFormatter, Parser, say, status_of, whole
from ..profile.plots import matplotlib
from ..progress import Progress
from . import check, report
from .job import (
    WHOLE,
    Job,
    Output,
    check_distinct,
    check_new,
    check_room,
    check_writable,
    files_of,
    flag,
    leftovers,
    new,
    number,
    open_data,
    resumed,
    shape_of,
)

RANDOM = "random"  # instead of a checkpoint's name
NAMES = {"data", "val", "init", "out", "resume", "log", "plot", "check"}  # options that take a file's name
Engine = TrainableGPT2 | SerialTrainableGPT2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    stop = Stop()
    return status_of(lambda: run(build_parser().parse_args(arguments), stop)) or stop.status


def build_parser() -> argparse.ArgumentParser:
    """The options and their help. An option that is not given is None: a resumed run has its own."""
    parser = Parser(
        prog="pygpt train",
        usage="pygpt train [options]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="FILE", help="UTF-8 text, or llm.c's token shards (.bin); a file, or a pattern in quotes")
    add("--val", metavar="FILE", help="the same for validation")
    add("--val-tokens", metavar="N", type=whole(*WHOLE["val_tokens"]), help="validate on the first N tokens of --data instead")
    add("--val-fraction", metavar="F", type=number, help="validate on the last part of --data instead, as in 0.1")
    add("-B", metavar="N", type=whole(*WHOLE["B"]), help="sequences of a batch (default 4)")
    add("-T", metavar="N", type=whole(*WHOLE["T"]), help="tokens of a sequence (default 64)")
    add("--shuffle", action="store_true", default=None, help="another order of the batches in every epoch")
    add("--seed", metavar="N", type=whole(*WHOLE["seed"]), help="of random weights and of --shuffle (default 1)")

    add = parser.add_argument_group("model").add_argument
    add("--init", metavar="FILE", help="begin from this checkpoint, or with `random` weights (default: as -m of the command)")
    add(
        "--shape",
        metavar="SHAPE",
        help="of random weights: gpt2, gpt2-medium, -large, -xl, or L=4,NH=4,C=128,maxT=256[,V=50257]",
    )
    add(
        "-t", "--threads", metavar="N", type=whole(1, 256), help="workers (default $PYGPT_THREADS, else what fits this machine)"
    )
    add("--reference", action="store_true", default=None, help="compute as the serial program does")

    add = parser.add_argument_group("optimizer").add_argument
    add("--steps", metavar="N", type=whole(1, 2**31 - 1), help="updates in all (default 40)")
    add("--lr", metavar="X", type=number, help="learning rate (default 1e-4)")
    add("--schedule", metavar="NAME", help="constant (default) or cosine, which ends at --min-lr")
    add("--warmup", metavar="N", type=whole(0, 2**31 - 1), help="steps in which the learning rate rises (default 0)")
    add("--min-lr", metavar="X", type=number, help="where the cosine ends (default 0)")
    add("--beta1", metavar="X", type=number, help="AdamW's average of gradients (default 0.9)")
    add("--beta2", metavar="X", type=number, help="and of their squares (default 0.999)")
    add("--eps", metavar="X", type=number, help="AdamW's term beside the root (default 1e-8)")
    add("--weight-decay", metavar="X", type=number, help="of all tensors (default 0)")
    add("--decay-matrices-only", action="store_true", default=None, help="not of biases and layer norms")
    add("--clip", metavar="X", type=number, help="largest norm of the gradient (default 0: any)")
    add("--accumulate", metavar="N", type=whole(1, 10**6), help="batches of a step, gradients averaged (default 1)")

    add = parser.add_argument_group("saving").add_argument
    add("--out", metavar="FILE", help="save the model as FILE.bin and the state as FILE.state (default: nothing is saved)")
    add("--version", metavar="N", type=whole(*WHOLE["version"]), help="of the model file: 3, float32 (default), or 5, bfloat16")
    add(
        "--save-every",
        metavar="N",
        type=whole(*WHOLE["save_every"]),
        help="steps between saves (default 100; 0: only at the end)",
    )
    add("--resume", metavar="STATE", help="continue the run of this state; other options may be left out")
    add("--force", action="store_true", help="replace files that exist")

    add = parser.add_argument_group("reports").add_argument
    add("--val-every", metavar="N", type=whole(*WHOLE["val_every"]), help="steps between validations (default 10)")
    add("--val-batches", metavar="N", type=whole(*WHOLE["val_batches"]), help="batches of a validation (default 5)")
    add(
        "--sample-every",
        metavar="N",
        type=whole(*WHOLE["sample_every"]),
        help="steps between samples of text (default 20; 0: none)",
    )
    add("--sample-tokens", metavar="N", type=whole(*WHOLE["sample_tokens"]), help="tokens of a sample (default 64)")
    add("--log", metavar="FILE", help="write a line of JSON for each step")
    add("--plot", metavar="PATH", help="draw the loss: a .svg, .png or .pdf, or a folder (needs matplotlib)")
    add("--check", metavar="STATE", help="compare with llm.c's debug state, and train nothing")
    return parser


# ------------------------------------------------------------------------------------------------ the run


class Stop:
    """In a `with` block, Ctrl-C and SIGTERM only ask for the end of the run; a second one takes effect at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """The exit status that a signal asks for, or 0."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> "Stop":
        for which in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(which) != signal.SIG_IGN:  # nohup's children keep ignoring
                self._before[which] = signal.signal(which, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for which, before in self._before.items():
            signal.signal(which, before)

    def _note(self, which: int, frame: object) -> None:
        self.signal = signal.Signals(which)
        signal.signal(which, self._before[which])


def run(options: argparse.Namespace, stop: Stop) -> None:
    """Check everything that can be checked, then train and save."""
    given = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    for name in NAMES & {*given}:
        if not given[name]:
            raise InputError(f"{flag(name)} is empty: it must be a name")
    if options.check is not None:
        return run_check(given)
    with ExitStack() as stack:
        state: TrainingState | None = None
        changes: list[str] = []
        if options.resume is None:
            job, settings = new(given)
            config, init = beginning(given)
            output = None if options.out is None else Output.named(options.out)
        else:
            state, notice = open_state(options.resume)
            stack.enter_context(state)
            say(notice)
            job, settings, changes = resumed(given, state)
            config, init = state.config, None
            output = Output.named(options.out) if options.out else Output.beside(options.resume)
            if job.plot is not None and "plot" not in given:
                check_pictures(report.pictures(job.plot), state)
        prepare(job, config, output, set() if state is None else files_of(state), force=options.force)
        train, validation = open_data(job, config.V)
        engine = make_engine(config, init, job, options.threads)
        stack.enter_context(engine)
        trainer = Trainer(engine, train, settings)
        if state is not None:
            trainer.restore(state)
            trainer.options = settings
            state.close()  # or the disk would have to keep it when a newer one has replaced it twice
        for change in changes:
            say(change)
        if output is None:
            say("nothing will be saved: --out names the model to write")
        log = stack.enter_context(report.Log(job.log, None if state is None else trainer.done, keep=job.plot is not None))
        with stop:
            Run(trainer, validation, job, output, log, state).train(stop)
        if job.plot is not None:
            names = report.pictures(job.plot)
            if any("loss" in entry for entry in log.entries):
                report.draw(names, log.entries)
                say(f"wrote {' and '.join(names)}")
            else:
                say(f"no step to draw: {' and '.join(names)} not written")
    return None


def check_pictures(paths: list[str], state: TrainingState) -> None:
    """Refuse to replace what a state says is its run's picture, unless it is beside it: anybody may have made the state."""
    for path in paths:
        if os.path.lexists(path) and os.path.dirname(os.path.realpath(path)) != os.path.dirname(state.path):
            raise InputError(f"{path}: it exists already, and the state names it as the picture of its run: give --plot again")


def beginning(given: dict[str, Any]) -> tuple[Config, str]:
    """The shape of a new run's model, and the checkpoint that it begins from, or "random"."""
    init, shape = given.get("init"), given.get("shape")
    if init == RANDOM or (init is None and shape is not None):
        if shape is None:
            raise InputError("--init random needs --shape: gpt2, or one like L=4,NH=4,C=128,maxT=256")
        return shape_of(shape), RANDOM
    if shape is not None:
        raise InputError(f"--shape and --init {init} were both given: a checkpoint has a shape of its own")
    path, origin = find_model(init)
    if origin == "embedded":
        say("begins from the small embedded model (Shakespeare); --init names another, or `random` with --shape")
    with open_floats(path) as checkpoint:
        return checkpoint.config, path


def prepare(job: Job, config: Config, output: Output | None, mine: set[str], *, force: bool) -> None:
    """Find out before the work whether its results can be kept. `mine` are files of the run that is resumed."""
    written = [*(output or ()), *filter(None, [job.log])]
    older = [] if output is None else [f"{output.state}.1"]
    pictures = [] if job.plot is None else report.pictures(job.plot)
    drawn = {*pictures, *filter(None, [job.plot])}  # a folder of pictures is a use, too
    check_distinct([*written, *older, *sorted(drawn), *filter(None, [job.data, job.val])])
    for path in () if force else (*written, *older, *pictures):
        if os.path.realpath(path) not in mine:
            check_new(path)
    for path in pictures:
        check_writable(path, make_folder=True)
    if pictures:
        matplotlib()  # if it is missing, say so now
    for path in written:
        check_writable(path)
        for left in leftovers(path):
            os.unlink(left)
            say(f"removed {left}, which a killed run has left")
    if output is not None:
        check_room(output, config, job.version)


def engine_kind(*, reference: bool) -> type[Engine]:
    """The class of the engine."""
    return SerialTrainableGPT2 if reference else TrainableGPT2


def make_engine(config: Config, init: str | None, job: Job, threads: int | None) -> Engine:
    """The engine with the weights that the run begins from: a checkpoint's, "random" ones, or none yet."""
    kind = engine_kind(reference=job.reference)
    if init is None:
        return kind(config, threads=threads)
    return kind.random(config, seed=job.seed, threads=threads) if init == RANDOM else kind.load(init, threads=threads)


def run_check(given: dict[str, Any]) -> None:
    """--check: raises PyGPTError when a difference is too large."""
    if surplus := sorted({*given} - {"check", "init", "threads", "reference"}):
        raise InputError(f"--check trains nothing: {flag(surplus[0])} means nothing there; it takes --init, -t and --reference")
    path, _ = find_model(given.get("init"))
    kind = engine_kind(reference="reference" in given)
    with kind.load(path, threads=given.get("threads")) as engine:
        if not check.check(engine, given["check"]):
            raise PyGPTError(f"{given['check']}: the engine differs from it by more than the tolerances, with the model {path}")


class Run:
    """A run, all of it open. `state` is what it was resumed from."""

    def __init__(
        self,
        trainer: Trainer,
        validation: DataLoader | None,
        job: Job,
        output: Output | None,
        log: report.Log,
        state: TrainingState | None,
    ) -> None:
        self.trainer, self.validation, self.job, self.output, self.log = trainer, validation, job, output, log
        self.begun = trainer.done  # updates that the run began with
        here = output is not None and state is not None and state.path == os.path.realpath(output.state)
        self.saved = self.begun if here else 0  # those in its own state on the disk, if there is one
        self.saving = False

    def train(self, stop: Stop) -> None:
        """Make the steps that are left, or those until a signal comes; report, save, and say what was saved."""
        trainer, job, output = self.trainer, self.job, self.output
        try:
            with Progress("steps", trainer.options.steps, trainer.done) as progress:
                lines = report.Report(progress, self.log)
                while stop.signal is None and not self.look(lines):
                    lines.step(trainer.step())
                    if job.save_every and trainer.done % job.save_every == 0 and trainer.done < trainer.options.steps:
                        self.save()
            if stop.signal is None or trainer.done > max(self.saved, self.begun):
                self.save()
        except Exception as error:
            self.rescue(error)
            raise
        made = counted(trainer.done)
        ended = made if stop.signal is None else f"stopped by {stop.signal.name} after {made}"
        if output is None or not self.saved:
            say(f"{ended}; nothing was saved")
        elif stop.signal is None:
            say(f"{ended}; saved {output.model} and {output.state}")
        else:
            say(f"{ended}; saved; to go on: pygpt train --resume {shlex.quote(output.state)}")

    def look(self, lines: report.Report) -> bool:
        """Validate and sample where it is time to; return whether all steps were made."""
        trainer, job, done = self.trainer, self.job, self.trainer.done
        last = done >= trainer.options.steps
        if self.validation is not None and (done % job.val_every == 0 or last):
            batches = min(job.val_batches, self.validation.batches)
            lines.validated(done, trainer.evaluate(self.validation, batches))
        if job.sample_every and done and done % job.sample_every == 0:
            with trainer.engine.model() as model:
                lines.sampled(done, report.sample(model, job.sample_tokens, seed=done))
        if last:
            lines.finished(done)
        return last

    def save(self) -> None:
        """Save state and model, each all or nothing, first what a run is resumed from."""
        if self.output is None:
            return
        self.saving = True
        self.trainer.save(self.output.state, vars(self.job))
        self.saved = self.trainer.done
        try:
            self.trainer.engine.save(self.output.model, version=self.job.version)
        except OSError as error:
            raise PyGPTError(f"{self.output.model}: cannot write the model file: {error.strerror or error}") from error
        self.saving = False

    def rescue(self, error: Exception) -> None:
        """The run ends by an error: save what its steps have made, if it is good, and say which state there is.

        A step that fails has changed nothing. But weights whose loss is not finite are worth less than those of an earlier
        save, and are saved only where there is none.
        """
        if self.output is None:
            return
        suspect, older = isinstance(error, NumericalError), max(self.saved, self.begun)
        worth = self.trainer.done > older and not (suspect and older) and finite(self.trainer.engine)
        if worth and not self.saving:
            try:
                self.save()
            except PyGPTError as second:
                say(str(second))
        if self.saved and not isinstance(error, BrokenPipeError):
            state, other = self.output.state, ""
            if suspect and self.saved == self.trainer.done and os.path.exists(f"{state}.1"):
                other = f" ({state}.1 after fewer)"
            say(f"{state} has the run after {counted(self.saved)}{other}, until this:")


def finite(engine: Engine) -> bool:
    """Whether all weights and moments are finite."""
    return all(np.isfinite(array).all() for array in (engine.parameters, engine.first_moments, engine.second_moments))


def counted(steps: int) -> str:
    """A number of steps in words."""
    return f"{steps} step{'' if steps == 1 else 's'}"
