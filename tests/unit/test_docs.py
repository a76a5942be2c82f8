"""README, docs/ and examples/ are true: commands run, links lead somewhere, generated parts and pictures match the sources."""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import execute

import pygpt
from pygpt.commands import COMMANDS, chat, complete

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
import pictures  # noqa: E402
import write_docs  # noqa: E402

README = ROOT / "README.md"
LOG = ROOT / "docs" / "benchmarks.md"  # a dated log, with the commands and sentences of its days
PAGES = [README, *sorted(page for page in (ROOT / "docs").rglob("*.md") if page != LOG)]

# Commands that are not run here, by their beginnings, and why.
ELSEWHERE = {
    "python -m pip install": "installs: .ci/run does",
    "python -m pytest": "runs this test",
    "python setup.py": "compiles: tools/check does",
    "pygpt download": "needs a network: tests/commands/test_download.py brings one",
    "pygpt eval hellaswag": "needs llm.c's file of examples: tests/commands/test_eval.py makes one",
    "mpiexec -n": "starts ranks: tests/commands/test_train_ranks.py does",
    "tools/check": "runs all checks, this test among them",
    "python tools/write_docs.py": "writes into this checkout; the same functions are called here",
    "python tools/pictures.py": "the same",
    "FLOAT8 = Format(": "a part of a file, which tests/bits/test_neon.py tries",
}
# Replacements that make a command short enough for a test.
SHORTER = {
    "pygpt train --data": "pygpt train --val-batches 1 --sample-every 0 --data",
    "--estimate --shape gpt2 ": "--estimate --shape L=1,NH=1,C=16,maxT=64 ",
    "--steps 200": "--steps 2",
    "--steps 1000": "--steps 2",
    "--warmup 50": "--warmup 1",
    "-B 8 -T 128": "-B 2 -T 16",
    "-n 2000": "-n 300",
    "range(1, 2001)": "range(1, 3)",
    "pygpt bench -m gpt2": "pygpt bench -m gpt2 --rounds 1 --prompts 64 --limit-megabytes 8 --no-memory",
    "pygpt profile": "pygpt profile --rounds 1 --skip all",
}
# Questions of people who see the project for the first time, and the page and words that answer them.
QUESTIONS = {
    "How do I run my own checkpoint?": ("docs/guides/models.md", "Run your own checkpoint"),
    "Why do I get other text than in transformers?": ("docs/guides/sampling.md", "Why the text differs from transformers"),
    "How do I use it from my web app?": ("docs/guides/embedding-in-an-application.md", "agenerate()"),
    "How fast is it on my machine?": ("docs/explanation/performance.md", "Measure your machine"),
    "How do I train on several machines?": ("docs/guides/many-machines.md", "mpiexec -hosts"),
    "How do I add a kernel?": ("docs/contributing.md", "Add a kernel"),
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """A page's code blocks: language, code, and the output that it promises (a text block right below), or ""."""
    return re.findall(r"^```(sh|python)\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", page.read_text(), re.MULTILINE | re.DOTALL)


def written(page: Path) -> str:
    """A page without its generated parts."""
    return re.sub(r"<!-- generated: (\w+) -->.*?<!-- end: \1 -->", "\n", page.read_text(), flags=re.DOTALL)


def prose(page: Path) -> str:
    """A page without code blocks, tables, headings, generated parts and the targets of links."""
    text = re.sub(r"^```.*?^```|^[|#<].*?$", "\n", written(page), flags=re.M | re.S)
    return re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files by the names that the pages give to large ones."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "my.txt").write_text("Once upon a time there was a king, and he had a daughter.\n\n" * 1500)
    with pygpt.TrainableGPT2.random(pygpt.Config(L=1, NH=2, C=32, V=50257, maxT=128), seed=1, threads=1) as engine:
        engine.save(folder / "checkpoint.bin")
    (folder / "home").mkdir()
    shutil.copy(folder / "checkpoint.bin", folder / "home" / "gpt2.bin")
    for name in "pygpt", "tools", "examples", "chat.py":
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def place(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them as the current folder, and an environment as a reader has it."""
    folder = tmp_path / "place"
    shutil.copytree(stand_ins, folder, symlinks=True)
    for name in [name for name in os.environ if name.startswith("PYGPT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYGPT_HOME", "home")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    return folder


def shell(script: str) -> str:
    """Run a script in the current folder; return its standard output."""
    done = execute(["sh", "-ec", script])
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), f"{script}\n{done.stderr}"
    return done.stdout


def python(code: str) -> str:
    """Run an example in this process; return its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    return output.getvalue()


def runnable(code: str) -> str:
    """The commands of a block that run here, made short."""
    for old, new in SHORTER.items():
        code = code.replace(old, new)
    lines = code.replace("\\\n", "").replace(" && ", "\n").splitlines()
    return "\n".join(line for line in lines if not line.startswith(tuple(ELSEWHERE)))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_blocks_run_as_written(page: Path, place: Path) -> None:
    """In order, in one folder: a later block may use what an earlier one made."""
    for language, code, output in blocks(page):
        found = (shell if language == "sh" else python)(runnable(code))
        if output:
            assert found.rstrip() == output.rstrip(), code


def test_inline_commands_exist() -> None:
    for page in PAGES:
        for command in re.findall(r"`(?:python -m )?pygpt ([a-z]+)\b", prose(page)):
            assert command in COMMANDS, (name_of(page), command)


def test_exceptions_are_still_needed() -> None:
    code = "\n".join(code for page in PAGES for _, code, _ in blocks(page)).replace(" && ", "\n")
    for beginning in ELSEWHERE:
        assert re.search(rf"^{re.escape(beginning)}", code, re.MULTILINE), beginning
    for part in SHORTER:
        assert part in code, part


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda example: example.stem)
def test_examples(example: Path, place: Path) -> None:
    arguments = " 2 tiny.bin" if example.stem == "train_tiny" else ""
    assert (output := shell(f"python -W error examples/{example.name}{arguments}")).split()
    if example.stem == "gpt2_numpy":
        assert output == shell("pygpt --sampler greedy 31373 612")
    assert sum(bool(line.strip()) for line in example.read_text().splitlines()) < 60
    assert any(f"examples/{example.name}" in page.read_text() for page in PAGES)


def test_examples_of_the_help_run(place: Path) -> None:
    commands = [
        line.split("  ")[1].strip() for line in complete.EXAMPLES.splitlines() if re.match(r"  (python|pygpt|echo)", line)
    ]
    assert len(commands) >= 6
    for command in commands:
        assert re.fullmatch(r"[\d\s]+", shell(command.replace("-m gpt2_124M.bin", "-m checkpoint.bin"))), command


def test_readme_is_short_and_begins_with_the_commands_that_ci_runs() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) < 150
    assert sum(line.startswith("|---") for line in lines) == 1
    first, second = (code.strip() for _, code, _ in blocks(README)[:2])
    assert first == "python -m pip install -e '.[all]' && python -m pygpt 31373 612"
    assert second == "python -m pip install -e '.[test]' && python -m pytest -n 3 --dist worksteal"
    assert "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci/run").read_text()
    assert next(line for line in lines if "python -m pytest" in line) == second
    assert re.search(r"^all = ", (ROOT / "pyproject.toml").read_text(), re.M)


@pytest.mark.parametrize("page", write_docs.PARTS)
def test_generated_parts_match_their_sources(page: str) -> None:
    assert write_docs.filled(page) == (ROOT / page).read_text(), "run python tools/write_docs.py"


def test_claims_of_speed_are_those_of_the_log() -> None:
    log = LOG.read_text()

    def row(table: str, name: str) -> list[float]:
        """The numbers at the beginnings of a row's cells, of the newest table whose head begins with `table`."""
        [cells] = re.findall(rf"^\| {name} \|(.*)\|$", log[log.index(f"| {table} |") :].split("\n\n")[0], re.M)
        return [float(re.match(r"[\d.]+", cell.strip().replace(",", ""))[0]) for cell in cells.split("|")]  # type: ignore[index]

    plain = row("weights | pp512", "float32")
    for name, table in (("q8_0", "q8_0"), ("q4_0", "q4_0, head q8_0")):
        early, late = (row("weights | pp512", table)[i] / plain[i] for i in (1, 2))
        claim = rf"`{name}`( decodes | is |, and | )?{late:.1f} to {early:.1f}\s+times"
        for page in README, ROOT / "docs/explanation/performance.md":
            assert re.search(claim, page.read_text()), (page, claim)
    fastest, slowest = (row("rule", name)[0] for name in ("greedy", "median rule"))
    assert f"{slowest:g} to {fastest:g} times as fast" in README.read_text()
    rates = [write_docs.measured(name)[1:] for name in ("float32", "bfloat16")]
    one, two = (next(t["tokens_per_s"] for t in tests if (t["test"], t["by"]) == ("tg64@d8", "pygpt")) for tests in rates)
    assert round(two / one) == 2
    assert "bfloat16 weights decode twice as fast" in README.read_text()


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_match_their_sources(name: str) -> None:
    drawn = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text()
    assert pictures.PICTURES[name]() == drawn, "run python tools/pictures.py"


def test_generated_lists_are_complete() -> None:
    assert chat.HELP in (ROOT / "docs/guides/chat.md").read_text()
    sources = "".join(path.read_text() for path in [*(ROOT / "pygpt").rglob("*.py"), *(ROOT / "pygpt").glob("*.pyx")])
    named = re.findall(r"`(PYGPT_[A-Z]+)`", (ROOT / "docs/reference/variables.md").read_text())
    assert set(re.findall(r"PYGPT_[A-Z]+\b", sources)) == set(named)
    architecture = (ROOT / "docs/explanation/architecture.md").read_text()
    for room in (ROOT / "pygpt").iterdir():
        assert f"`{room.name}/`" in architecture or not room.is_dir() or room.name == "__pycache__", room
    errors = re.findall(r"^\| `(\w+)`", (ROOT / "docs/reference/errors.md").read_text(), re.MULTILINE)
    assert set(errors) == {name for name in pygpt.__all__ if name.endswith("Error")}


def test_files_and_tests_that_are_named_exist() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        text = re.sub(r"^\| `python tools/.*?$", "", written(page), flags=re.M)  # old names, in a table of the new ones
        for name in re.findall(r"(?<![\w/.])(?:tools|tests|pygpt|examples|docs|\.ci)/[\w./-]*\w", text):
            assert (ROOT / name).exists(), (name_of(page), name)
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, (name_of(page), name)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page links to, each with its anchor."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", [*PAGES, LOG], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor


def test_every_page_and_every_answer_is_two_clicks_away() -> None:
    near = {path for path, _ in links(README)}
    within_two = near | {path for page in near if page.suffix == ".md" for path, _ in links(page)}
    assert [name_of(page) for page in [*PAGES, LOG] if page not in within_two | {README}] == []
    for question, (page, words) in QUESTIONS.items():
        assert ROOT / page in within_two, question
        assert words in (ROOT / page).read_text(), question


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", prose(page)):
        for sentence in re.split(r"(?<=[.!?])[*\")]*\s+", " ".join(paragraph.split())):
            assert len(sentence.split()) <= 30, sentence
