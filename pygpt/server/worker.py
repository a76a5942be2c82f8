"""The thread that steps the engines.

The thread is worker 0 of each model's pool. Models take turns, so their workers do not compete for cores.
"""

import threading
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable
from typing import Any

from .._kernels import Trace
from ..generation.engine import Event, Job
from .call import Call, Served


class Worker:
    """The thread that steps the engines. deliver(events) runs in the event loop, once for each step."""

    def __init__(self, models: list[Served], deliver: Callable[[list[Event]], object]) -> None:
        self._models, self._deliver = models, deliver
        self._wake = threading.Event()
        self._stopping = False
        self.thread = threading.Thread(target=self._serve, name="pygpt-0", daemon=True)

    def start(self, loop: AbstractEventLoop) -> None:
        """Start the thread."""
        self._loop = loop
        self.thread.start()

    def add(self, call: Call, deadline: float | None, owner: object) -> list[Job]:
        """Add the jobs of a call. Raises InputError if one of them can never fit; then none is added."""
        jobs: list[Job] = []
        try:
            for request in call.requests:
                jobs.append(call.served.engine.add(request, n=call.n, deadline=deadline, owner=owner))
        except BaseException:
            self.cancel(call.served, jobs)
            raise
        self._wake.set()
        return jobs

    def cancel(self, served: Served, jobs: list[Job]) -> None:
        """End jobs, at the latest after the step that runs now."""
        for job in jobs:
            served.engine.cancel(job)
        self._wake.set()

    def trace(self, served: Served) -> "Future[list[list[Any]]]":
        """Record the model's next step: for each worker, a list of (phase, layer, begin_us, end_us, left_us)."""
        future: Future[list[list[Any]]] = self._loop.create_future()
        served.traced.append(future)
        return future

    def stop(self) -> None:
        """End the thread after the step that runs now, and wait for it."""
        self._stopping = True
        self._wake.set()
        if self.thread.is_alive():
            self.thread.join()

    def _serve(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while not self._stopping and (busy := [served for served in self._models if served.engine.busy]):
                for served in busy:
                    self._step(served)

    def _step(self, served: Served) -> None:
        """Run one step of a model, and deliver its events. An error of the step ends the model's jobs."""
        traced, served.traced = served.traced, []
        trace = Trace(served.model.threads, 64 * served.model.config.L) if traced else None
        if trace is not None:
            served.model.record(trace)
        try:
            events = served.engine.step()
        except Exception as error:
            events = served.engine.fail(error)
        if trace is not None:
            served.model.record(None)
        try:
            self._loop.call_soon_threadsafe(self._finish, events, trace, traced)
        except RuntimeError:  # a second signal has closed the loop: nobody waits for the events
            self._stopping = True

    def _finish(self, events: list[Event], trace: Trace | None, traced: "list[Future[list[list[Any]]]]") -> None:
        """Deliver a step's events, and its trace to those who asked for it. Runs in the event loop."""
        self._deliver(events)
        for future in traced:
            if trace is not None and not future.done():
                future.set_result(_timeline(trace))


def _timeline(trace: Trace) -> list[list[Any]]:
    """Return each worker's phases with times in microseconds since the step began."""
    workers = [trace.events(ith) for ith in range(trace.nth)]
    zero = min((begin for events in workers for _, _, begin, _, _ in events), default=0)
    return [[(phase, layer, *((at - zero) / 1000 for at in times)) for phase, layer, *times in events] for events in workers]
