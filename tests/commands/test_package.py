"""Test the published packages.

The sdist contains all files that a build needs, and no product of a build. A wheel built from it works in an empty environment
without a compiler, and contains its types, data and licences. The tests need setuptools and Cython (the `dev` extra). The tests
of types need mypy."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy
import pytest
from running import ROOT, execute

import pygpt
from pygpt.commands import COMMANDS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTENSIONS = sorted(path.stem for path in (ROOT / "pygpt").glob("*.pyx"))
METADATA = {"PKG-INFO", "setup.cfg"}  # files that an sdist has in addition to sources
HELLO = ("-m", "pygpt", "31373", "612")


def installed(name: str, oldest: tuple[int, ...] = (0,)) -> bool:
    """Return whether a distribution is installed and recent enough for a build."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(number) for number in re.findall(r"\d+", version)) >= oldest


builds = pytest.mark.skipif(
    not (installed("setuptools", (77,)) and installed("cython", (3, 1)) and installed("pip", (22, 3))),
    reason="needs setuptools>=77, cython>=3.1 and pip>=22.3",
)
pytestmark = pytest.mark.slow  # builds the package twice: .ci/run does it
types = pytest.mark.skipif(not installed("mypy"), reason="needs mypy")


def is_made(path: str) -> bool:
    """Return whether a build, a test or a tool made this file."""
    return bool(
        re.search(r"(^|/)(__pycache__|\.\w+_cache|\.hypothesis|build|dist|\w+\.egg-info)/|\.(so|pyc)$|^pygpt/_\w+\.c$", path)
    )


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command without PYGPT_* and PYTHON* in its environment; return its stdout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYGPT_", "PYTHON"))}
    done = execute(command, cwd=cwd, env={**kept, **environment}, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Build, as `python -m build` does: an sdist from the tree, a wheel from the sdist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("package")


def sources() -> list[str]:
    """Return the project's files: those that git tracks, or in an unpacked sdist all except products of a build."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
        return [name for name in names if (ROOT / name).is_file() and name != ".gitignore"]
    names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    return [name for name in names if not is_made(name) and name not in METADATA]


@pytest.fixture(scope="module")
def tree(folder: Path) -> Path:
    """A copy of the project's folder with the leftovers of earlier work."""
    copy = folder / "tree"
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for dirt in ("pygpt/_kernels.c", "pygpt/_kernels.cpython-311.so", "tests/__pycache__/x.pyc", "build/lib/pygpt/x.py"):
        (copy / dirt).parent.mkdir(parents=True, exist_ok=True)
        (copy / dirt).write_bytes(b"")
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, folder: Path) -> Path:
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", hook, cwd=tree)
    return folder / f"pygpt-{pygpt.__version__}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist: Path, folder: Path) -> Path:
    out = folder / "wheel"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(sdist), cwd=folder)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def empty(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment that has only the wheel, without pip."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"), cwd=folder)
    python = folder / "venv" / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", f"--python={python}", "install", *options, str(wheel), cwd=folder)
    return python


def metadata(folder: Path) -> Message:
    return Parser().parsestr(next(folder.glob("*.dist-info/METADATA")).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Contents


@builds
@pytest.mark.timeout(900)
def test_the_sdist_has_only_sources(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    files = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert any(is_made(name) for name in files)
    wanted = {name for name in files if not is_made(name)}
    assert {"pygpt/csrc/micro_body.h", "pygpt/_kernels.pxd", "pygpt/py.typed", "tools/check", "tests/running.py"} <= wanted
    assert wanted - names == set()
    assert {name for name in names - wanted if not name.startswith("pygpt.egg-info/")} == METADATA


@builds
@pytest.mark.timeout(900)
def test_the_wheel_has_only_what_runs(unpacked: Path) -> None:
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    files = [*(ROOT / "pygpt").rglob("*.py*"), ROOT / "pygpt" / "py.typed"]
    files += [path for folder in ("data", "server/page") for path in (ROOT / "pygpt" / folder).iterdir()]
    package = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".pyc", ".pyx")}
    package |= {f"pygpt/{module}{suffix}" for module in EXTENSIONS}
    info = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    info |= {"licenses/pygpt/data/LICENSE-vocab.txt"}
    assert names == package | {f"pygpt-{pygpt.__version__}.dist-info/{name}" for name in info}


@builds
@pytest.mark.timeout(900)
def test_the_wheel_says_what_it_is(unpacked: Path, wheel: Path) -> None:
    fields = metadata(unpacked)
    assert (fields["Name"], fields["Version"], fields["License-Expression"]) == ("pygpt", pygpt.__version__, "MIT")
    assert fields["Requires-Python"] == PROJECT["project"]["requires-python"]
    needed = [need for need in fields.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert [re.match(r"\w+", need)[0] for need in needed] == ["numpy", "tiktoken"]  # type: ignore[index]
    assert fields.get_all("License-File") == PROJECT["project"]["license-files"]
    assert not wheel.name.endswith("any.whl")


@builds
@pytest.mark.timeout(900)
def test_the_wheel_has_every_instruction_set(unpacked: Path) -> None:
    sets = {"x86_64": (b"baseline", b"avx2", b"avx512"), "aarch64": (b"baseline", b"neon"), "arm64": (b"baseline", b"neon")}
    code = next((unpacked / "pygpt").glob("_kernels.*.so")).read_bytes()
    for name in sets.get(platform.machine(), (b"baseline",)):
        assert name + b"\0" in code, name


# ---------------------------------------------------------------------------------------------------------------------
# Use


@builds
@pytest.mark.timeout(900)
def test_the_wheel_works_in_an_empty_environment(empty: Path, folder: Path) -> None:
    """The command runs without NumPy, tiktoken and a compiler, with every instruction set."""
    bare = {"PATH": str(empty.parent)}
    assert run("python", "-c", "import sys; print(*sys.path[1:], sep='\\n')", cwd=folder, **bare).count("site-packages") == 1
    assert Path(run("python", "-c", "import pygpt; print(pygpt.__file__)", cwd=folder, **bare)).is_relative_to(folder)
    ids = run("python", *HELLO, cwd=folder, **bare)
    assert len(ids.split()) == 8
    assert run("pygpt", *HELLO[2:], cwd=folder, **bare) == ids
    available = run("python", "-c", "import pygpt; print(*pygpt.cpu_info()['available'])", cwd=folder, **bare).split()
    assert available == pygpt.cpu_info()["available"]
    assert available[-1] == "baseline"
    for isa in available:
        assert run("python", *HELLO, cwd=folder, PYGPT_ISA=isa, **bare) == ids
    for missing in ("numpy", "tiktoken"):
        with pytest.raises(AssertionError, match=f"No module named '{missing}'"):
            run("python", "-c", f"import {missing}", cwd=folder, **bare)


@pytest.fixture(scope="module")
def furnished(empty: Path, folder: Path) -> Path:
    """The same interpreter with this environment's packages, such as NumPy, tiktoken and pytest."""
    places = sorted({str(Path(module.__file__ or "").parent.parent) for module in (numpy, pytest)})
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "more.pth").write_text("\n".join(places) + "\n")
    return empty


TEXT = "Once upon a time there was a king, and he had a daughter.\n" * 9
SMALL = "--shape L=1,NH=1,C=8,maxT=16 -B 2 -T 8 -t 1 --steps 2"
TINY = "-t 1 -r 1 -n 2 -o json"
RUNS = {  # the arguments of each command, in this order; {} is the output of the command
    "chat": "-n 4 Ladies and",
    "shards": "my.txt -o my",
    "train": f"--data my_train.bin {SMALL} --out mine.bin",
    "convert": "mine.bin small.bin",
    "quantize": "small.bin small.safetensors --format q8_0",
    "eval": "perplexity my.txt -m small.bin -n 20 -o json",
    "batch": "in.jsonl -o out.jsonl -m small.bin",
    "look": "Good-morrow -m small.bin -o json",
    "profile": f"-m small.bin --skip ceilings,scaling,strategies {TINY}",
    "bench": f"-m small.bin -p 4 -d 2 -b 1 --limit-megabytes 4 --reference --against numpy {TINY}",
}


@builds
@pytest.mark.timeout(900)
def test_every_command_runs_from_the_wheel(furnished: Path, folder: Path) -> None:
    """The commands run in a folder that contains only a text. Child processes find the wheel too."""
    place = folder / "work"
    place.mkdir()
    (place / "my.txt").write_text(TEXT)
    (place / "in.jsonl").write_text('{"id": "a", "tokens": [1, 2], "max_new_tokens": 3}\n')
    bare = {"PATH": str(furnished.parent)}
    out = {name: run("pygpt", name, *words.split(), cwd=place, **bare) for name, words in RUNS.items()}
    assert RUNS.keys() == COMMANDS.keys() - {"download", "serve"}
    assert len(out["chat"].split()) > 0
    assert re.findall(r"^step (\d): train loss", out["train"], re.MULTILINE) == ["0", "1"]
    assert {"my_train.bin", "mine.bin", "mine.state", "small.bin", "small.safetensors"} <= {
        path.name for path in place.iterdir()
    }
    assert json.loads(out["eval"])["scored"] == 19
    assert len(json.loads((place / "out.jsonl").read_text())["tokens"]) == 3
    assert len(json.loads(out["look"])["lens"]) == 2  # the embedding and one layer
    assert [part["name"].split()[0] for part in json.loads(out["profile"])["startup"]][:2] == ["interpreter", "import"]
    tests = {(row["test"], row.get("by")) for row in json.loads(out["bench"])}
    assert {("pp4", "pygpt"), ("tg2@d2", "numpy"), ("process", "reference")} <= tests
    assert json.loads(out["bench"])[0]["commit"] == ""
    for name in ("download", "serve"):
        assert f"pygpt {name}" in run("pygpt", name, "--help", cwd=place, **bare)


@builds
@pytest.mark.timeout(900)
def test_the_wheel_passes_recorded_tests(furnished: Path, folder: Path) -> None:
    place = run(str(furnished), "-c", "import pygpt; print(pygpt.__file__)", cwd=folder)
    assert Path(place).is_relative_to(folder)
    tests = str(next((ROOT / "tests").rglob("test_kernels.py")))
    out = run(str(furnished), "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "recorded_bits", cwd=folder)
    assert re.search(r"\d+ passed", out)
    assert "failed" not in out


@builds
@types
@pytest.mark.timeout(900)
def test_types_reach_the_user(furnished: Path, folder: Path) -> None:
    """mypy --strict accepts the README's examples, and every public name has a type other than Any."""
    readme = (ROOT / "README.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    names = [f"reveal_type(pygpt.{name})" for name in pygpt.__all__]
    scripts = [*examples, "\n".join(["import pygpt", *names])]
    paths = []
    for i, script in enumerate(scripts):
        paths.append(str(folder / f"user{i}.py"))
        Path(paths[-1]).write_text(script)
    (folder / "mypy.ini").write_text("[mypy]\nscript_files=\n")
    command = [
        "-m",
        "mypy",
        "--strict",
        f"--python-executable={furnished}",
        "--cache-dir",
        str(folder / "cache"),
        "--config-file=",
    ]
    out = run(sys.executable, *command, *paths, cwd=folder)
    revealed = re.findall(r'note: Revealed type is "(.*)"', out)
    assert len(revealed) == len(names)
    assert "Any" not in revealed


# Allowed messages of stubtest. A stub declares only names that others use, and has its own names for types. The arguments of
# Cython's __cinit__ cannot be inspected. A __buffer__ is visible since Python 3.12.
ALLOWED = r"""
pygpt\.\w+\.\w+ is not present in stub
pygpt\.\w+\.\w+\.__(setstate|reduce)_cython__ is not present in stub
pygpt\.\w+\.(Array|Bytes|Ids|Logits) is not present at runtime
pygpt\.\w+\.\w+\.__init__ is inconsistent, runtime does not have parameter
pygpt\._kernels\.Floats\.__buffer__ is not present at runtime
"""


@types
def test_stubs_say_what_is_compiled(tmp_path: Path) -> None:
    """Each .pyi agrees with its module in names, arguments and kinds."""
    (tmp_path / "mypy.ini").write_text("[mypy]\nignore_missing_imports = true\n")  # of the extras
    command = [sys.executable, "-m", "mypy.stubtest", "--concise", "--ignore-disjoint-bases", "--mypy-config-file", "mypy.ini"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = execute([*command, "pygpt"], cwd=tmp_path, env=environment)
    allowed = [line for line in ALLOWED.split("\n") if line]
    lines = [line for line in done.stdout.splitlines() if line.startswith(tuple(f"pygpt.{module}" for module in EXTENSIONS))]
    assert len(lines) > 5, done.stdout + done.stderr
    assert [line for line in lines if not any(re.match(pattern, line) for pattern in allowed)] == []


def test_every_compiled_module_has_types() -> None:
    assert EXTENSIONS
    for module in EXTENSIONS:
        assert (ROOT / "pygpt" / f"{module}.pyi").exists(), module


# ---------------------------------------------------------------------------------------------------------------------
# Promises of the metadata


def test_the_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] in ("Unreleased", pygpt.__version__)
    assert pygpt.__version__ in versions
    assert re.fullmatch(r"\d+\.\d+\.\d+", pygpt.__version__)


def test_the_lock_has_everything_for_development() -> None:
    def named(needs: Sequence[str]) -> Iterator[str]:
        for need in needs:
            if extras := re.fullmatch(r"pygpt\[(.+)\]", need):
                for extra in extras[1].split(","):
                    yield from named(PROJECT["project"]["optional-dependencies"][extra])
            else:
                yield need

    lines = (ROOT / "requirements-dev.lock").read_text().lower().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    for need in named([*PROJECT["project"]["dependencies"], "pygpt[dev]"]):
        name, relation, version = re.match(r"([\w.-]+)(==|>=)([\d.]+)", need).groups()  # type: ignore[union-attr]
        have = [int(number) for number in re.findall(r"\d+", locked[name.lower()])]
        want = [int(number) for number in version.split(".")]
        assert have == want if relation == "==" else have >= want, need
