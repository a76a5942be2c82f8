"""OpenAI's own client, synchronous and asynchronous, and the arithmetic of lm-eval against `pygpt eval hellaswag`.

Other clients run where they are installed: langchain-openai, litellm, llm, lm-eval[api] and schemathesis from PyPI, and ai with
@ai-sdk/openai-compatible from npm."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from running import execute
from serving import Live, live, tiny

from pygpt import Example, Tokenizer, write_examples
from pygpt.commands import eval as evaluation


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def at(path: Path) -> Iterator[Live]:
    with live(path, keys=["secret"], chat=True) as running:
        yield running


def test_openai_s_client(at: Live) -> None:
    openai = pytest.importorskip("openai")
    address = {"base_url": f"http://127.0.0.1:{at.address[1]}/v1", "api_key": "secret"}
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "seed": 1}
    with openai.OpenAI(**address) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.completions.create(**asked, n=2, logprobs=2, echo=True, frequency_penalty=0, user="me")
        assert whole.choices[0].text.startswith("Hello")
        assert whole.usage.completion_tokens == 12
        assert whole.choices[1].logprobs.token_logprobs[0] is None
        text = client.completions.create(**asked).choices[0].text
        parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(choice.text for part in parts for choice in part.choices) == text
        assert parts[-1].usage.total_tokens == 7
        messages = [{"role": "user", "content": "Hi"}]
        chat = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=3)
        assert chat.choices[0].message.role == "assistant"
        for fields, kind in (({"model": "x"}, openai.NotFoundError), ({"logprobs": 99}, openai.BadRequestError)):
            with pytest.raises(kind):
                client.completions.create(**{**asked, **fields})
    with openai.OpenAI(**{**address, "api_key": "wrong"}) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(**address) as client:
            answers = await asyncio.gather(*(client.completions.create(**asked) for _ in range(8)))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(together()) == [text] * 8


def hellaswag(count: int) -> list[tuple[int, str, list[str]]]:
    """Items for multiple choice: the right ending's number, the beginning, and four endings."""
    choose = random.Random(5)
    words = ["king", "love", "lord", "art", "man", "death", "France", "blood", "hand", "sea", "crown"]
    items = []
    for _ in range(count):
        context = " ".join(choose.choices(words, k=6))
        endings = ["".join(f" {word}" for word in choose.choices(words, k=choose.randint(1, 5))) for _ in range(4)]
        items.append((choose.randrange(4), context, endings))
    return items


def test_a_harness_computes_the_accuracy_of_our_own_command(
    at: Live, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval's rule for multiple choice: echo with log-probabilities, and the sum over each ending's tokens."""
    examples = [(number, *item) for number, item in enumerate(hellaswag(24))]
    encode = Tokenizer().encode
    file = tmp_path / "items.bin"
    write_examples(file, [Example(n, label, encode(c), [encode(e) for e in endings]) for n, label, c, endings in examples])
    assert evaluation.main(["hellaswag", str(file), "-m", str(path), "-o", "json"]) == 0
    wanted = json.loads(capsys.readouterr().out)["right"]
    right = 0
    for _, label, context, endings in examples:
        prompts = [encode(context + ending) for ending in endings]
        fields = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
        answer = at.ask("POST", "/v1/completions", fields, X_Api_Key="secret").json()
        skip = len(encode(context))
        sums = [sum(choice["logprobs"]["token_logprobs"][skip:-1]) for choice in answer["choices"]]
        right += sums.index(max(sums)) == label
    assert right == wanted


# ------------------------------------------------------------------------------------- other programs, if they are installed


def client(package: str, script: str, at: Live, folder: Path, **variables: str) -> str:
    """Run a program of another package against the server; return what it prints. Skip the test if it is not installed."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    address = f"http://127.0.0.1:{at.address[1]}/v1"
    kept = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = execute([sys.executable, "-c", script, address], cwd=folder, timeout=110, env={**kept, **variables})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wanted(at: Live) -> str:
    """The text that each client asks for."""
    fields = {"prompt": "Hello", "max_tokens": 6, "seed": 1, "temperature": 0.7}
    text: str = at.ask("POST", "/v1/completions", fields, X_Api_Key="secret").json()["choices"][0]["text"]
    return text


def test_langchain(at: Live, tmp_path: Path, wanted: str) -> None:
    script = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
given = dict(base_url=sys.argv[1], api_key="secret", model="tiny", max_tokens=6, temperature=0.7)
model = OpenAI(**given, seed=1)
found = [model.invoke("Hello"), "".join(model.stream("Hello")), *model.batch(["Hello", "Hello"])]
message = ChatOpenAI(**given).invoke([("user", "Hi")])
print(json.dumps([found, message.type, message.usage_metadata["output_tokens"]]))
"""
    assert json.loads(client("langchain_openai", script, at, tmp_path)) == [[wanted] * 4, "ai", 6]


def test_litellm(at: Live, tmp_path: Path, wanted: str) -> None:
    script = """
import json, sys, litellm
given = dict(model="text-completion-openai/tiny", prompt="Hello", max_tokens=6, seed=1, temperature=0.7)
given |= dict(api_base=sys.argv[1], api_key="secret")
whole = litellm.text_completion(**given)
parts = list(litellm.text_completion(**given, stream=True))
streamed = "".join(choice.text or "" for part in parts for choice in part.choices)
print(json.dumps([whole.choices[0].text, streamed, whole.usage.total_tokens]))
"""
    found = client("litellm", script, at, tmp_path)
    assert json.loads(found.splitlines()[-1]) == [wanted, wanted, 7]


def test_llm(at: Live, tmp_path: Path, wanted: str) -> None:
    """The command `llm`, with the model in extra-openai-models.yaml."""
    address = f"http://127.0.0.1:{at.address[1]}/v1"
    rule = f"- {{model_id: ours, model_name: tiny, api_base: '{address}', completion: true, api_key_name: ours}}\n"
    (tmp_path / "extra-openai-models.yaml").write_text(rule)
    (tmp_path / "keys.json").write_text('{"ours": "secret"}')
    options = ["-o", "max_tokens", "6", "-o", "seed", "1", "-o", "temperature", "0.7"]
    for how in ([], ["--no-stream"]):
        script = f"import sys; sys.argv = ['llm', '-m', 'ours', *{[*options, *how, 'Hello']!r}]; from llm.cli import cli; cli()"
        assert client("llm", script, at, tmp_path, LLM_USER_PATH=str(tmp_path)) == f"{wanted}\n"


TASK = """task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: endings
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval(at: Live, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's accuracy on a task of ours is that of `pygpt eval hellaswag` on the same items."""
    items, encode = hellaswag(40), Tokenizer().encode
    file, task = tmp_path / "items.jsonl", tmp_path / "ours.yaml"
    names = ("label", "context", "endings")
    file.write_text("".join(json.dumps(dict(zip(names, item, strict=True))) + "\n" for item in items))
    task.write_text(TASK.format(file=file))
    script = f"""
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
given = f"model=tiny,base_url={{sys.argv[1]}}/completions,tokenizer_backend=remote,max_length=96,auth_token=secret"
found = lm_eval.simple_evaluate(model="local-completions", model_args=given, tasks=["ours"], batch_size=8,
    task_manager=TaskManager(include_path={str(tmp_path)!r}, include_defaults=False))
print(json.dumps(found["results"]["ours"]["acc,none"]))
"""
    score = json.loads(client("lm_eval", script, at, tmp_path, OPENAI_API_KEY="secret").splitlines()[-1])
    binary = tmp_path / "items.bin"
    examples = [Example(n, label, encode(c), [encode(e) for e in endings]) for n, (label, c, endings) in enumerate(items)]
    write_examples(binary, examples)
    assert evaluation.main(["hellaswag", str(binary), "-m", str(path), "-o", "json"]) == 0
    assert score == json.loads(capsys.readouterr().out)["right"] / len(items)


def test_schemathesis(at: Live, tmp_path: Path) -> None:
    """Requests that the OpenAPI document allows, and those that it does not: no answer breaks the document's promises."""
    script = """
import sys
address = sys.argv[1].removesuffix("/v1")
sys.argv = ["st", "run", address + "/openapi.json", "-H", "Authorization: Bearer secret", "--exclude-path=/trace", "--no-color",
    "--phases=examples,coverage,fuzzing", "--max-examples=25", "--seed=1", "--checks=all", "--continue-on-failure",
    "--exclude-checks=positive_data_acceptance"]  # the schema does not have rules between fields, or of one model
from schemathesis.cli import schemathesis
schemathesis()
"""
    client("schemathesis", script, at, tmp_path)


def test_the_ai_sdk(at: Live, tmp_path: Path) -> None:
    """@ai-sdk/openai-compatible of npm, if it is installed for node: its completion model, whole and streamed."""
    script = """
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible"), { generateText, streamText } = require("ai");
const provider = createOpenAICompatible({ name: "ours", baseURL: process.argv[1], apiKey: "secret", includeUsage: true });
const asked = { model: provider.completionModel("tiny"), prompt: "Hello", maxOutputTokens: 6, seed: 1, temperature: 0.7 };
(async () => {
  const whole = await generateText(asked), stream = streamText(asked);
  let text = "";
  for await (const part of stream.textStream) text += part;
  console.log(JSON.stringify([whole.text, whole.usage.outputTokens, text, (await stream.usage).totalTokens]));
})();
"""
    node, npm = shutil.which("node"), shutil.which("npm")
    root = os.environ.get("NODE_PATH") or (npm and subprocess.check_output([npm, "root", "-g"], text=True).strip()) or ""
    if node is None or not all((Path(root) / name).exists() for name in ("@ai-sdk/openai-compatible", "ai")):
        pytest.skip("@ai-sdk/openai-compatible and ai are not installed globally with npm")
    address = f"http://127.0.0.1:{at.address[1]}/v1"
    variables = {**os.environ, "NODE_PATH": root}
    done = execute([node, "-e", script, address], env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    framed = {"prompt": "user:\nHello\n\nassistant:\n", "stop": ["\nuser:"]}  # so the library writes a conversation
    asked = {**framed, "max_tokens": 6, "seed": 1, "temperature": 0.7}
    whole = at.ask("POST", "/v1/completions", asked, X_Api_Key="secret").json()
    text, usage = whole["choices"][0]["text"], whole["usage"]
    assert json.loads(done.stdout) == [text, usage["completion_tokens"], text, usage["total_tokens"]]
