"""All features together: each result has the bits of the plain path.

The plain path runs a request alone, on one thread, with every window as a new sequence: no cache, speculation, batch or server.
A case draws a shape, a weight format and its file, threads, chunks, an instruction set, a draft, limits, and several requests.
Each request draws a sampler, controls, stops, a length with its overflow, scores, edits and speculation. If
options contradict each other, one line refuses them.

    python -m pytest -m slow --seconds 900 tests/bits/test_combinations.py"""

import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from budget import Budget
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from known import instruction_set
from serving import Answer, joined, live
from targets import blocks_by_layer, weights
from test_kernels import FUSED

from pygpt import GPT2, Config, InputError, Tokenizer, add, scale, write_checkpoint, zero
from pygpt.formats.dtypes import BFLOAT16, FLOAT16, FLOAT32, Q4_0, Q8_0, Format
from pygpt.formats.gguf import SAID, write_gguf
from pygpt.formats.open import set_tokenizer, vocabulary_beside
from pygpt.formats.panels import formats_of, write_panels
from pygpt.formats.vocabulary import characters_of, write_vocabulary
from pygpt.generation.completion import Completion
from pygpt.generation.engine import Job
from pygpt.generation.logprobs import TokenInfo
from pygpt.generation.request import SAMPLING, Request
from pygpt.network import KVCache, Network
from pygpt.server.answering import token_text
from pygpt.server.schema import COMPLETION
from pygpt.tokenizer import tokenizer_of

Options = dict[str, Any]
Case = Callable[[st.DataObject, Path], None]
Bits = list[tuple[list[int], str | None, list[TokenInfo], list[TokenInfo]]]
PROMPTS = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=25), min_size=1, max_size=3)
LETTERS = "ab \n\u00e9"  # of the vocabulary: 7 ids, two of them bytes of one character
RELATIVES: list[Options] = [
    {}, {}, {"F": 37}, {"activation": "relu"}, {"tied": False, "F": 32}, {"scaled_by_layer": True, "epsilon": 1e-3, "F": 64},
]  # fmt: skip
KINDS = (FLOAT32, BFLOAT16, FLOAT16, Q8_0, Q4_0)


def louder(tokens: list[int], row: Any) -> Any:
    row[tokens[-1]] += len(tokens) % 3
    return row * np.float32(1.5)


SAMPLERS: list[Options] = [
    {}, {"sampler": "greedy"}, {"do_sample": True}, {"seed": 3}, {"temperature": 0.7, "seed": 2**64 - 1},
    {"top_k": 4, "seed": 5}, {"top_p": 0.8, "seed": 6}, {"min_p": 0.1, "seed": 7},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "seed": 8}, {"temperature": 0},
    {"sampler": "greedy", "top_k": 3},
]  # fmt: skip
CONTROLS: list[Options] = [
    {}, {}, {"repetition_penalty": 1.4}, {"frequency_penalty": 0.7, "presence_penalty": -0.4}, {"logit_bias": {2: 3.0, 0: -50}},
    {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[1], [2, 3]]}, {"suppress_tokens": [0, 4]}, {"logits_processor": louder},
    {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "logit_bias": {1: 1.0}, "logits_processor": [louder, louder]},
    {"suppress_tokens": list(range(7)), "logit_bias": {7: -3.0}},
]  # fmt: skip
STOPS: list[Options] = [
    {}, {}, {"stop_token_ids": [1, 3]}, {"stop_strings": "ab"}, {"stop_strings": ["\n", "\u00e9", "\ufffd"]},
    {"stop_at_eot": True},
]  # fmt: skip
OVERFLOWS: list[Options] = [
    {},
    {"overflow": "stop"},
    {"overflow": "slide"},
    {"overflow": "slide", "slide_to": 3},
    {"slide_to": 2},
]
SCORES: list[Options] = [
    {}, {"top_logprobs": 0}, {"top_logprobs": 3}, {"top_logprobs": 2, "prompt_logprobs": True}, {"prompt_logprobs": True},
]  # fmt: skip
TABLES = {"sampler": SAMPLERS, "control": CONTROLS, "stop": STOPS, "overflow": OVERFLOWS, "scores": SCORES}
GUESSES = (None, False, True, 1, 3, 64)


def edits_of(config: Config) -> list[Any]:
    """Steering, ablation, and functions of one position."""
    return [
        None, None, {("residual3", config.L - 1, None): add(np.linspace(-1, 1, config.C))},
        {("atty", 0, None): zero(heads=[0]), ("v", 0, 2): scale(0.5)},
        {("probs", 0, 3): zero(), ("fch", 0, None): lambda x: np.maximum(x, 0.1), ("logits", None, None): lambda x: -x},
    ]  # fmt: skip


class World(NamedTuple):
    """A model in two files with the same numbers. options: of GPT2.load() for the second one."""

    config: Config
    plain: Path
    other: Path
    options: Options


def one_of(data: st.DataObject, values: Any, name: str) -> Any:
    """Draw an element, and show it if the case fails. Small numbers are first, so a failure shrinks to plain features."""
    found = values[data.draw(st.integers(0, len(values) - 1))]
    note(f"{name}: {found}")
    return found


def world(data: st.DataObject, folder: Path) -> World:
    """Draw a model, and write it and its drafts."""
    NH, varied = data.draw(st.integers(1, 3)), one_of(data, RELATIVES, "variation")
    HS = one_of(data, (1, 3, 8, 11, 16, 32), "HS")
    V, L, maxT = 7 + 2 * data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3)), data.draw(st.integers(5, 30))
    config = Config(maxT=maxT, V=V, L=L, NH=NH, C=NH * HS, **varied)
    kind, head = one_of(data, KINDS, "format"), one_of(data, KINDS, "head")
    ways = ["panels"] + ["gguf"] * (
        varied.keys() <= SAID and not ((config.C % 32 or config.F % 32) and {kind, head} & {Q8_0, Q4_0})
    )
    if not varied and kind == head == FLOAT32:
        ways += ["version 1", "version 3"]
    if not varied and (kind, head) in ((Q8_0, Q8_0), (Q4_0, Q8_0)):
        ways.append(kind.name)
    if not varied and kind == head == BFLOAT16:  # its positions and vectors are bfloat16, too
        ways = ["version 5"]
    way, draft = one_of(data, ways, "file"), one_of(data, (None, "lookup", "q8_0", "q4_0", "itself", "other", "NaN"), "draft")
    plain = written(folder, ways[0], config, kind, head)
    set_tokenizer(config, vocabulary_beside(str(plain)))
    other = plain if way == ways[0] else written(folder, way, config, kind, head)
    options = {"weights": way} if way in ("q8_0", "q4_0") else {}
    if draft in ("other", "NaN"):
        nan = draft == "NaN"
        draft = written(folder, "version 3", Config(maxT=max(maxT - 3, 1), V=V, L=1, NH=1, C=6), FLOAT32, FLOAT32, "draft")
        if nan:
            np.memmap(draft, "<f4", "r+", offset=1024)[-6:] = np.nan  # the last bias
    return World(config, plain, other, {**options, "draft": plain if draft == "itself" else draft})


@contextmanager
def opened(data: st.DataObject, made: World) -> Iterator[GPT2]:
    """Open the second file."""
    with GPT2.load(made.other, threads=data.draw(st.integers(1, 4)), **made.options) as model:
        yield model


def written(folder: Path, way: str, config: Config, kind: Format, head: Format, name: str = "model") -> Path:
    """Write a model in a file of this kind, and its vocabulary beside the file."""
    path = folder / f"{name} {way}{ {'panels': '.safetensors', 'gguf': '.gguf'}.get(way, '.bin') }"
    if path.suffix == ".bin":
        write_checkpoint(path, config, weights(config), version=int(way[-1]) if way.startswith("v") else 3)
    else:
        formats = formats_of(config, kind, head, FLOAT32)
        tensors = {each: iter(blocks) for each, blocks in blocks_by_layer(config, formats).items()}
        if way == "gguf":
            write_gguf(path, config, formats, tensors)
        else:
            write_panels(path, config, formats, tensors, "0" * 64)
    write_vocabulary(vocabulary_beside(str(path)), characters_of(LETTERS))
    return path


def asked(data: st.DataObject, config: Config, prompts: list[list[int]], only: Any = None) -> tuple[list[int], Options]:
    """Draw a request: a prompt, which may share its beginning with others, and options, which may contradict each other.

    only: the names of the options to draw from."""
    stem = one_of(data, prompts, "prompt begins with")
    prompt = stem[: data.draw(st.integers(1, len(stem)))] + data.draw(st.lists(st.integers(0, config.V - 1), max_size=3))
    options: Options = {}
    for name, table in TABLES.items():
        options |= one_of(data, [each for each in table if only is None or each.keys() <= only], name)
    most = config.maxT + 9 if "overflow" in options else max(config.maxT - len(prompt), 1)
    note(f"prompt: {prompt}")
    return prompt, {**options, "max_new_tokens": data.draw(st.integers(0, most))}


def checked(config: Config, prompt: list[int], options: Options, **more: Any) -> Request | str:
    """Return the request, or the line that refuses it."""
    try:
        return Request(config, prompt, **options, **more)
    except InputError as error:
        return line(str(error))


def line(text: str) -> str:
    """Return a message, which must be one clear line."""
    assert text.strip()
    assert text.isprintable()
    assert len(text) < 400, text
    return text


def bits(completions: list[Completion]) -> Bits:
    """Return all that a completion promises."""
    return [(c.tokens, c.finish_reason, c.prompt_infos, c.infos) for c in completions]


def alone(model: GPT2, request: Request, edits: Any, seeds: list[int | None]) -> Bits | str:
    """Complete a request by the plain path, once for each seed. Return the line of the first error instead."""

    def logits(tokens: list[int]) -> Any:
        cache = model.new_cache(len(tokens))
        return model.step([(token, cache, True) for token in tokens], edits)

    found: list[Completion] = []
    try:
        for stream, its in enumerate(seeds):
            one = Completion(request, seed=its, stream=stream)
            for row in range(len(request.tokens) - 1 if one.unscored else 0):
                one.score(logits(request.tokens), row)
            while request.new and one.finish_reason is None:
                rows = logits(one.window())
                one.take(rows, len(rows) - 1)
            if not request.new:
                one.finish_reason = "length"
            found.append(one)
    except InputError as error:
        return line(str(error))
    return bits(found)


def requests_in_an_engine(data: st.DataObject, folder: Path) -> None:
    """Requests join an engine while others run, and some leave. Tokens, reasons and scores are those of the plain path."""
    made, prompts = world(data, folder), data.draw(PROMPTS)
    jobs: list[tuple[Job, Any]] = []
    with (
        instruction_set(one_of(data, FUSED, "instructions")),
        pytest.MonkeyPatch.context() as patch,
        opened(data, made) as model,
    ):
        patch.setattr(Network, "chunk", one_of(data, (256, 1, 2, 5), "chunk"))
        own = model.draft(False)
        one = (model.network.position_bytes + (own.position_bytes if own else 0)) * made.config.maxT
        kept, most = one_of(data, (0, one, 9 * one), "prefix bytes"), one_of(data, (None, one, 3 * one), "cache bytes")
        limits = {"max_live": data.draw(st.integers(1, 6)), "target_ms": one_of(data, (None, 0.001, 1000.0), "target ms")}
        engine = model.engine(prefix=model.new_prefix_cache(kept), cache_bytes=most, **limits)

        def step() -> None:
            assert not any(event.job.cancelled for event in engine.step())  # a cancelled job has no events in later steps
            assert len(engine._live) <= engine.max_live
            assert engine.prefix.nbytes <= kept
            assert most is None or engine._reserved() + engine.prefix.nbytes <= most
            used = [sequence.memory for sequence in engine._live if sequence.memory] + engine.prefix._idle
            assert len({id(memory.cache) for memory in used}) == len(used)  # no two sequences share one

        for _ in range(data.draw(st.integers(1, 6))):
            prompt, options = asked(data, made.config, prompts)
            edits = options["edits"] = one_of(data, edits_of(made.config), "edits")
            request = checked(made.config, prompt, options, speculation=one_of(data, GUESSES, "speculation"))
            if isinstance(request, Request):
                jobs.append((engine.add(request, n=one_of(data, (1, 1, 1, 2, 3), "n")), edits))
            else:
                assert request == checked(made.config, prompt, options)  # speculation is not the reason
            for _ in range(data.draw(st.integers(0, 6))):
                step()
            if jobs and one_of(data, (False, False, True), "cancel"):
                engine.cancel(one_of(data, jobs, "job")[0])
        while engine.busy:
            step()
    with GPT2.load(made.plain, threads=1) as plain:
        for job, edits in jobs:
            found, wanted = job.completions, alone(plain, job.request, edits, [c.seed for c in job.completions])
            assert job.error is None or str(job.error) == wanted
            assert isinstance(wanted, list) or job.error is not None or job.cancelled
            if job.error is None and isinstance(wanted, list):
                for completion, its in zip(found, wanted, strict=True):
                    tokens, _, given, infos = its
                    left = completion.finish_reason == "cancelled"
                    short = tokens[: len(completion.tokens)], "cancelled", given[: len(completion.prompt_infos)]
                    assert bits([completion])[0] == ((*short, infos[: len(completion.infos)]) if left else its)


def caches(data: st.DataObject, folder: Path) -> None:
    """Caches grow by pieces in common steps, are copied and cut, and change hands between a batch's rows."""
    made = world(data, folder)
    tokens = data.draw(st.lists(st.integers(0, made.config.V - 1), min_size=1, max_size=made.config.maxT))
    with GPT2.load(made.plain, threads=1) as plain:
        whole = plain.logits(tokens)
    isa = one_of(data, FUSED, "instructions")
    with instruction_set(isa), opened(data, made) as model:
        live: list[KVCache] = [model.new_cache()]
        for _ in range(data.draw(st.integers(1, 12))):
            move, cache = one_of(data, ("step", "step", "extend", "copy", "cut"), "move"), one_of(data, live, "cache")
            if move == "copy":
                live.append(cache.copy(data.draw(st.integers(0, cache.length)), capacity=made.config.maxT))
            elif move == "cut":
                cache.truncate(data.draw(st.integers(0, cache.length)))
            elif move == "extend" and cache.length < len(tokens):
                stop = data.draw(st.integers(cache.length + 1, len(tokens)))
                assert np.array_equal(model.extend(cache, tokens[cache.length : stop]), whole[stop - 1])
            elif move == "step":
                counts = [(each, data.draw(st.integers(0, len(tokens) - each.length))) for each in live]
                places = [(each, at) for each, count in counts for at in range(each.length, each.length + count)]
                if places:
                    found = model.step([(tokens[at], each, True) for each, at in places])
                    assert np.array_equal(found, whole[[at for _, at in places]])


HTTP = {"max_new_tokens": "max_tokens", "stop_strings": "stop", "top_logprobs": "logprobs", "prompt_logprobs": "echo"}


def requests_over_http(data: st.DataObject, folder: Path) -> None:
    """Requests to a server, whole and as streams, at the same time: ids, text, reasons and log-probabilities."""
    made, prompts, sent = world(data, folder), data.draw(PROMPTS), []
    names = {*COMPLETION, *HTTP}
    for _ in range(data.draw(st.integers(1, 6))):
        prompt, options = asked(data, made.config, prompts, names)
        if "top_logprobs" not in options:  # echo alone is text
            options.pop("prompt_logprobs", None)
        body = {"prompt": prompt, "return_token_ids": True, "n": one_of(data, (1, 1, 2), "n")}
        body |= {"speculation": one_of(data, GUESSES, "speculation"), "stream": data.draw(st.booleans())}
        body |= {HTTP.get(name, name): value for name, value in options.items()}
        if options.keys().isdisjoint({"sampler", *SAMPLING}):
            body["sampler"] = "median"
        sent.append((checked(made.config, prompt, options, stop_in_prompt=False), body))
    path = made.other if "weights" not in made.options else made.plain
    limits: Options = {"threads": data.draw(st.integers(1, 3)), "max_live": data.draw(st.integers(1, 6)), "queue": 100}
    with live(path, **limits) as at, ThreadPoolExecutor(len(sent)) as clients:
        answers = list(clients.map(lambda each: at.ask("POST", "/v1/completions", each[1]), sent))
    with GPT2.load(made.plain, threads=1) as plain:
        for (request, body), answer in zip(sent, answers, strict=True):
            found = said(answer, body["stream"])
            if isinstance(request, str):
                assert isinstance(found, str), (request, body)
                continue
            wanted = alone(plain, request, None, [request.sampler.start()] * body["n"])
            assert found == (wanted if isinstance(wanted, str) else written_out(tokenizer_of(plain.config), body, wanted))


def said(answer: Answer, stream: bool) -> Any:
    """Return the choices of an answer, or the line of its error."""
    parts = answer.events() if stream and answer.status == 200 else [answer.json()]
    if "error" in parts[-1]:
        assert answer.status == (200 if stream and len(parts) > 1 else 400)
        return line(parts[-1]["error"]["message"])
    choices = joined(parts[:-1]) if stream else parts[0]["choices"]
    return [(c["token_ids"], c["finish_reason"], c["text"], scores(c["logprobs"])) for c in choices]


def scores(logprobs: Any) -> Any:
    return logprobs and [logprobs[name] for name in ("token_ids", "token_logprobs", "top")]


def written_out(tokenizer: Tokenizer, body: Options, wanted: Bits) -> Any:
    """Return the choices that a server makes of completions."""
    given = body["prompt"] if body.get("echo") else []
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
    found = []
    for tokens, reason, _, infos in wanted:
        new = tokenizer.decode_bytes([token for token in tokens if token not in body.get("stop_token_ids", [])])
        end = min((at for stop in stops if (at := new.find(stop.encode())) >= 0), default=len(new))
        text = (tokenizer.decode_bytes(given) + new[:end]).decode("utf-8", "replace")
        rows: list[TokenInfo | None] = [*([None, *wanted[0][2]] if given else []), *infos]
        values = [[row and row.logprob for row in rows], [row and [top(tokenizer, *each) for each in row.top] for row in rows]]
        found.append((tokens, reason, text, [[*given, *tokens], *values] if "logprobs" in body else None))
    return found


def top(tokenizer: Tokenizer, token: int, value: float) -> list[Any]:
    return [token, token_text(tokenizer.decode_bytes([token])), value]


def check(case: Case, examples: int, number: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    """Try examples of a case. number: the seed."""

    @seed(number)
    @settings(deadline=None, max_examples=examples, database=None, suppress_health_check=[*HealthCheck], phases=phases)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            case(data, Path(folder))

    run()


@pytest.mark.parametrize(("case", "few"), [(requests_in_an_engine, 40), (caches, 30), (requests_over_http, 15)])
def test_features_together(budget: Budget, case: Case, few: int) -> None:
    for _ in budget.rounds():
        check(case, few, budget.random.randrange(1 << 32))


@pytest.mark.parametrize(
    ("case", "replaced", "by"),
    [
        (requests_in_an_engine, "pygpt.generation.prefix.common_prefix", lambda a, b, most: min(len(a), most)),
        (requests_in_an_engine, "pygpt.generation.prefix.Memory.keep", lambda *_: None),
        (caches, "pygpt.network.KVCache.copy", lambda cache, *_, **__: cache),
        (requests_over_http, "pygpt.server.answering.LEAST", -1.0),
    ],
)
def test_a_defect_is_found(monkeypatch: pytest.MonkeyPatch, case: Any, replaced: str, by: Any) -> None:
    monkeypatch.setattr(replaced, by)
    with pytest.raises((AssertionError, InputError)):
        check(case, 100, 1, [Phase.generate])
