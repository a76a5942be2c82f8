"""What every test shares."""

from collections.abc import Iterator

import pytest

from pygpt import model


@pytest.fixture(autouse=True, scope="session")
def _every_worker_works() -> Iterator[None]:
    """The shapes of tests are tiny, and a step that small would run on one worker: here every step uses all of them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(model, "MEETING_WEIGHT", 0)
    yield
    patch.undo()
