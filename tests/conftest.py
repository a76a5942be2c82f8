"""Settings for all tests, and the duration of slow tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from budget import Budget
from programs import Files

from pygpt import cpus

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes start faster from compiled modules
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would its children
SECONDS = 120.0  # of all slow tests together
GRACE_S = 600.0  # beyond its share, after which a slow test is a hang


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of slow tests."""
    parser.addoption("--seconds", type=float, default=SECONDS, help="slow tests share so many seconds (default 120)")
    parser.addoption("--seed", type=int, default=1, help="of the random choices in slow tests (default 1)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let slow tests take their share of --seconds."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(config.getoption("--seconds") + GRACE_S))


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.slow)])
def budget(request: pytest.FixtureRequest) -> Budget:
    """The time of a test that has a short and a long form. Slow tests share --seconds."""
    slow = sum(1 for item in request.session.items if item.get_closest_marker("slow"))
    seconds = request.config.getoption("--seconds") / slow if request.param == "long" else 0.0
    return Budget(seconds, request.config.getoption("--seed"))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Models, text and tokens for programs to work on."""
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def _every_worker_works() -> Iterator[None]:
    """The shapes of tests are tiny, and a step that small would run on one worker. Here every step uses all workers."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cpus, "workers_for", lambda threads, *_: threads)
    patch.setattr(cpus, "runnable", lambda: cpus.MAX_THREADS)
    yield
    patch.undo()
