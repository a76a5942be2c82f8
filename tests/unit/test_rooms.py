"""Imports of the package go only downwards, also imports for types and lazy imports. Circles are refused."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "pygpt"

# From the lowest level up. A module may import from its own level and from those below.
LEVELS = (
    ("errors", "config", "cpus", "_signals", "tokenizer"),
    ("_kernels", "_backward", "_reference", "pool"),
    ("formats",),
    ("network", "activations"),
    ("hub",),
    ("generation",),
    ("model",),
    ("training", "reference", "ceilings"),
    ("inspection",),
    ("server",),
    ("cluster",),
    ("commands",),
    ("__init__", "__main__"),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Arrows upwards that are still there: remove each from this list once it is gone.


def name_of(path: Path) -> str:
    """A source file's module: pygpt/formats/files.py is formats.files, pygpt/formats/__init__.py is formats."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [path for suffix in ("py", "pyi", "pyx", "pxd") for path in sorted(ROOT.rglob(f"*.{suffix}"))]
MODULES = {name_of(path) for path in SOURCES}


def statements(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Every import in a source file: how many dots, the module, the names that come from it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".pyx", ".pxd"):
        for dots, module in re.findall(r"^\s*from (\.*)([\w.]*) c?import", text, re.MULTILINE):
            yield len(dots), module, [""]
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name, [""]) for alias in node.names)


def imports_of(path: Path) -> set[str]:
    """The package's modules that a source file imports, anywhere in it. The package itself is `__init__`."""
    folder, targets = path.relative_to(ROOT).parent.parts, set()
    for level, module, names in statements(path):
        if level or module.partition(".")[0] == "pygpt":
            base = [*folder[: len(folder) + 1 - level], *filter(None, [module])] if level else module.split(".")[1:]
            for name in names:
                inner = ".".join([*base, name]).strip(".")
                targets.add(inner if inner in MODULES else ".".join(base) or "__init__" * (name != "__version__"))
    return targets - {""}


def arrows() -> dict[str, set[str]]:
    """Every module, and the modules that it imports."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for path in SOURCES:
        graph[name_of(path)] |= imports_of(path) - {name_of(path)}
    return graph


def level_of(module: str) -> int:
    return LEVEL_OF[module.partition(".")[0]]


def upwards() -> set[str]:
    return {
        f"{module} -> {other}" for module, others in arrows().items() for other in others if level_of(other) > level_of(module)
    }


def test_every_module_has_a_level() -> None:
    assert {module.partition(".")[0] for module in MODULES} - LEVEL_OF.keys() == set()


def test_every_import_is_of_a_module_that_exists() -> None:
    assert {target for targets in arrows().values() for target in targets} - MODULES == set()


def test_imports_go_downwards() -> None:
    assert upwards() == set()


def test_imports_have_no_circle() -> None:
    graph = arrows()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("name", "text", "imported"),
    [
        ("a.py", "def f():\n    from .formats import files\n    import pygpt.pool\n    import os", "formats.files pool"),
        ("hub/a.py", "from .. import __version__, errors\nfrom . import find", "errors hub.find"),
        ("hub/a.py", "from ..commands.console import say\nfrom .. import GPT2", "commands.console __init__"),
        (
            "commands/bench/a.py",
            "if TYPE_CHECKING:\n    from ...model import x\n    from ..child import y",
            "model commands.child",
        ),
        ("_a.pyx", "from ._kernels cimport a\nfrom pygpt.errors import b\nfrom libc.math cimport sqrt", "_kernels errors"),
    ],
)
def test_imports_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str, imported: str) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert imports_of(path) == {*imported.split()}
