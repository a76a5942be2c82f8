#!/usr/bin/env python3
"""Reliability under faults and load: one command for all of it, beside the test suite, which runs short forms of it.

    python tools/stress.py faults                  kill -9 while writing, full disks, no memory, no threads, closed streams
    python tools/stress.py signals                 1,000 runs that get signals at random moments
    python tools/stress.py load                    an hour of everything at once in one process, every bit checked
    python tools/stress.py crowd                   more workers than processors, and a quota of half a processor
    python tools/stress.py load --seconds 60 --seed 7

--seconds bounds the time, --count the rounds (of faults and crowd) or runs (of signals); --seed repeats a choice of moments and
jobs (the machine's own timing it cannot repeat). stdout has what was counted, its last line the sum, the
failures and the seed. Exit status: 0; 1 when anything failed, each failure said on stderr; 2 for bad arguments; 130 after
Ctrl-C.
"""

import signal

if __name__ == "__main__":  # also in a shell's background job, which would ignore it, as all that it starts
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; then it is main()'s

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# This checkout's pygpt; and tools/ last, whose names shadow modules of the standard library.
TOOLS = Path(__file__).resolve().parent
sys.path[:] = [str(TOOLS.parent), *(path for path in sys.path if Path(path or ".").resolve() != TOOLS), str(TOOLS)]

import need  # noqa: E402

need.kernels()

import pygpt.model  # noqa: E402
from pygpt import InputError  # noqa: E402
from pygpt.commands.console import HelpFormatter, Parser, status_of  # noqa: E402

KINDS = ("faults", "signals", "load", "crowd")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    found = 0

    def job() -> None:
        nonlocal found
        found = run(build_parser().parse_args(arguments))

    return status_of(job) or found


def build_parser() -> argparse.ArgumentParser:
    """The options and their help."""
    parser = Parser(
        prog="stress.py",
        usage="python tools/stress.py KIND [--seconds N] [--count N] [--seed S]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("kind", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seconds", metavar="N", help="end after about so long (default: the long form)")
    parser.add_argument("--count", metavar="N", help="so many rounds or runs (default: 3, 1,000 and 5)")
    parser.add_argument("--seed", metavar="S", default="1", help="of the choice of moments and jobs (default 1)")
    return parser


def run(options: argparse.Namespace) -> int:
    """Check the arguments, run one kind of stress, report."""
    if options.kind not in KINDS:
        raise InputError(f"KIND is {options.kind[:40]!r}: it must be one of {', '.join(KINDS)}")
    seconds = None if options.seconds is None else whole("--seconds", options.seconds)
    rounds = None if options.count is None else whole("--count", options.count)
    if options.kind == "load" and rounds is not None:
        raise InputError("--count has no meaning for load: --seconds says how long it is")
    seed = whole("--seed", options.seed)
    from stressing import crowd, faults, load, signals
    from stressing.common import Tally

    pygpt.cpus.workers_for = lambda threads, *_: threads  # the models are small: every step uses all workers nevertheless
    tally = Tally(seed, {"faults": "rounds", "signals": "runs", "load": "seconds", "crowd": "rounds"}[options.kind])
    try:
        if options.kind == "load":
            load.run_load(tally, seconds)
        else:
            kinds = {"faults": faults.run_faults, "signals": signals.run_signals, "crowd": crowd.run_crowd}
            kinds[options.kind](tally, seconds, rounds)
    except KeyboardInterrupt:
        tally.report()  # what was counted so far
        raise
    return tally.report()


def whole(name: str, given: str) -> int:
    """A positive whole number of an option."""
    if not (given.isascii() and given.isdigit() and len(given) < 10 and int(given)):
        raise InputError(f"{name} is {given[:40]!r}: it must be a whole number from 1 to 999999999")
    return int(given)


if __name__ == "__main__":
    sys.exit(main())
