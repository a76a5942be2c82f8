"""Measure the parts of a fresh process's start, with the page faults of each part.

The start ends with the first token, or with the first iteration of training. The fresh process runs this module with -m."""

import json
import os
import subprocess
import sys
import time
from typing import Any

from ...errors import PyGPTError
from ..child import child_environment

Row = dict[str, Any]


def measure(path: str, job: Any, threads: int) -> list[Row]:
    """Start a fresh process for a job; return its parts: name, ns, page faults. Raises PyGPTError if it fails."""
    began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    given = {name: value for name, value in vars(job).items() if name in ("prompt", "weights", "inputs", "targets")}
    order = {"path": os.path.abspath(path), **given, "threads": threads, "began": began}
    command = [sys.executable, "-m", "pygpt.commands.profile.startup"]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise PyGPTError(f"the start-up process failed: {(done.stderr.strip().splitlines() or ['it printed no reason'])[-1]}")
    return list(json.loads(done.stdout))


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
    train = "inputs" in order
    Model: Any
    if train:
        from ...training.trainable import TrainableGPT2 as Model
    else:
        from ...model import GPT2 as Model
    part("import pygpt")
    import numpy  # noqa: F401  (a command that only prints ids does not import numpy)

    part("import numpy")
    with Model.load(order["path"], threads=order["threads"], **({} if train else {"weights": order["weights"]})) as model:
        cache = None if train else model.new_cache()
        part(f"{'read the weights' if train else 'map the model'}, start the workers")
        first = "first iteration" if train else "first prefill"
        for step, name in enumerate((f"{first}, touching its pages", "the same again, pages in memory"), 1):
            if cache is None:
                model.forward(order["inputs"], order["targets"])
                model.backward()
                model.gradient_norm()
                model.update(lr=1e-4, step=step)
            else:
                cache.truncate(0)
                model.prefill(cache, order["prompt"])
            part(name)
    json.dump(parts, sys.stdout)


if __name__ == "__main__":
    main()
