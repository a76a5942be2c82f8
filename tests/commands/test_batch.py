"""Test pygpt batch and pygpt.cluster: the same bytes for any batch, shard and restart; scores; records; failures."""

import fcntl
import gzip
import json
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from known import PROMPTS, SHAPE, make_model
from limits import full_disk
from programs import command, run, start
from running import assert_refuses, assert_refuses_and_keeps

from pygpt import GPT2, Complete, InputError, PyGPTError
from pygpt.commands.batch import main
from pygpt.commands.convert import main as convert

OPTIONS = ["-t", "1", "--max-new-tokens", "6", "--temp", "0.9", "--seed", "7"]
ROWS: list[dict[str, Any]] = [
    *({"id": f"r{i}", "tokens": [i, 5, 9 * i % SHAPE.V]} for i in range(9)),
    {"id": 70, "tokens": PROMPTS[1], "sampler": "greedy"},
    {"tokens": PROMPTS[0], "seed": 3, "top_k": 9},
    {"id": "two", "tokens": PROMPTS[4], "continuations": [[3, 4], [5]]},
    {"id": "long", "tokens": [1, 2], "max_new_tokens": 40, "temperature": 1.5},
    {"id": "b", "tokens": [6], "logit_bias": {"77": 50.0}, "max_new_tokens": 2},
    {"id": "\ud800", "tokens": [8], "stop_token_ids": [*range(0, SHAPE.V, 3)], "total": 30},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("batch") / "model.bin", sharp=9)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYGPT_MODEL", model)
    write(ROWS)
    return tmp_path


def write(rows: list[Any], name: str = "in.jsonl") -> None:
    Path(name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")


def answers(*options: str, out: str = "out.jsonl") -> bytes:
    assert main(["in.jsonl", "-o", out, *OPTIONS, *options]) == 0
    return Path(out).read_bytes()


refused = partial(assert_refuses_and_keeps, main)


def test_answers_are_those_of_generate_batch_with_the_seeds_of_the_ids(folder: Path, model: str) -> None:
    found = [json.loads(line) for line in answers().splitlines()]
    assert [row["id"] for row in found] == [row.get("id", i) for i, row in enumerate(ROWS, 1)]
    with GPT2.load(model, threads=1) as gpt, Complete(model, threads=1, seed=7) as job:
        for row, answer in zip(ROWS, found, strict=True):
            if "continuations" in row:
                continue
            own = {name: value for name, value in row.items() if name not in ("id", "tokens")}
            own |= {"logit_bias": {77: 50.0}} if "logit_bias" in own else {}
            length = {} if "total" in own else {"max_new_tokens": 6}
            drawn = {} if "sampler" in own else {"temperature": 0.9, "seed": job.seed_of(answer["id"])}
            (expected,) = gpt.generate_batch([row["tokens"]], **{**length, **drawn, **own})
            assert (answer["tokens"], answer["finish_reason"]) == (expected.tokens, expected.finish_reason)
    assert job.seed_of("r0") == int.from_bytes(bytes.fromhex("79d6a82f615c5615"), "little")  # sha256sum of 7/r0
    assert {row.get("finish_reason") for row in found} == {"length", "stop", None}


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("options", [["--batch-size", "1"], ["--batch-size", "3", "-t", "2"]])
def test_shards_together_are_the_whole(folder: Path, count: int, options: list[str]) -> None:
    whole = answers(out="whole.jsonl")
    parts = [answers("--shard", f"{i}/{count}", *options, out=f"{i}.jsonl") for i in range(count)]
    assert b"".join(parts) == whole


@given(cut=st.integers(0, 2000), tail=st.binary(max_size=8))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(cut=100, tail=b"x" * 100_000)  # more than the answers that follow
def test_a_job_continues_from_every_part(folder: Path, cut: int, tail: bytes) -> None:
    whole = answers("--force")
    os.rename("out.jsonl", "out.jsonl.part")
    Path("out.jsonl.part").write_bytes(whole[: cut % (len(whole) + 1)] + tail)
    assert answers() == whole
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.job.json"]


def test_a_job_keeps_only_answers_in_their_places(folder: Path) -> None:
    whole = answers()
    os.rename("out.jsonl", "out.jsonl.part")
    Path("out.jsonl.part").write_bytes(b"".join(whole.splitlines(keepends=True)[::-1]))
    assert answers() == whole


def test_force_keeps_nothing(folder: Path) -> None:
    wanted = answers("--temp", "0.2", out="other.jsonl")
    answers()
    os.rename("out.jsonl", "out.jsonl.part")
    assert answers("--temp", "0.2", "--force") == wanted


@pytest.mark.parametrize("source", ["out.jsonl", "out.jsonl.job.json", "linked.jsonl"])
def test_force_never_deletes_the_input(folder: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    Path("in.jsonl").rename(source.replace("linked", "out"))
    if source == "linked.jsonl":
        Path(source).symlink_to("out.jsonl")
    refused(capsys, [source, "-o", "out.jsonl", "--force"], f"{source}: this file is IN")


def test_force_keeps_the_old_answers_until_the_lines_are_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers()
    write(["not JSON"], "bad.jsonl")
    refused(capsys, ["bad.jsonl", "-o", "out.jsonl", "--force"], "bad.jsonl: line 1")


def test_a_number_and_its_text_are_one_id(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write([{"id": 1, "tokens": [1]}, {"id": "1", "tokens": [2]}])
    assert_refuses(main, capsys, ["in.jsonl", "-o", "out.jsonl", *OPTIONS], "line 2", "'1'")


def test_a_prompt_that_begins_the_one_before_it(model: str) -> None:
    rows = [{"id": len(tokens), "tokens": tokens, "continuations": [[5, 6]]} for tokens in ([1, 2, 3, 4], [1, 2, 3], [1])]
    with Complete(model, threads=1) as job:
        together = list(job.rows(rows))
    for row, found in zip(rows, together, strict=True):
        with Complete(model, threads=1) as job:
            assert list(job.rows([row])) == [found]


def test_a_completion_that_fails(model: str) -> None:
    row = {"id": 1, "tokens": [1], "suppress_tokens": [*range(SHAPE.V)]}
    with Complete(model, threads=1, keep_going=True) as job:
        [found] = job.rows([row])
    assert found.keys() == {"id", "error"}
    with Complete(model, threads=1) as job:
        with pytest.raises(InputError):
            list(job.rows([row]))
        for columns, words in (({"id": [1, 2], "tokens": [[3]]}, r"\[1, 2\] values"), ([row], "must be columns")):
            with pytest.raises(InputError, match=words):
                job(columns)  # type: ignore[arg-type]


def test_a_row_that_is_not_a_dict(model: str) -> None:
    rows: list[Any] = [{"id": 1, "tokens": [1]}, None, {"id": 2, "tokens": [2]}, 5, "abc"]
    with Complete(model, threads=1, keep_going=True) as job:
        found = list(job.rows(rows))
    assert [row["id"] for row in found] == [1, None, 2, None, None]
    assert "a row is None" in found[1]["error"]
    with Complete(model, threads=1) as job, pytest.raises(InputError, match=r"a row is None: .*dict"):
        list(job.rows(rows))


def test_scores_are_of_the_unchanged_network(model: str) -> None:
    row = {"id": 1, "tokens": [1], "continuations": [[2]]}
    with Complete(model, threads=1, edits={}) as job:
        assert len(list(job.rows([row]))) == 1
    refusal = pytest.raises(InputError, match="'edits' is an option of completions")
    with Complete(model, threads=1, edits={("residual3", 0, None): 5.0}) as job, refusal:
        list(job.rows([row]))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_jobs_continue_to_the_same_bytes(folder: Path, kills: int) -> None:
    """A job is killed each time that its answers reach a random size, possibly in the middle of a line."""
    write([{"tokens": [i % SHAPE.V], "max_new_tokens": 60} for i in range(300)])
    whole = answers(out="whole.jsonl")
    words = command("batch", "in.jsonl", "-o", "out.jsonl.gz", *OPTIONS)
    part = Path("out.jsonl.gz.part")
    points = sorted(np.random.default_rng().integers(1, len(whole) * 9 // 10, kills).tolist())
    killed = 0
    for point in points:
        process = start(words, cwd=folder, env={**os.environ})
        while process.poll() is None and not (part.exists() and part.stat().st_size >= point):
            time.sleep(0.001)
        process.kill()
        killed += process.wait() == -9
        process.communicate()
    assert killed == kills, points
    assert run(words, cwd=folder, env={**os.environ}).status == 0
    assert gzip.decompress(Path("out.jsonl.gz").read_bytes()) == whole


def test_compressed_files_hold_the_same_lines(folder: Path) -> None:
    whole = answers()
    pytest.importorskip("backports.zstd" if os.sys.version_info < (3, 14) else "compression.zstd")  # type: ignore[attr-defined]
    Path("in.jsonl.gz").write_bytes(gzip.compress(Path("in.jsonl").read_bytes()))
    for source, out in (("in.jsonl.gz", "a.jsonl.zst"), ("in.jsonl", "b.jsonl.zst"), ("in.jsonl.gz", "c.jsonl.gz")):
        assert main([source, "-o", out, *OPTIONS]) == 0
    assert Path("a.jsonl.zst").read_bytes() == Path("b.jsonl.zst").read_bytes() != whole
    assert gzip.decompress(Path("c.jsonl.gz").read_bytes()) == whole
    os.rename("a.jsonl.zst", "again.jsonl.zst")
    write([], "none.jsonl")
    assert main(["none.jsonl", "-o", "none.out"]) == 0
    assert Path("none.out").read_bytes() == b""


def test_scores_are_log_probabilities_of_the_whole_sequence(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pygpt.generation.logprobs.SCORED", 50)  # a long continuation runs in pieces
    rng = np.random.default_rng(3)
    rows = [
        {
            "id": i,
            "tokens": rng.integers(0, SHAPE.V, n).tolist(),
            "continuations": [[*rng.integers(0, SHAPE.V, m).tolist()] for m in ms],
        }
        for i, (n, ms) in enumerate([(1, [1]), (3, [2, 126]), (60, [5, 1]), (128, [1])])
    ]
    rows.append({"id": 9, "tokens": [*rows[2]["tokens"][:50], 4], "continuations": rows[2]["continuations"]})  # shares a prefix
    write(rows)
    found = [json.loads(line) for line in answers().splitlines()]
    with GPT2.load(model, threads=1) as gpt:
        for row, answer in zip(rows, found, strict=True):
            for one, score in zip(row["continuations"], answer["scores"], strict=True):
                sequence = [*row["tokens"], *one]
                logits = gpt.logits(sequence[:-1])[-len(one) :].astype("f8")
                logits -= logits.max(1, keepdims=True)
                table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
                # The exponentials of the kernel are float32, each exact to about 2^-23 of itself: so is their sum.
                np.testing.assert_allclose(score["logprobs"], table[np.arange(len(one)), one], rtol=0, atol=2e-7)
                assert score["logprob"] == pytest.approx(sum(score["logprobs"]), abs=1e-9)
                assert score["greedy"] == (logits.argmax(1).tolist() == one)
                assert score["tokens"] == one


def test_log_probabilities_are_those_of_generate_batch(folder: Path, model: str) -> None:
    write([{"id": 1, "tokens": [4, 5]}])
    (found,) = [json.loads(line) for line in answers("--logprobs", "2").splitlines()]
    with GPT2.load(model, threads=1) as gpt, Complete(model, threads=1, seed=7) as job:
        (expected,) = gpt.generate_batch([[4, 5]], max_new_tokens=6, temperature=0.9, seed=job.seed_of(1), top_logprobs=2)
    assert found["logprobs"] == json.loads(json.dumps([info._asdict() for info in expected.infos]))


def test_a_complete_job_is_kept_and_other_options_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    whole = answers()
    words = ["in.jsonl", "-o", "out.jsonl", *OPTIONS]
    assert main([*words, "-t", "2", "--batch-size", "5"]) == 0
    assert "complete already" in capsys.readouterr().err
    for change, named in ((["--seed", "8"], "seed"), (["--shard", "0/2"], "shard"), (["--top-k", "4"], "options")):
        refused(capsys, [*words, *change], f"began with {named}", "--force")
    other = make_model(Path("other.bin"), seed=2)
    refused(capsys, [*words, "-m", other], "began with model")
    record = Path("out.jsonl.job.json")
    content = record.read_text()
    record.write_text(content.replace('"pygpt": "', '"pygpt": "0.0.'))
    refused(capsys, words, "began with pygpt = '0.0.")
    record.write_text(content.replace("{", '{"other": 1,', 1))
    refused(capsys, words, "began with other = 1")
    record.write_text("[]")
    refused(capsys, words, "not the record")
    record.unlink()
    refused(capsys, words, "out.jsonl: exists without")
    os.rename("out.jsonl", "out.jsonl.part")
    refused(capsys, words, "out.jsonl.part: exists without")
    assert answers("--force") == whole
    write(ROWS[:3])
    refused(capsys, words, "began with input")


def test_a_job_that_ended_before_its_first_answer_does_not_bind_the_next(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = answers()
    record = Path("out.jsonl.job.json").read_bytes()
    Path("out.jsonl").unlink()
    write(ROWS[:3])
    Path("out.jsonl.part").touch()  # killed between the record and the answer
    assert answers() == b"".join(whole.splitlines(keepends=True)[:3])
    assert Path("out.jsonl.job.json").read_bytes() != record
    with full_disk(0):
        assert main(["in.jsonl", "-o", "full.jsonl", *OPTIONS]) == 1
    assert sorted(os.listdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.job.json"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("[1]", "line 2 ... [1] ... object"),
        ("{", "line 2 is not JSON"),
        ({"id": 5}, 'line 2: give either "prompt"'),
        ({"id": 5, "tokens": [1], "prompt": "x"}, 'either "prompt"'),
        ({"id": 5, "prompt": "x"}, "not GPT-2's"),
        ({"id": 1.5, "tokens": [1]}, '"id" is 1.5'),
        ({"id": "r0", "tokens": [1]}, "line 2: ... 'r0' ... twice"),
        ({"tokens": [1], "max_tokens": 3}, "unknown key 'max_tokens'"),
        ({"tokens": [1], "top_k": None}, "'top_k' is null"),
        ({"tokens": [SHAPE.V]}, str(SHAPE.V)),
        ({"tokens": []}, "is empty"),
        ({"tokens": "ab"}, "a list of ids"),
        ({"tokens": [1], "continuations": []}, '"continuations" is []'),
        ({"tokens": [1], "continuations": [[1] * 200]}, "at most 129"),
        ({"tokens": [1], "continuations": [[1]], "top_k": 2}, "'top_k' is an option"),
        ({"tokens": [1], "temperature": -1}, "temperature is -1"),
    ],
)
def test_bad_lines_are_refused_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], row: object, named: str
) -> None:
    write([ROWS[0], row])
    assert_refuses(main, capsys, ["in.jsonl", "-o", "out.jsonl", *OPTIONS], named)
    assert os.listdir() == ["in.jsonl"]  # so that the corrected lines can be answered
    if isinstance(row, dict) and "twice" not in named:
        found = answers("--keep-going")
        write(ROWS[:1])
        first, second = found.splitlines(keepends=True)
        assert first == answers(out="one.jsonl")
        assert set(json.loads(second)) == {"id", "error"}


def test_bad_arguments_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["in.jsonl", "-o", "out.jsonl", *OPTIONS]
    for shard in ("1/1", "0/0", "x", "-1/2", "0/9999999999"):
        refused(capsys, [*words, f"--shard={shard}"], "--shard is")
    refused(capsys, ["in.jsonl"], "-o is missing")
    refused(capsys, ["none.jsonl", *words[1:]], "none.jsonl: no such file")
    refused(capsys, [*words[:2], "no/out.jsonl"], "does not exist")
    refused(capsys, [*words, "--logprobs", "9999"], "top_logprobs is 9999")
    Path("bad.jsonl.gz").write_bytes(gzip.compress(Path("in.jsonl").read_bytes())[:40])
    refused(capsys, ["bad.jsonl.gz", *words[1:]], "bad.jsonl.gz: ")
    Path("bad.jsonl.zst").write_bytes(b"nothing of the kind")
    refused(capsys, ["bad.jsonl.zst", *words[1:]], "bad.jsonl.zst: ")


def test_a_folder_is_a_model(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its answers are those of the same weights in one file, and the job knows the folder's settings, too."""
    whole = answers()
    assert convert([model, "hf/"]) == 0
    words = ["in.jsonl", "-o", "hf.jsonl", *OPTIONS, "-m", "hf"]
    assert main(words) == 0
    assert Path("hf.jsonl").read_bytes() == whole
    Path("hf/config.json").write_text(Path("hf/config.json").read_text().replace("gelu_new", "relu"))
    assert main(words) == 2
    assert re.search("hf.jsonl: .*model .*give the same, or --force", capsys.readouterr().err)


def test_a_full_disk_and_a_second_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = answers(out="whole.jsonl")
    with full_disk(700):
        assert main(["in.jsonl", "-o", "out.jsonl", *OPTIONS]) == 1
    assert re.search(r"out\.jsonl\.part: .*File too large", capsys.readouterr().err)
    with open("out.jsonl.part", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(capsys, ["in.jsonl", "-o", "out.jsonl", *OPTIONS], "another process", status=1)
    assert answers() == whole


def test_columns_are_answered_as_rows(model: str) -> None:
    rows = [row for row in ROWS if "id" in row]
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    with Complete(model, threads=1, seed=7, max_new_tokens=6, temperature=0.9) as job:
        expected = list(job.rows(rows))
        found = job(columns)
        assert [{name: found[name][i] for name in found if found[name][i] is not None} for i in range(len(rows))] == expected
        arrays: dict[str, Any] = {
            "id": np.array([4, 5]),
            "tokens": [np.array([1, 2]), np.array([3], np.int32)],
            "top_k": np.array([np.nan, np.nan]),
        }
        assert job(arrays) == job({"id": [4, 5], "tokens": [[1, 2], [3]]})
        assert job({"id": []}) == {}
        with pytest.raises(InputError, match="is empty"):
            job({"id": [1], "tokens": [[]]})


def test_few_rows_are_taken_before_their_turn(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad rows are answered at once, and wait for the long row before them."""
    monkeypatch.setattr("pygpt.cluster.AHEAD", 5)
    given: list[dict[str, Any]] = [{"id": i, "tokens": [] if i else [1]} for i in range(40)]
    rows = iter(given)
    with Complete(model, threads=1, max_new_tokens=6, keep_going=True) as complete:
        assert next(complete.rows(rows))["id"] == 0
        assert next(rows)["id"] <= 5


def test_bad_options_are_refused_by_the_constructor(model: str) -> None:
    for options in ({"seed": -1}, {"temperature": -1.0}, {"batch_size": 0}, {"max_new_tokens": 10**6}, {"logprobs": -1}):
        with pytest.raises(PyGPTError):
            Complete(model, threads=1, **options)
    with pytest.raises(InputError, match="give logprobs"):
        Complete(model, threads=1, top_logprobs=2)
