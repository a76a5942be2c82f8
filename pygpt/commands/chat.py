"""Chat with GPT-2: a text goes in, the model's continuation comes out while it is generated.

The `pygpt` command does the work, as one child process for all texts (child.py). This program is its user interface: it turns
text into ids, and ids into text in whole characters. Standard output carries only the replies. If it is not the terminal,
prompts and the output of / commands go to standard error, like notices and errors.

The child judges the model file and the thread count; its one-line error is shown. GPT-2 completes each text on its own: a
conversation has no roles.
"""

import argparse
import io
import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from math import exp
from shutil import get_terminal_size
from time import perf_counter
from typing import Any, TextIO

from ..config import Config
from ..errors import CheckpointError, InputError
from ..formats.open import open_model
from ..generation.request import SAMPLING, Request, complete_order
from ..generation.sampling import DEFAULT_SAMPLER, SEEDS
from ..hub.find import find_model
from ..tokenizer import StreamDecoder, Tokenizer
from .child import ChildError, Command
from .complete import LINE_LIMIT
from .console import HelpFormatter, Parser, for_terminal, say, status_of
from .options import add_completion_options, parse_count, read_options

PROMPT, CONTINUED = "Text: ", " ...  "
NEW_TOKENS = 40
MOST_TOKENS = LINE_LIMIT // 8  # of a request: a line of the child's input holds them, whatever their ids
PROBABLE = 10  # tokens that /probs shows
BAR = 40  # columns of the longest bar, where the terminal has them

EXAMPLES = """\
examples:
  pygpt chat                            ask for texts until Ctrl-D or an empty line; /help lists the commands
  pygpt chat "Ladies and"               answer once
  pygpt chat -n 100 -m gpt2_124M.bin --temp 0.8 --top-p 0.95 Ladies and
  pygpt chat < letter.txt > reply.txt   the whole input is one text

If a text is too long for the model's context, its beginning is dropped; --overflow changes that.
Ctrl-C stops a reply; pressed twice, it leaves the chat.
"""

HELP = """\
/set               list the settings
/set NAME VALUE    change one, as in /set temperature 0.8; "default" undoes that
/again             another completion of the last text
/more              go on with the last reply
/tokens            ids and pieces of the last text and reply
/probs             the most probable tokens after the last text, by the network
/help              this list
/quit              leave, as Ctrl-D and an empty line do

//text             a text that begins with a slash
text\\              goes on in the next line; \\\\ at the end is a backslash
"""


# ---------------------------------------------------------------- settings

# What /set knows: a setting's name, its other names, and what the `pygpt` command's requests call it.
SETTINGS = {
    "new": (("n", "max_new_tokens"), "max_new_tokens"),
    "sampler": ((), "sampler"),
    "temperature": (("temp",), "temperature"),
    "top_k": ((), "top_k"),
    "top_p": ((), "top_p"),
    "min_p": ((), "min_p"),
    "repetition_penalty": (("repeat_penalty",), "repetition_penalty"),
    "seed": ((), "seed"),
    "stop": (("stop_strings",), "stop_strings"),
    "stop_token": (("stop_token_ids",), "stop_token_ids"),
    "overflow": ((), "overflow"),
    "stats": ((), "stats"),
}


class Settings:
    """How replies are made: options of the command line, which /set changes. Raises InputError for a bad one.

    config: the dimensions of the model that will answer; None if the model does not open, which the child reports.
    """

    def __init__(self, options: argparse.Namespace, config: Config | None) -> None:
        self.config = config
        self.stats: bool = options.stats
        self._defaults = {"max_new_tokens": NEW_TOKENS if config is None else min(NEW_TOKENS, config.maxT - 1)}
        self._asked = read_options(options)  # in a request's words
        self.check([0])

    @property
    def request(self) -> dict[str, Any]:
        """The options of a request."""
        return self._defaults | self._asked

    def check(self, tokens: Sequence[int]) -> None:
        """Raise InputError if the child would refuse these tokens with these settings."""
        if self.config is not None:
            Request(self.config, tokens, **self.request)

    def change(self, name: str, value: str) -> None:
        """Set one from what the user has typed. For a bad value, raise InputError in the user's words and change nothing."""
        typed = name
        name, key = find_setting(typed)
        if key == "stats":
            if value not in ("on", "off", "default"):
                raise InputError(f"stats is {value!r:.40}: it must be on or off")
            self.stats = value == "on"
            return
        before = self._asked
        try:
            if value == "default":
                self._asked = {other: kept for other, kept in before.items() if other != key}
            else:
                self._asked = complete_order(read_setting(name, key, value), before)  # drops what the new one rules out
            self.check([0])
        except InputError as error:
            self._asked = before
            subject, is_, limit = str(error).partition(" is ")
            if subject.partition(" ")[0] in (name, key):  # "max_new_tokens (--max-new-tokens) is 'x': ..."
                raise InputError(f"{typed}{is_}{limit}") from None
            raise

    def show(self, name: str) -> str:
        """One of them as a line."""
        name, key = find_setting(name)
        if key == "stats":
            shown = "on" if self.stats else "off"
        elif key in self.request:
            value = self.request[key]
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        elif key == "sampler":
            shown = f"default ({DEFAULT_SAMPLER if SAMPLING.isdisjoint(self._asked) else 'sample'})"
        else:
            shown = "default"
        return f"{name:<20} {shown}"


def find_setting(name: str) -> tuple[str, str]:
    """A setting as its user calls it (top-k, --top-k, TOP_K) -> its name, and a request's. Raises InputError."""
    wanted = name.lower().lstrip("-").replace("-", "_")
    for known, (others, key) in SETTINGS.items():
        if wanted == known or wanted in others:
            return known, key
    raise InputError(f"{name!r:.40} is not a setting: the settings are {', '.join(SETTINGS)}")


def read_setting(name: str, key: str, value: str) -> dict[str, Any]:
    """Read a value as the command line would. A stop string may be quoted as in JSON, for its spaces and newlines."""
    given: str | list[str] = value
    if key == "stop_strings" and value.startswith('"'):
        try:
            given = str(json.loads(value))
        except ValueError:
            raise InputError(f'{name} is {value!r:.40}: quotes must enclose it all, as in "\\n\\n"') from None
    blank = build_parser().parse_args([])
    setattr(blank, key, [given] if key in ("stop_strings", "stop_token_ids") else given)
    return read_options(blank)


# ---------------------------------------------------------------- the conversation


class Chat:
    """A conversation of independent texts and replies, and the commands between them.

    model, threads: as on the command line, for /probs, which the child cannot answer.
    """

    def __init__(self, command: Command, settings: Settings, *, model: str | None = None, threads: str | None = None) -> None:
        self._command, self._settings = command, settings
        self._model, self._threads = model, threads
        self._tokenizer = Tokenizer()
        self._text: list[int] = []  # the latest, as ids; empty: there was none
        self._reply: list[int] = []  # to it, as far as it was shown
        self._repeated = 0  # times that this text was completed again
        self._leaving = False
        self._commands: dict[str, Callable[[], None]] = {
            "/again": self._again,
            "/more": self._more,
            "/tokens": self._show_tokens,
            "/probs": self._show_probabilities,
            "/help": lambda: show(HELP.rstrip()),
            "/quit": self._leave,
        }

    def answer(self, text: str) -> int:
        """Print the reply to one text and return the exit status: 130 when Ctrl-C stopped it."""
        self._complete(text)
        return 130 if self._command.stopped else 0

    def converse(self) -> int:
        """Ask on the terminal for text after text, until Ctrl-D, an empty line, or Ctrl-C twice (KeyboardInterrupt)."""
        ask = line_reader()
        hinted = False
        while not self._leaving:
            self._command.check()
            try:
                text = ask_text(ask)
            except KeyboardInterrupt:
                if hinted:
                    raise
                hinted = True
                show("\n(Ctrl-C again leaves, and so does Ctrl-D)")
                continue
            except EOFError:
                show("")
                return 0
            hinted = False
            if text:
                self.take(text)
            elif not input_waits():
                return 0
        return 0

    def take(self, text: str) -> None:
        """Complete a text or obey a command; report an error in one line."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._obey(text)
            else:
                self._complete(text[1:] if text.startswith("//") else text)
        except (InputError, CheckpointError) as error:
            say(str(error))

    def _obey(self, line: str) -> None:
        """Run a / command. Raises InputError if there is no command of this name."""
        name, *rest = line.split(maxsplit=1)
        if name == "/set":
            self._set(rest[0].strip() if rest else "")
        elif name not in self._commands:
            raise InputError(
                f"{name!r:.40} is not a command: /help lists the commands; to send a text that begins with a slash, type //"
            )
        elif rest:
            raise InputError(f"{name} takes nothing after it, and there is {rest[0]!r:.40}; to send this as a text, type //")
        else:
            self._commands[name]()

    def _set(self, wish: str) -> None:
        """/set, /set NAME or /set NAME VALUE."""
        name, *value = wish.split(maxsplit=1)[:2] if wish else ("",)
        before = self._settings.request
        if value:
            self._settings.change(name, value[0])
        lines = [self._settings.show(known) for known in ([name] if name else SETTINGS)]
        dropped = [name for name, (_, key) in SETTINGS.items() if key in before and key not in self._settings.request]
        if value and value[0] != "default" and dropped:
            lines[0] += f" (and no more {', '.join(dropped)})"
        show("\n".join(lines))

    def _complete(self, text: str) -> None:
        """Print the reply to a text."""
        self._text, self._reply, self._repeated = self._tokenizer.encode(text), [], 0
        self._go_on()

    def _again(self) -> None:
        """Print another reply to the last text."""
        self._require_text()
        self._reply = []
        self._repeated += 1
        self._go_on()

    def _more(self) -> None:
        """Print what follows the last reply."""
        self._require_text()
        self._go_on()

    def _require_text(self) -> None:
        """Raise InputError if there was no text yet."""
        if not self._text:
            raise InputError("there is no text yet: type one first")

    def _leave(self) -> None:
        self._leaving = True

    def _go_on(self) -> None:
        """Print what follows the text and the reply so far, token by token.

        Raises InputError before the first token, ChildError after it. An error ends a begun line first, so that the message
        has a line of its own.
        """
        tokens = self._fitting(self._text + self._reply)
        self._settings.check(tokens)
        request = self._settings.request
        if "seed" in request:  # the same text again gets another reply, and the next session the same ones in this order
            request["seed"] = (request["seed"] + self._repeated) % SEEDS
        decoder = StreamDecoder(self._tokenizer)
        for token in self._reply[-3:]:  # a character that the last reply broke off is completed
            decoder.push(token)
        times = [perf_counter()]
        with self._command.interruptible():
            try:
                for token in self._command.ask(tokens, request):
                    write(decoder.push(token))
                    self._reply.append(token)
                    times.append(perf_counter())
                write(decoder.finish() + "\n")
            except (ChildError, InputError) as error:
                if len(times) > 1:
                    write("\n")
                raise ChildError(str(error)) from None
        self._command.show_notices(others=True)
        if self._settings.stats:
            say(speed(times))

    def _fitting(self, tokens: list[int]) -> list[int]:
        """Return the last tokens that leave room for the reply in the context, with a notice if some are dropped.

        With --overflow, the child deals with long texts: all tokens that fit into a request are returned.
        """
        config, request = self._settings.config, self._settings.request
        if config is None or request.get("overflow") == "stop":
            return tokens
        if "overflow" in request:  # slide
            room, rule = MOST_TOKENS, f"a request holds {MOST_TOKENS}"
        else:
            new = request["max_new_tokens"]
            room, rule = config.maxT - new, f"the context holds {config.maxT}, {new} of them new"
        if len(tokens) <= room:
            return tokens
        what = "text and the reply so far have" if self._reply else "text has"
        say(f"the {what} {len(tokens)} tokens, of which the last {room} are used: {rule}")
        return tokens[-room:]

    def _show_tokens(self) -> None:
        """Show the ids of text and reply with the pieces that they stand for."""
        self._require_text()
        for name, tokens in ("text", self._text), ("reply", self._reply):
            show("\n".join([f"{name}: {len(tokens)} tokens", *(f"{token:>7}  {self._piece(token)}" for token in tokens)]))

    def _show_probabilities(self) -> None:
        """Show the most probable tokens after the text, with bars. The child tells ids only, so the model is opened here."""
        self._require_text()
        from ..model import GPT2

        threads = None if self._threads is None else parse_count("threads (-t)", self._threads)
        tokens = self._fitting(self._text)
        overflow = self._settings.request.get("overflow")
        try:
            with GPT2.load(self._model, threads=threads) as model:
                [completion] = model.generate_batch(
                    [tokens], max_new_tokens=1, overflow=overflow, top_logprobs=min(PROBABLE, model.config.V)
                )
        except KeyboardInterrupt:
            show("")
            return
        [info] = completion.infos
        pieces = [self._piece(token) for token, _ in info.top]
        width = max(map(len, pieces))
        longest = max(1, min(BAR, get_terminal_size().columns - width - 21))  # all in one line
        block = "█" if "█".encode(prompt_stream().encoding, "ignore") else "#"
        for piece, (token, logprob) in zip(pieces, info.top, strict=True):
            bar = block * round(longest * exp(logprob - info.top[0][1]))
            show(f"{token:>7}  {piece:<{width}}  {100 * exp(logprob):6.2f} %  {bar}".rstrip())

    def _piece(self, token: int) -> str:
        """What an id stands for, in quotes: text, or the bytes of a part of a character."""
        content = self._tokenizer.decode_bytes([token])
        try:
            return repr(content.decode())
        except UnicodeDecodeError:
            return repr(content)


def speed(times: Sequence[float]) -> str:
    """When a reply was asked for and when each token came, in seconds, as a sentence."""
    begin, *tokens = times
    if not tokens:
        return "no token"
    told = f"{len(tokens)} tokens, the first after {tokens[0] - begin:.2f} s"
    if tokens[-1] > tokens[0]:
        told += f", then {(len(tokens) - 1) / (tokens[-1] - tokens[0]):.1f} tokens/s"
    return told


# ---------------------------------------------------------------- terminal and pipes


def line_reader() -> Callable[[str], str]:
    """Return how to ask for a line on the terminal. A pasted text of several lines may come as one line.

    prompt_toolkit gives history, editing and pasting; without it, readline does; without both, or on a dumb terminal, input().
    """
    if not sys.stdout.isatty():
        return ask_plainly
    readline = None
    with suppress(ImportError):
        readline = import_module("readline")  # for input(); without a terminal, importing it may write to stdout
    if os.environ.get("TERM", "dumb") == "dumb":
        return input
    bold = not os.environ.get("NO_COLOR")
    with suppress(ImportError):
        session = import_module("prompt_toolkit").PromptSession(enable_suspend=True)
        return lambda prompt: str(session.prompt([("bold" if bold else "", prompt)]))
    if readline is None:
        return input
    readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off; libedit has none
    return lambda prompt: input(f"\001\033[1m\002{prompt}\001\033[0m\002" if bold else prompt)


def ask_plainly(prompt: str) -> str:
    """Ask for a line where standard output is not the terminal."""
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def ask_text(ask: Callable[[str], str]) -> str:
    """Ask for a text: a line, and the next line if it ends in a backslash. Two backslashes at the end stand for one."""
    text = ask(PROMPT)
    while text.endswith("\\") and not text.endswith("\\\\"):
        text = text[:-1] + "\n" + ask(CONTINUED)
    return text[:-1] if text.endswith("\\\\") else text


def input_waits() -> bool:
    """Whether more was typed. An empty line is then part of a pasted text, and the shell must not get the rest."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def prompt_stream() -> TextIO:
    """The stream that shows the prompt, for what belongs to it."""
    return sys.stdout if sys.stdout.isatty() else sys.stderr


def show(text: str) -> None:
    """Show what a / command answers."""
    print(text, file=prompt_stream())


def read_piped() -> str:
    """Read the whole of standard input as one text, without its last newline."""
    print(PROMPT, end="", file=sys.stderr, flush=True)
    text = sys.stdin.buffer.read().removesuffix(b"\n").decode("utf-8", "replace")
    print(file=sys.stderr)
    if not text:
        raise InputError("the text on standard input is empty")
    return text


def write(text: str) -> None:
    """Write reply text, at once."""
    sys.stdout.write(for_terminal(text, sys.stdout))
    sys.stdout.flush()


# ---------------------------------------------------------------- the command line


class PassOn(argparse.Action):
    """Keep an option as it was given, in `passed`, for the child to judge."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Note the option's last value, and add its words to those that the child gets."""
        assert option_string is not None
        setattr(namespace, self.dest, values)
        word = option_string if self.nargs == 0 else f"{option_string}{'=' * option_string.startswith('--')}{values}"
        namespace.passed = [*namespace.passed, word]


def build_parser() -> argparse.ArgumentParser:
    """The options and their help."""
    parser = Parser(
        prog="pygpt chat",
        usage="pygpt chat [options] [TEXT ...]",
        description="Chat with GPT-2 on the CPU.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(passed=[], total=None)
    parser.add_argument("words", nargs="*", metavar="TEXT", help="answer this text once; without it, ask for texts")
    parser.add_argument(
        "-n",
        "--new",
        "--max-new-tokens",
        dest="max_new_tokens",
        metavar="N",
        help=f"new tokens in a reply (default {NEW_TOKENS})",
    )
    parser.add_argument("-m", "--model", action=PassOn, metavar="FILE", help="llm.c checkpoint, as for the pygpt command")
    parser.add_argument("-t", "--threads", action=PassOn, metavar="N", help="worker threads, as for the pygpt command")
    parser.add_argument("--no-mmap", action=PassOn, nargs=0, help="read the model into memory, as the pygpt command does")
    add_completion_options(parser)
    parser.add_argument("--stats", action="store_true", help="after each reply its speed, on standard error")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # argparse itself loses it between words
    options = build_parser().parse_intermixed_args(argv[:cut])
    options.words += argv[cut + 1 :]
    return options


def model_config(model: str | None) -> Config | None:
    """Return the dimensions of the model that will answer, or None if it does not open: the child reports why."""
    try:
        with open_model(find_model(model)[0]) as checkpoint:
            return checkpoint.config
    except (CheckpointError, MemoryError):
        return None


def run(options: argparse.Namespace) -> int:
    """Answer the text given in words or through a pipe, or else converse. Returns the exit status."""
    if options.words and not any(options.words):
        raise InputError("the text is empty")
    settings = Settings(options, model_config(options.model))
    with Command(options.passed) as command:  # started first, to load the model meanwhile
        chat = Chat(command, settings, model=options.model, threads=options.threads)
        if options.words:
            return chat.answer(" ".join(options.words))
        if sys.stdin.isatty():
            return chat.converse()
        return chat.answer(read_piped())


def prepare_streams() -> None:
    """Make the standard streams take any text, and the null device stand for those that are closed (`2>&-`)."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
    for stream in sys.stdin, sys.stdout:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat and return its exit status: 0, 1 (failure), 2 (usage), 130 (Ctrl-C), 141 (broken pipe)."""
    prepare_streams()
    status = 0

    def job() -> None:
        nonlocal status
        try:
            status = run(parse(argv))
        except KeyboardInterrupt:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a full pipe must not block the exit
            print(file=sys.stderr)
            raise

    return status_of(job) or status
