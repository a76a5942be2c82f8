"""A fresh process until its first token, or its first iteration of training, part by part, with the page faults of each. Run
as a script it is that process."""

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import Job

Row = dict[str, Any]


def measure(path: str, job: "Job", threads: int, root: str) -> list[Row]:
    """Start a process and report its parts: name, ns, minor and major page faults. `root` has pygpt if it is not installed."""
    began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    given = {name: value for name, value in vars(job).items() if name in ("prompt", "inputs", "targets")}
    order = {"path": os.path.abspath(path), **given, "threads": threads, "began": began, "root": root}
    command = [sys.executable, os.path.abspath(__file__)]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True)
    if done.returncode:
        from pygpt import PyGPTError  # not at the top: a fresh process has this file as its script

        raise PyGPTError(f"the start-up process failed: {(done.stderr.strip().splitlines() or ['it does not say why'])[-1]}")
    parts: list[Row] = json.loads(done.stdout)
    return parts


def main() -> None:
    """The fresh process."""
    import resource

    order = json.load(sys.stdin)
    sys.path[:] = [*sys.path[1:], order["root"]]  # this folder's modules are not meant to be found by their bare names
    parts: list[Row] = []
    since, minor, major = order["began"], 0, 0

    def part(name: str) -> None:
        nonlocal since, minor, major
        now, usage = time.clock_gettime_ns(time.CLOCK_MONOTONIC), resource.getrusage(resource.RUSAGE_SELF)
        parts.append({"name": name, "ns": now - since, "minor": usage.ru_minflt - minor, "major": usage.ru_majflt - major})
        since, minor, major = now, usage.ru_minflt, usage.ru_majflt

    part("interpreter")
    if training := "inputs" in order:
        from pygpt import TrainableGPT2
    else:
        from pygpt import GPT2

    part("import pygpt")
    import numpy  # noqa: F401  (what a command that prints ids does without)

    part("import numpy")
    if training:
        with TrainableGPT2.load(order["path"], threads=order["threads"]) as network:
            part("read the weights, start the workers")
            for step, name in enumerate(("first iteration, first touch of pages", "the same again, pages there"), 1):
                network.forward(order["inputs"], order["targets"])
                network.backward()
                network.gradient_norm()
                network.update(lr=1e-4, step=step)
                part(name)
    else:
        with GPT2.load(order["path"], threads=order["threads"]) as model:
            cache = model.new_cache()
            part("map the model, start the workers")
            model.prefill(cache, order["prompt"])
            part("first prefill, first touch of pages")
            cache.truncate(0)
            model.prefill(cache, order["prompt"])
            part("the same again, pages there")
    json.dump(parts, sys.stdout)


if __name__ == "__main__":
    main()
