"""Complete or score many prompts from a file, on one machine or in shards on several. A killed job can continue.

    pygpt batch in.jsonl -o out.jsonl -m gpt2 --max-new-tokens 32 --temp 0.8 --seed 7
    pygpt batch in.jsonl.zst -o out-3.jsonl.gz --shard 3/8

Each line of IN is a JSON object with a "prompt" or "tokens", and each line of OUT is its answer. OUT.part holds the answers so
far, and OUT gets its name when it is complete. To continue a killed job, give the same command. docs/reference/batch.md
describes the JSON and the files."""

import argparse
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from typing import IO, Any

from ..cluster import Complete
from ..errors import InputError, PyGPTError, shown
from ..formats.files import atomic_file, is_still
from ..formats.text import compress, is_compressed, read_lines, row_of
from .console import Parser, Progress, command, say, whole
from .convert import check_parent, writing
from .options import add_completion_options, read_options

Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt batch", usage="pygpt batch IN.jsonl -o OUT.jsonl [options]", description=__doc__)
    add = parser.add_argument
    add("source", metavar="IN", help="a file of JSON lines, possibly .gz or .zst")
    add("-o", "--out", metavar="OUT", help="the file of the answers, possibly .gz or .zst")
    add("--shard", metavar="I/N", default="0/1", help="answer only part I of N, counted from 0 (default 0/1)")
    add("--force", action="store_true", help="begin again, and replace OUT")
    add("--keep-going", action="store_true", help="write an error for a bad line; but each line must be JSON with its own id")
    add("-m", "--model", metavar="MODEL", help="a model file or a downloaded model (default: see pygpt --help)")
    add("-t", "--threads", metavar="N", type=whole(1, 256), help="threads (default $PYGPT_THREADS, else one per usable core)")
    add("--batch-size", metavar="N", type=whole(1, 1 << 20), default=64, help="sequences in one step (default 64)")
    add("--weights", metavar="FORMAT", help="quantise the weights in memory to q8_0 or q4_0 (default: use the file's weights)")
    add("--no-mmap", action="store_true", help="copy the model into memory, in case another program changes its file")
    add("--logprobs", metavar="K", type=whole(0, 1 << 20), help="write log-probabilities, with the K most probable tokens")
    add("-n", "--total", metavar="N", help="total number of tokens, prompt included (default 10)")
    add("--max-new-tokens", metavar="N", help="number of new tokens, instead of --total")
    add_completion_options(parser, seed="seed of the job, from which each line's own seed is made (default 0)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments and every line, then answer the lines that have no answer yet."""
    if not options.out:
        raise InputError("-o is missing: name the file of the answers, such as -o out.jsonl")
    shard = shard_of(options.shard)
    given = {"seed": 0, "mmap": not options.no_mmap, **read_options(options)}
    given |= {name: getattr(options, name) for name in ("threads", "weights", "logprobs", "keep_going", "batch_size")}
    out, source = options.out, options.source
    packed, _ = map(is_compressed, (out, source))
    for name in (out, f"{out}.part", f"{out}.job.json"):
        if os.path.exists(name) and os.path.exists(source) and os.path.samefile(name, source):
            raise InputError(f"{source}: this file is IN, and OUT is {out}, which would replace it: give OUT another name")
    found: list[Row] = []
    with Complete(options.model, **given) as complete:

        def identify() -> None:  # read the whole model, while the rows are checked and answered
            with suppress(OSError):  # record() raises it
                found.append(complete.identity())

        hashing = Thread(target=identify, daemon=True)  # an error or Ctrl-C does not wait for it
        hashing.start()
        digest, count = survey(source)
        rows = range(shard[0] * count // shard[1], (shard[0] + 1) * count // shard[1])

        def record() -> Row:
            hashing.join()
            return {**(found[0] if found else complete.identity()), "input": digest, "shard": f"{shard[0]}/{shard[1]}"}

        with opened(out) as part:
            begun = not options.force and (os.path.exists(out) or os.fstat(part.fileno()).st_size > 0)
            if begun:
                compare(out, json.loads(json.dumps(record())))
            if begun and os.path.exists(out):
                part.truncate(0)
                return say(f"{out} is complete already; to answer the lines again, use --force")
            check_rows(complete, source, rows)
            if options.force:  # delete OUT first: the new record must never exist together with an old OUT
                Path(out).unlink(missing_ok=True)
                Path(f"{out}.job.json").unlink(missing_ok=True)
                part.truncate(0)
            answer(complete, source, rows, part, None if begun else record)
            os.fsync(part.fileno())
            if packed:
                compress(part.name, out)
                os.unlink(part.name)
            else:
                os.replace(part.name, out)
    return say(f"wrote {out}: {len(rows)} answers")


def shard_of(text: str) -> tuple[int, int]:
    """Read the value of --shard."""
    found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 <= index < count <= 10**6:
        raise InputError(f"--shard is {text[:40]!r}: it must be I/N, such as 0/8, with I from 0 to N - 1")
    return index, count


def survey(path: str) -> tuple[str, int]:
    """Return the SHA-256 of the lines of a file, and the number of lines that are not blank."""
    digest, count = hashlib.sha256(), 0
    for line in read_lines(path):
        digest.update(line)
        count += bool(line.strip())
    return digest.hexdigest(), count


def rows_of(path: str, wanted: range) -> Iterator[tuple[int, Row]]:
    """Yield the number of the line, from 1, and its object, of the rows in `wanted`. Raises DataError for other lines."""
    filled = ((number, line) for number, line in enumerate(read_lines(path), 1) if line.strip())
    for number, line in islice(filled, wanted.start, wanted.stop):
        yield number, {"id": number, **row_of(line, f"{path}: line {number}", '{"id": 1, "prompt": "To be"}')}


def check_rows(complete: Complete, path: str, wanted: range) -> None:
    """Raise InputError for the first row that cannot be answered, or that has the id of an earlier one."""
    seen: set[str | int] = set()  # as text, because the seed is made from the text: 1 and "1" are equal
    for number, row in rows_of(path, wanted):
        try:
            complete.check(row)
            key = hash(str(row["id"]))
        except PyGPTError as error:
            if complete.keep_going:
                continue
            raise InputError(f"{path}: line {number}: {error}") from None
        if key in seen:
            raise InputError(f"{path}: line {number}: the id {str(row['id'])[:60]!r} occurs twice: give each line its own")
        seen.add(key)


def answer(complete: Complete, path: str, wanted: range, part: IO[bytes], record: Callable[[], Row] | None) -> None:
    """Keep the answers that `part` holds already, and append those of the other rows. record: to write before the first."""
    kept = keep_answers(part, (row["id"] for _, row in rows_of(path, wanted)))
    left = (row for _, row in rows_of(path, range(wanted.start + kept, wanted.stop)))
    with Progress("prompts", len(wanted), kept) as progress:
        answers = complete.rows(left)
        first = [*islice(answers, 1)]
        if record is not None:
            with atomic_file(f"{part.name.removesuffix('.part')}.job.json") as file:
                file.write(json.dumps(record(), indent=1).encode() + b"\n")
        for done, found in enumerate(chain(first, answers), kept + 1):
            line = json.dumps(found).encode() + b"\n"
            with writing(part.name, "the answers"):
                while line:  # the file is not buffered, so that no later flush can fail
                    line = line[part.write(line) :]
            progress.update(done)


def keep_answers(part: IO[bytes], keys: Iterator[object]) -> int:
    """Count the whole answers at the beginning of a part, one for each key, and cut off the rest."""
    count = end = 0
    with open(part.name, "rb") as lines, suppress(ValueError, TypeError, KeyError):  # of a damaged line
        for line, key in zip(lines, keys, strict=False):
            if not line.endswith(b"\n") or json.loads(line)["id"] != key:
                break
            count, end = count + 1, end + len(line)
    part.seek(end)
    part.truncate()
    return count


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """Open OUT.part for reading and writing, and keep other processes out. Leave nothing of a job without answers."""
    name, record = f"{path}.part", f"{path}.job.json"
    check_parent(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a regular file, so it is not replaced: give another name")
    with open(name, "r+b", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666)) as part:
        alone = False
        with suppress(OSError):
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = is_still(name, part)  # a process that has just finished has renamed it
        if not alone:
            raise PyGPTError(f"{name}: another process is writing it: wait for its end")
        try:
            yield part
        finally:
            if os.fstat(part.fileno()).st_size == 0 and os.path.exists(name):  # it has no answers
                os.unlink(name)
                if not os.path.exists(path):
                    Path(record).unlink(missing_ok=True)


def compare(path: str, record: Row) -> None:
    """Raise InputError if the record of the job that began OUT is missing or differs from this record."""
    name, there = f"{path}.job.json", path if os.path.exists(path) else f"{path}.part"
    if not os.path.exists(name):
        raise InputError(f"{there}: exists without {name}: give another name, or --force to replace it")
    before = None
    with suppress(OSError, ValueError, RecursionError), open(name, "rb") as file:
        before = json.load(file)
    if not isinstance(before, dict):
        raise InputError(f"{name}: not the record of a job: give OUT another name, or --force")
    for key in dict.fromkeys([*record, *before]):
        if before.get(key) != record.get(key):
            was, now = shown(before.get(key)), shown(record.get(key))
            raise InputError(f"{path}: the job began with {key} = {was}, not {now}: give the same, or --force to begin again")


main = command(build_parser, run)
