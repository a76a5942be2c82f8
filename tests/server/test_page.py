"""The page in a real Chromium: what it shows is what the API answers, with the mouse, the keyboard, and hostile texts."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Live, live, slow_steps, tiny

from pygpt import Tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")

ARGUMENTS = [f"--{name}" for name in ("no-sandbox", "disable-gpu", "disable-quic", "disable-sync", "disable-component-update")]
FACE = "\N{GRINNING FACE}"
HOSTILE = f"<script>document.title='x'</script> <img src=x onerror=alert(1)>\n\t{FACE} \u202eabc &amp;"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("page"), maxT=1100)


@pytest.fixture(scope="module")
def at(path: Path) -> Iterator[Live]:
    with live(path) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        playwright.expect.set_options(timeout=30_000)  # also on a busy machine
        launched = started.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, "--disable-background-networking"])
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, at: Live, path: str = "/", *, errors: bool = False, **options: Any) -> Iterator[Any]:
    """A fresh page. At the end: no error in its scripts, and no request to another origin."""
    origin, seen, wrong = f"http://127.0.0.1:{at.address[1]}", [], []
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)  # also on a busy machine
    page = context.new_page()
    page.on("request", lambda request: seen.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" and not errors else None)
    page.goto(origin + path)
    yield page
    assert wrong == []
    assert all(url.startswith(f"{origin}/") for url in seen)
    context.close()


def start(page: Any, prompt: str, **settings: Any) -> None:
    page.fill("#prompt", prompt)
    for name, value in settings.items():
        page.fill(f'[name="{name}"]', str(value))
    page.click("#start")
    settled(page)


def settled(page: Any) -> None:
    """Wait until a request has run."""
    page.wait_for_selector("#stop[disabled]", state="attached")
    playwright.expect(page.locator("#status")).not_to_have_text("Running.")


def chips(page: Any) -> list[str]:
    """The text of each chip without its percentage."""
    found: list[str] = page.eval_on_selector_all(".chip", "chips => chips.map(chip => chip.firstChild.textContent)")
    return found


def ids(page: Any) -> list[int]:
    return [int(part) for part in page.evaluate("location.hash").partition("ids=")[2].split(",")]


def test_chips_are_the_answer(browser: Any, at: Live) -> None:
    """The tokens, their bytes and their probabilities are those of the API; a hostile text stays text."""
    with opened(browser, at) as page:
        start(page, HOSTILE, max_tokens=12, seed=5, temperature=0.9, top_p=0.9, top_k=50)
        prompt = Tokenizer().encode(HOSTILE)
        answer = at.complete(
            HOSTILE, max_tokens=12, seed=5, temperature=0.9, top_p=0.9, top_k=50, ignore_eos=True, echo=True, logprobs=10
        )["choices"][0]["logprobs"]
        assert ids(page) == answer["token_ids"]
        shown = "".join(chips(page)[: len(prompt)])
        assert shown.replace("\u00b7", " ").startswith(
            "<script>document.title='x'</script> <img src=x onerror=alert(1)>\u21b5\u2192"
        )
        assert "\\xf0\\x9f\\x98\\x80" in shown  # half characters are bytes
        assert "\u202e" not in shown  # a mark that turns the direction of text
        numbers = page.eval_on_selector_all(".chip small", "all => all.map(one => one.textContent)")
        for number, logprob in zip(numbers[1:], answer["token_logprobs"][1:], strict=True):
            percent = 100 * np.exp(logprob)
            assert number == "<0.1" if percent < 0.095 else abs(float(number) - percent) <= 0.51
        assert page.title() == "pygpt"
        assert page.eval_on_selector_all(".chip.given", "all => all.length") == len(prompt)
        assert page.locator("#chips img, #chips script").count() == 0


def test_alternatives_and_branches(browser: Any, at: Live) -> None:
    """A branch is the direct request with the other token; breadcrumbs and Undo go back."""
    with opened(browser, at) as page:
        start(page, "Hello world", max_tokens=10, seed=3)
        first = ids(page)
        page.click(".chip >> nth=5")
        wanted = at.complete(first[:5], max_tokens=1, logprobs=10)["choices"][0]["logprobs"]["top"][0]
        rows = page.locator("#others tr")
        assert rows.count() == 11
        shares = [float(text.split()[0].replace("<", "")) for text in page.locator("#others td:nth-child(2)").all_inner_texts()]
        assert abs(sum(shares) - 100) < 3  # eleven rounded numbers
        rows.nth(3).locator("button").click()
        settled(page)
        body = {"max_tokens": 10, "seed": 3, "temperature": 0.8, "ignore_eos": True, "return_token_ids": True}
        direct = at.complete([*first[:5], wanted[3][0]], **body)["choices"][0]["token_ids"]
        assert ids(page) == [*first[:5], wanted[3][0], *direct]
        assert page.locator("#branches button").count() == 2
        page.click("#more")
        settled(page)
        more = at.complete([*first[:5], wanted[3][0], *direct], **body)["choices"][0]["token_ids"]
        assert ids(page)[-10:] == more
        page.click("#undo")
        page.click("#undo")
        assert ids(page) == first
        page.click("#branches button >> nth=1")
        assert ids(page) == [*first[:5], wanted[3][0], *direct]


def test_the_address_and_the_copied_lines_give_the_same_text(browser: Any, at: Live) -> None:
    with opened(browser, at) as page:
        start(page, "Hello world", max_tokens=8, seed=4, temperature=1.5)
        before, curl, text = ids(page), page.inner_text("#curl"), chips(page)
        page.reload()
        settled(page)
        playwright.expect(page.locator(".chip")).to_have_count(len(before))
        assert (ids(page), page.inner_text("#curl"), chips(page)) == (before, curl, text)
        assert page.input_value("#prompt") == "Hello world"
        assert page.input_value('[name="temperature"]') == "1.5"
        body = curl.partition("-d '")[2].removesuffix("'").encode()
        answer = at.ask("POST", "/v1/completions", body).json()
        assert answer["choices"][0]["text"] == Tokenizer().decode(before[2:])
        python = page.inner_text("#python")
        compile(python, "copied", "exec")
        assert f"http://127.0.0.1:{at.address[1]}/v1" in python
        page.goto(page.url.partition("#")[0] + "#text=Hi%20there&seed=9")
        assert page.input_value("#prompt") == "Hi there"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(monkeypatch, seconds=0.02)


def test_stop_frees_the_sequence(browser: Any, at: Live, slow: None) -> None:
    with opened(browser, at) as page:
        page.fill('[name="max_tokens"]', "1000")
        page.click("#start")
        page.wait_for_selector(".chip >> nth=9")
        page.click("#stop")
        playwright.expect(page.locator("#status")).to_have_text("Stopped.")
        end = time.monotonic() + 15
        while at.engine.load[0]:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert 10 <= len(ids(page)) < 900


def test_keyboard_alone(browser: Any, at: Live) -> None:
    with opened(browser, at) as page:
        page.focus("#prompt")
        page.keyboard.type(" and")
        for _ in range(6):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # Start
        page.wait_for_selector(".chip >> nth=30")
        settled(page)
        before = ids(page)
        while not page.evaluate("document.activeElement.matches('.chip')"):
            page.keyboard.press("Tab")
        for key in ("End", "ArrowLeft", "Home", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.place") == "2"
        for key in ("Enter", "ArrowDown", "ArrowDown", "ArrowUp", "Escape", "Enter", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        playwright.expect(page.locator("#branches button")).to_have_count(2)
        settled(page)
        top = at.complete(before[:2], max_tokens=1, logprobs=10)["choices"][0]["logprobs"]["top"][0]
        assert ids(page)[:3] == [*before[:2], top[1][0]]
        focusable = page.locator(".chip[tabindex='0']").count()
        assert focusable == 1


def test_a_prefix_and_a_key(browser: Any, path: Path) -> None:
    with ExitStack() as stack:
        running = stack.enter_context(live(path, root_path="/some/gpt", keys=["secret"]))
        page = stack.enter_context(opened(browser, running, "/some/gpt", errors=True))  # the browser logs the status 401
        page.fill("#key input", "secret")
        page.click("#key button")
        start(page, "Hello", max_tokens=5)
        assert len(ids(page)) == 6


def test_a_server_that_goes_away(browser: Any, path: Path, slow: None) -> None:
    """The text so far stays, and the page says that it is not complete."""
    with ExitStack() as stack:
        running = stack.enter_context(live(path, grace_s=0))
        page = stack.enter_context(opened(browser, running, errors=True))
        page.fill('[name="max_tokens"]', "1000")
        page.click("#start")
        page.wait_for_selector(".chip >> nth=20")
        running.server.draining = True
        running.stop()
        playwright.expect(page.locator("#status")).to_contain_text("Error")
        assert len(chips(page)) > 20
        page.click("#start")
        playwright.expect(page.locator("#status")).to_contain_text("Error")
        playwright.expect(page.locator("#start")).to_be_enabled()


def test_a_thousand_tokens_are_drawn_in_time(browser: Any, at: Live) -> None:
    with opened(browser, at) as page:
        start(page, "Hello world " * 512, max_tokens=1)
        assert len(ids(page)) == 1026
        page.click(".chip >> nth=3")
        took = page.evaluate(
            """() => Math.min(...[9, 10, 11, 12, 13].map((place) => { const begin = performance.now();
            document.querySelector(`.chip[data-place="${place}"]`).click();
            document.body.offsetHeight; return performance.now() - begin; }))"""
        )
        assert took < 100  # milliseconds; about 10 on an idle machine


def test_the_engine_s_view(browser: Any, at: Live) -> None:
    with opened(browser, at) as page:
        page.click("#engine summary")
        playwright.expect(page.locator("#numbers tr")).to_have_count(8)
        page.fill('[name="max_tokens"]', "6")
        page.click("#four")
        playwright.expect(page.locator("#lines li")).to_have_count(4)
        page.click("#record")
        page.wait_for_selector("#timeline svg rect", state="attached")
        assert page.locator("#timeline text").count() == at.model.threads
        assert page.locator("#timeline tbody tr").count() >= 9


def test_the_inside_view(browser: Any, at: Live) -> None:
    """The fold shades the tokens by the attention of one head from the chosen token."""
    with opened(browser, at) as page:
        start(page, "Hello world", max_tokens=2)
        page.click("#inside summary")
        page.click(".chip >> nth=3")
        page.fill("#head", "1")
        with page.expect_request("**/inspect") as asked:
            page.press("#head", "Enter")
        playwright.expect(page.locator("#attention-text")).to_contain_text("head 1, from token 3")
        tokens = asked.value.post_data_json["tokens"]
        shares = at.model.activations(tokens, ["probs"])["probs"][0, 1, -1]
        rows = [row.split(":")[0] for row in page.locator("#attention tr").all_inner_texts()]
        assert rows == [str(i) for i in np.argsort(-shares, kind="stable")]
        assert f"p{1 + int(5 * shares[1])}" in page.get_attribute(".chip >> nth=1", "class")
        assert page.locator("#lens tr").count() == at.model.config.L + 1
        assert page.locator("#lens td").count() == 3 * (at.model.config.L + 1)


@pytest.mark.parametrize("width", [320, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(browser: Any, at: Live, width: int, scheme: str) -> None:
    """No sideways scrolling, and a contrast of at least 4.5 for all text, measured in the pixels' colours."""
    with opened(browser, at, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        start(page, HOSTILE, max_tokens=20)
        page.click(".chip >> nth=8")
        page.click("#engine summary")
        page.click("#inside summary")
        page.click(".chip >> nth=4")
        page.wait_for_selector("#lens td", state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for text, ink, paper in page.evaluate(COLOURS):
            assert contrast(ink, paper) >= 4.5, (text, ink, paper)


COLOURS = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colours) => {
    for (const colour of colours) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const hasText = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.disabled && hasText(e)).map((e) => {
    const under = [];
    for (let at = e; at; at = at.parentElement) under.unshift(getComputedStyle(at).backgroundColor);
    return [e.textContent.slice(0, 30), rgb([getComputedStyle(e).color]), rgb(["white", ...under])];
  });
}"""


def contrast(first: list[int], second: list[int]) -> float:
    """The contrast of two colours by WCAG 2."""

    def light(colour: list[int]) -> float:
        parts = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted([light(first), light(second)], reverse=True)
    return (high + 0.05) / (low + 0.05)
