"""What every test shares."""

from collections.abc import Iterator

import pytest

from pygpt import cpus


@pytest.fixture(autouse=True, scope="session")
def _every_worker_works() -> Iterator[None]:
    """The shapes of tests are tiny, and a step that small would run on one worker. Here every step uses all workers."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cpus, "workers_for", lambda threads, *_: threads)
    yield
    patch.undo()
