"""Run the job of `pygpt profile --sample` under Linux perf, which samples the running symbol 997 times a second.

perf attaches to this process after the model is warm, so that it excludes start-up. Its control pipe starts and stops it. The
shares are of processor time, so a worker that sleeps at a barrier does not count."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ...errors import PyGPTError
from ..console import say
from .job import Job, clock

Row = dict[str, Any]
SECONDS = 2.0  # the least duration of the run, which has at least one round
PATIENCE = 20.0  # seconds to wait for perf to end

# Families of kernels, and the symbols that belong to them. The first match counts.
FAMILIES = {
    "layernorm": r"layernorm",
    "sampler": r"inverse_cdf|median|greedy",
    "encoder": r"encode",
    "update, norm": r"adamw|update|square",
    "products, attention": r"gemm|product|pack|outer|tile|dot|matmul|bias|gelu|mix|softmax|exp|scaled|attend|attention|lanes|"
    r"add_rows|entropy",
}
PHASES = {
    **dict.fromkeys(("ln1", "ln2", "lnf", "dln1", "dln2", "dlnf"), "layernorm"), "sampler": "sampler",
    **dict.fromkeys(("encoder", "dencoder"), "encoder"), **dict.fromkeys(("update", "norm"), "update, norm"),
}  # fmt: skip


class PerfAbsent(PyGPTError):
    """perf is not installed or not permitted. The message says which."""


def sampled(path: str, job: Job, report: Row) -> Row | None:
    """Run the job under perf for about two seconds; return samples, symbols, and the shares of the families of kernels.

    If perf is not installed or not permitted, print a notice and return None."""
    try:
        perf = shutil.which("perf")
        if not sys.platform.startswith("linux") or perf is None:
            raise PerfAbsent("--sample: perf is not installed here: on Linux, install the package linux-perf or linux-tools")
        opened: Any = job.open(path, report["machine"]["threads"])  # Any hides the kind of model from mypy
        with tempfile.TemporaryDirectory() as folder, opened as model:
            data = os.path.join(folder, "perf.data")
            job.warm_up(model)
            _record(perf, data, model, job)
            return {**_report(perf, data), "reported": reported(report["kernels"])}
    except PerfAbsent as error:
        say(str(error))
        return None


def _record(perf: str, data: str, model: Any, job: Job) -> None:
    """Run the job while perf records into the file `data`."""
    orders, order = os.pipe()  # perf reads each order and answers it
    answer, answers = os.pipe()
    log = Path(f"{data}.log")
    command = f"record -F 997 -D -1 --control fd:{orders},{answers} -p {os.getpid()} -o".split()
    try:
        with log.open("w") as output:
            process = subprocess.Popen([perf, *command, data], stdout=output, stderr=output, pass_fds=(orders, answers))
    finally:
        os.close(orders)
        os.close(answers)
    try:
        _order(order, answer, b"enable\n", process, log)
        until = clock() + int(SECONDS * 1e9)
        job.run(model, digest=False)
        while clock() < until:
            job.run(model, digest=False)
        _order(order, answer, b"stop\n", process, log)
        process.wait(PATIENCE)
    finally:
        os.close(order)
        os.close(answer)
        process.terminate()
        process.wait(PATIENCE)


def _order(order: int, answer: int, word: bytes, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Send perf an order and wait until perf confirms it. Raises PerfAbsent with perf's reason if perf ends instead."""
    try:
        os.write(order, word)
        answered = os.read(answer, 16)
    except BrokenPipeError:
        answered = b""
    if not answered:
        process.wait(PATIENCE)
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" :")]
        telling = [line for line in lines if re.search("denied|permi|paranoid|not supported|unknown", line, re.IGNORECASE)]
        reason = (telling or lines[-1:] or ["it printed no reason"])[0]
        raise PerfAbsent(f"--sample: perf is installed but cannot record here: {reason}")


def _report(perf: str, data: str) -> Row:
    """Parse the summary of `perf report`. Raises PerfAbsent if there are no samples."""
    command = [perf, "report", "-i", data, "--stdio", "--no-children", "-g", "none", "-t", ";", "--sort", "symbol,dso", "-n"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    symbols: list[Row] = []
    samples = 0
    for line in done.stdout.splitlines():
        share, count, symbol, binary, *_ = [*(part.strip() for part in line.split(";")), "", "", ""]
        if re.fullmatch(r"[\d.]+%", share) and count.isdigit():
            name = re.sub(r"^\[[.k]\] (__pyx_(?:p[wf]|f)_5pygpt_(?:8_kernels|9_backward)_\d*)?", "", symbol)
            symbols.append({"symbol": name, "object": os.path.basename(binary), "share": float(share[:-1]) / 100})
            samples += int(count)
    if not samples:
        raise PerfAbsent("--sample: perf recorded 0 samples: run more rounds (-r) or tokens (-n)")
    return {"samples": samples, "symbols": symbols, "families": families(symbols)}


def families(symbols: list[Row]) -> dict[str, float]:
    """Return the share of each family of kernels in all computing. Waiting and Python are excluded."""
    sums: Counter[str] = Counter()
    for row in symbols:
        family = next((name for name, pattern in FAMILIES.items() if re.search(pattern, row["symbol"])), None)
        if family and row["object"].startswith(("_kernels", "_backward")):
            sums[family] += row["share"]
    return _shares(sums)


def reported(kernels: list[Row]) -> dict[str, float]:
    """Return the shares of the same families from the report's rows, by processor time of all workers."""
    sums: Counter[str] = Counter()
    for row in kernels:
        if row["kind"] == "kernel" or row["name"] == "sampler":
            busy = sum(worker["self_ns"] for worker in row["workers"]) or row["self_ns"]
            sums[PHASES.get(row["name"], "products, attention")] += busy
    return _shares(sums)


def _shares(sums: "Counter[str]") -> dict[str, float]:
    total = sum(sums.values())
    return {name: sums[name] / total if total else 0.0 for name in FAMILIES}
