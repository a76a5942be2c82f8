"""Work for many threads at once, with results that are known."""

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable


def in_threads(work: Callable[[int], None], arguments: Iterable[int]) -> None:
    """Call work(argument) in one thread for each argument, and wait for all."""
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Jobs:
    """Jobs that any thread does at any time. `wrong` collects failures, `done` counts checks by the job's name."""

    jobs: list[Callable[[random.Random], None]]

    def __init__(self) -> None:
        self.wrong, self.done = list[str](), Counter[str]()

    def check(self, right: object, *detail: object) -> None:
        """Note what is wrong in the calling job."""
        name = sys._getframe(1).f_code.co_name
        self.done[name] += 1
        if not right:
            self.wrong.append(f"{name}: {detail}"[:500])

    def work(self, seed: float, over: threading.Event) -> None:
        """A thread: one job after another, at least one of each."""
        rng = random.Random(seed)
        waiting = rng.sample(self.jobs, len(self.jobs))
        while waiting or not over.is_set():
            job = waiting.pop() if waiting else rng.choice(self.jobs)
            try:
                job(rng)
            except BaseException as error:
                self.wrong.append(f"{job.__name__}: {error!r}"[:500])
