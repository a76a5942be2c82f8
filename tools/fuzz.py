#!/usr/bin/env python3
"""Fuzz pygpt's readers and commands: tests/targets.py and targets_json.py describe the targets.

    python tools/fuzz.py                              all targets, one minute each
    python tools/fuzz.py checkpoint serve             only these two
    python tools/fuzz.py --seconds 3600               all targets, one hour each
    python tools/fuzz.py checkpoint --input FILE      try one input again

If the package atheris is installed, libFuzzer chooses the inputs, guided by coverage. Otherwise the inputs are random mutations
of valid inputs and of tests/corpus/. Each target runs in its own process. The input of a finding is saved in --output, even if
it crashes the process. Copy it into tests/corpus/TARGET/; then tests/unit/test_readers.py tries it in every run.

Exit status: 0; 1 if there is a finding; 2 for bad arguments; 130 after Ctrl-C."""

import argparse
import hashlib
import importlib
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "corpus"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LONGEST = 1 << 17  # bytes of an input
SLOWEST_S = 150  # the most seconds for one input; a slower one is a hang


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(names())} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="seconds for each target (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mutations (default 1)")
    parser.add_argument("-o", "--output", type=Path, default=Path("fuzz-findings"), help="folder for inputs of findings")
    parser.add_argument("--input", type=Path, help="try this input of one target")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.targets if name not in names()]:
        parser.error(f"target {unknown[0]!r} is unknown: it must be one of {', '.join(names())}")
    if options.input is not None and len(options.targets) != 1:
        parser.error("--input needs exactly one TARGET")
    try:
        if options.input is not None:
            with tempfile.TemporaryDirectory() as folder:
                print(new_target(options.targets[0], Path(folder)).check(options.input.read_bytes()))
            return 0
        if options.child:
            fuzz(options.targets[0], options.seconds, options.seed, options.output)
            return 0
        return run_all(options.targets or names(), options)
    except KeyboardInterrupt:
        return 130


def names() -> list[str]:
    """Return the names of all targets. Each has a folder of examples."""
    return sorted(path.name for path in CORPUS.iterdir())


def new_target(name: str, place: Path) -> Any:
    """Make a target that works in `folder`. The import is here, so that atheris measures the imported code."""
    (folder := place / "work").mkdir()
    return importlib.import_module("targets_json").TARGETS[name](folder)


def run_all(chosen: Sequence[str], options: argparse.Namespace) -> int:
    """Fuzz each target in a child process, and report findings."""
    options.output.mkdir(parents=True, exist_ok=True)
    before = set(options.output.iterdir())
    failed = False
    for name in chosen:
        words = [name, "--child", f"--seconds={options.seconds}", f"--seed={options.seed}", f"--output={options.output}"]
        print(f"{name}: {options.seconds} seconds", flush=True)
        failed |= subprocess.run([sys.executable, __file__, *words]).returncode != 0
    for path in sorted(set(options.output.iterdir()) - before):
        print(f"finding: python tools/fuzz.py {path.name.split('.')[0]} --input {path}")
    return int(failed)


def fuzz(name: str, seconds: int, seed: int, output: Path) -> None:
    """Fuzz one target in this process: by libFuzzer, which ends the process, or at random."""
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if importlib.util.find_spec("atheris") is None:
        try_at_random(new_target(name, place), Random(f"{seed} {name}"), seconds, output)
        return
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["pygpt"]):
        target = new_target(name, place)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        changed = target.mutate(random, data, data) if random.random() < 0.8 else atheris.Mutate(data, most)
        return bytes(changed[:most])

    (corpus := place / "corpus").mkdir()
    for number, data in enumerate(inputs_of(target)):
        (corpus / str(number)).write_bytes(data)
    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={LONGEST}", f"-timeout={SLOWEST_S}", "-verbosity=0"]
    artifacts = f"-artifact_prefix={output}/{name}."
    try_one: Callable[[bytes], None] = lambda data: target.check(data) and None  # noqa: E731
    atheris.Setup([sys.argv[0], *options, artifacts, str(corpus)], try_one, custom_mutator=mutate)
    atheris.Fuzz()


def inputs_of(target: Any) -> list[bytes]:
    """Return the inputs to begin with."""
    return [*target.seeds(), *(path.read_bytes() for path in sorted((CORPUS / target.name).iterdir()))]


def try_at_random(target: Any, random: Random, seconds: int, output: Path) -> None:
    """Try mutations until the time is up. A file has the current input, and stays if the input crashes or hangs."""
    inputs, tried, end = inputs_of(target), 0, time.monotonic() + seconds
    seen: set[str] = set()
    running = output / f"{target.name}.running"
    while time.monotonic() < end:
        data = inputs[tried] if tried < len(inputs) else target.mutate(random, random.choice(inputs), random.choice(inputs))
        running.write_bytes(data)
        try:
            label = target.check(data)
        except Exception:
            running.rename(output / f"{target.name}.{hashlib.sha256(data).hexdigest()[:12]}")
            raise
        if label not in seen and tried >= len(inputs):
            inputs.append(data)  # answered in a new way: mutate it further
        seen.add(label)
        tried += 1
    running.unlink(missing_ok=True)
    print(f"{target.name}: {tried} inputs, {len(seen)} kinds of answers, no finding")


if __name__ == "__main__":
    sys.exit(main())
