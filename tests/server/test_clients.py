"""OpenAI's own client, synchronous and asynchronous, and the arithmetic of lm-eval against `pygpt eval hellaswag`."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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


def test_a_harness_computes_the_accuracy_of_our_own_command(
    at: Live, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval's rule for multiple choice: echo with log-probabilities, and the sum over each ending's tokens."""
    choose = random.Random(5)
    words = ["king", "love", "lord", "art", "man", "death", "France", "blood", "hand", "sea", "crown"]
    examples = []
    for number in range(24):
        context = " ".join(choose.choices(words, k=6))
        endings = ["".join(f" {word}" for word in choose.choices(words, k=choose.randint(1, 5))) for _ in range(4)]
        examples.append((number, choose.randrange(4), context, endings))
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
