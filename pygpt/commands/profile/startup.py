"""Measure the parts of a fresh process's start, with the page faults of each part.

The start ends with the first token, or with the first iteration of training. The fresh process runs this module with -m.
"""

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from ...errors import PyGPTError
from ..child import child_environment

if TYPE_CHECKING:
    from .job import Job

Row = dict[str, Any]


def measure(path: str, job: "Job", threads: int) -> list[Row]:
    """Start a fresh process; return its parts: name, ns, minor and major page faults. Raises PyGPTError if it fails."""
    began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    given = {name: value for name, value in vars(job).items() if name in ("prompt", "weights", "inputs", "targets")}
    order = {"path": os.path.abspath(path), **given, "threads": threads, "began": began}
    command = [sys.executable, "-m", "pygpt.commands.profile.startup"]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise PyGPTError(f"the start-up process failed: {(done.stderr.strip().splitlines() or ['it printed no reason'])[-1]}")
    parts: list[Row] = json.loads(done.stdout)
    return parts


def main() -> None:
    """Run the fresh process: read the job from stdin, and write the parts to stdout as JSON."""
    import resource

    order = json.load(sys.stdin)
    parts: list[Row] = []
    before = order["began"], 0, 0

    def part(name: str) -> None:
        nonlocal before
        usage = resource.getrusage(resource.RUSAGE_SELF)
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC), usage.ru_minflt, usage.ru_majflt
        grown = [new - old for old, new in zip(before, now, strict=True)]
        parts.append({"name": name, **dict(zip(("ns", "minor", "major"), grown, strict=True))})
        before = now

    part("interpreter")
    if training := "inputs" in order:
        from ...training.trainable import TrainableGPT2
    else:
        from ...model import GPT2
    part("import pygpt")
    import numpy  # noqa: F401  (a command that only prints ids does not import numpy)

    part("import numpy")
    if training:
        with TrainableGPT2.load(order["path"], threads=order["threads"]) as network:
            part("read the weights, start the workers")
            for step, name in enumerate(("first iteration, touching its pages", "the same again, pages in memory"), 1):
                network.forward(order["inputs"], order["targets"])
                network.backward()
                network.gradient_norm()
                network.update(lr=1e-4, step=step)
                part(name)
    else:
        with GPT2.load(order["path"], threads=order["threads"], weights=order["weights"]) as model:
            cache = model.new_cache()
            part("map the model, start the workers")
            for name in "first prefill, touching its pages", "the same again, pages in memory":
                cache.truncate(0)
                model.prefill(cache, order["prompt"])
                part(name)
    json.dump(parts, sys.stdout)


if __name__ == "__main__":
    main()
