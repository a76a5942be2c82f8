"""Complete texts with GPT-2. Each text is completed on its own.

stdout carries only the replies. If stdout is not a terminal, prompts and output of / commands go to stderr, like notices."""

import argparse
import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from math import exp
from time import perf_counter
from typing import Any, TextIO

from ..config import Config
from ..errors import CheckpointError, InputError, plural
from ..formats.open import of_text_only, open_model
from ..formats.text import given_text, read_text
from ..generation.request import SAMPLING, Request, complete_order
from ..generation.sampling import DEFAULT_SAMPLER, SEEDS
from ..hub.find import find_model
from ..tokenizer import StreamDecoder, end_of_text, tokenizer_of
from .child import ChildError, Command
from .complete import LINE_LIMIT
from .console import Parser, check_stdout, for_terminal, piece, say, status_of, table
from .options import CONTROL, LISTS, add_completion_options, add_model_options, load_options, read_options

PROMPT, CONTINUED = "Text: ", " ...  "
NEW_TOKENS = 40
MOST_TOKENS = LINE_LIMIT // 8  # of a request: an id with its separator takes at most 8 bytes of the child's input line
LONGEST_STOP = 256  # tokens before a reply in which a stop text may begin

EXAMPLES = """\
examples:
  pygpt chat                            ask for texts until Ctrl-D or an empty line; /help lists commands
  pygpt chat "Ladies and"               complete one text
  pygpt chat -n 100 -m gpt2_124M.bin --temp 0.8 --top-p 0.95 Ladies and
  pygpt chat < letter.txt > reply.txt   complete the whole input as one text

If a text is too long for the model's context, its beginning is dropped; --overflow changes this.
Press Ctrl-C once to stop a reply, twice to leave the chat.
"""

HELP = """\
/set               list the settings
/set NAME VALUE    change a setting (/set temperature 0.8); "default" resets it
/again             complete the last text again
/more              continue the last reply
/tokens            show the ids and pieces of the last text and reply
/probs             show the most probable tokens after the last text
/help              show this list
/quit              leave the chat; Ctrl-D and an empty line do the same

//text             send a text that begins with a slash
text\\              continue the text on the next line; \\\\ stands for a final \\
"""

SWITCHES = ("stop_at_eot", "show_stop", "stats")  # settings that are on or off, and are not fields of a request
FIELDS = {"new": "max_new_tokens", "stop": "stop_strings", "stop_token": "stop_token_ids", "speculate": "speculation"}
NAMES = ["new", "sampler", "temperature", "top_k", "top_p", "min_p", *(name for _, name, _, _ in CONTROL)]
NAMES += ["seed", "stop", "stop_token", "overflow", "speculate", *SWITCHES]
SETTINGS = {name: FIELDS.get(name, name) for name in NAMES}  # of /set: name, and its name as a field of a request
ALIASES = {"n": "new", "temp": "temperature", **{flag[2:].replace("-", "_"): name for flag, name, _, _ in CONTROL}}


class Settings:
    """The options of replies, from the command line and from /set."""

    def __init__(self, options: argparse.Namespace, config: Config) -> None:
        self.config, self._end = config, end_of_text(config)
        self._given = {name: getattr(options, name) for name in SWITCHES}
        if options.stop_at_eot is None:
            self._given["stop_at_eot"] = self._end is not None
        self.switches = {**self._given}
        self._defaults = {"max_new_tokens": max(1, min(NEW_TOKENS, config.maxT * 2 // 3))}
        self._asked = read_options(options)  # by the names of a request's fields
        self._asked.pop("stop_at_eot", None)
        self.check([0])

    @property
    def request(self) -> dict[str, Any]:
        """Return the options of a request."""
        return self._defaults | self._asked | ({"stop_at_eot": True} if self.switches["stop_at_eot"] else {})

    @property
    def cuts(self) -> dict[str, Any]:
        """Return the options of a decoder that leaves out the text at which a reply stops."""
        request = {} if self.switches["show_stop"] else self.request
        end = [self._end] if request.get("stop_at_eot") else []
        return {"stop_strings": request.get("stop_strings", []), "stop_token_ids": [*request.get("stop_token_ids", []), *end]}

    def check(self, tokens: Sequence[int]) -> None:
        """Raise InputError if the child would refuse these tokens with these settings."""
        Request(self.config, tokens, **self.request)

    def change(self, name: str, value: str) -> None:
        """Set a setting to the value that the user typed. For a bad value, change nothing and raise InputError."""
        known, key = find_setting(name)
        if key in SWITCHES:
            if value not in ("on", "off", "default"):
                raise InputError(f"{known} is {value!r:.40}: it must be on or off")
            self.switches[key] = self._given[key] if value == "default" else value == "on"
            return
        before = self._asked
        try:
            if value == "default":
                self._asked = {other: kept for other, kept in before.items() if other != key}
            else:
                self._asked = complete_order(read_setting(known, key, value), before)  # removes settings that contradict it
            self.check([0])
        except InputError as error:
            self._asked = before
            subject, is_, limit = str(error).partition(" is ")
            if subject.partition(" ")[0] in (known, key):  # "max_new_tokens (--max-new-tokens) is 'x': ..."
                raise InputError(f"{name}{is_}{limit}") from None
            raise

    def show(self, name: str) -> str:
        """Return a setting's name and value as a line."""
        name, key = find_setting(name)
        if key in SWITCHES:
            shown = "on" if self.switches[key] else "off"
        elif key in self.request:
            value = self.request[key]
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        elif key == "sampler":
            shown = f"default ({DEFAULT_SAMPLER if SAMPLING.isdisjoint(self._asked) else 'sample'})"
        else:
            shown = "default"
        return f"{name:<20} {shown}"


def find_setting(name: str) -> tuple[str, str]:
    """Return a setting's name and its field of a request, for any spelling (top-k, --top-k, TOP_K). Raises InputError."""
    wanted = name.lower().lstrip("-").replace("-", "_")
    for known, key in SETTINGS.items():
        if ALIASES.get(wanted, wanted) in (known, key):
            return known, key
    raise InputError(f"{name!r:.40} is not a setting: the settings are {', '.join(SETTINGS)}")


def read_setting(name: str, key: str, value: str) -> dict[str, Any]:
    """Read a value as the command line reads it. A quoted stop string is JSON, so that it can hold spaces and newlines."""
    if key == "stop_strings" and value.startswith('"'):
        try:
            value = str(json.loads(value))
        except ValueError:
            raise InputError(f'{name} is {value!r:.40}: the quotes must enclose the whole text, as in "\\n\\n"') from None
    words = value.split() if key in ("logit_bias", "suppress_tokens") else [value]
    return read_options(argparse.Namespace(**{key: words if key in (*LISTS, "stop_strings") else value}))


class Chat:
    """A conversation of independent texts and replies, with / commands between them. loading: of GPT2.load(), for /probs."""

    def __init__(self, command: Command, settings: Settings, model: str | None = None, **loading: Any) -> None:
        self._command, self._settings = command, settings
        self._model, self._loading = model, loading
        self._tokenizer = tokenizer_of(settings.config)
        self._leaving, self._repeated = False, 0  # how often /again repeated this text
        self._text: list[int] = []  # ids of the latest text; empty before the first text
        self._reply: list[int] = []  # ids of its reply that were printed
        self._commands: dict[str, Callable[[], None]] = {"/again": self._again, "/more": self._go_on, "/quit": lambda: None}
        self._commands |= {"/tokens": self._show_tokens, "/probs": self._show_probabilities}
        self._commands["/help"] = lambda: show(HELP.rstrip())

    def converse(self) -> int:
        """Ask for texts on the terminal until Ctrl-D, an empty line, or Ctrl-C twice, which raises KeyboardInterrupt."""
        with on_terminal():
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
                show("\n(to leave, press Ctrl-C again or Ctrl-D)")
                continue
            except EOFError:
                show("")
                return 0
            except InputError as error:
                say(str(error))
                continue
            hinted = False
            if text:
                self.take(text)
            elif not select.select([sys.stdin], [], [], 0)[0]:  # more input: the empty line is part of a pasted text
                return 0
        return 0

    def take(self, text: str) -> None:
        """Complete a text or run a / command; report an error in one line."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._obey(text)
            else:
                self.complete(text[1:] if text.startswith("//") else text)
        except (InputError, CheckpointError) as error:
            say(str(error))

    def _obey(self, line: str) -> None:
        """Run a / command. Raises InputError if the command does not exist."""
        name, *rest = line.split(maxsplit=1)
        if name == "/set":
            return self._set(rest[0].strip() if rest else "")
        if name not in self._commands:
            way = "/help lists the commands; to send a text that begins with a slash, type //"
            raise InputError(f"{name!r:.40} is not a command: {way}")
        if rest:
            raise InputError(f"{name} must be alone, but {rest[0]!r:.40} was given; to send this as a text, begin with //")
        if name in ("/again", "/more", "/tokens", "/probs") and not self._text:
            raise InputError("this command needs an earlier text: enter a text first")
        self._leaving = name == "/quit"
        return self._commands[name]()

    def _set(self, wish: str) -> None:
        """Run /set, /set NAME or /set NAME VALUE."""
        name, *value = wish.split(maxsplit=1)[:2] if wish else ("",)
        before = self._settings.request
        if value:
            self._settings.change(name, value[0])
        lines = [self._settings.show(known) for known in ([name] if name else SETTINGS)]
        dropped = [name for name, key in SETTINGS.items() if key in before and key not in self._settings.request]
        if value and value[0] != "default" and dropped:
            lines[0] += f" (removed: {', '.join(dropped)})"
        show("\n".join(lines))

    def complete(self, text: str) -> int:
        """Print the reply to a text and return the exit status: 0, or 130 if Ctrl-C stopped the reply."""
        self._text, self._reply, self._repeated = self._tokenizer.encode(text), [], 0
        self._go_on()
        return 130 if self._command.stopped else 0

    def _again(self) -> None:
        self._reply = []
        self._repeated += 1
        self._go_on()

    def _go_on(self) -> None:
        """Print the continuation of the text and the reply so far, token by token. Raises InputError or ChildError."""
        tokens = self._fitting(self._text + self._reply)
        self._settings.check(tokens)
        request = self._settings.request
        if "seed" in request:  # each /again gives another reply, and another session can repeat them all in order
            request["seed"] = (request["seed"] + self._repeated) % SEEDS
        decoder = StreamDecoder(self._tokenizer, **self._settings.cuts)
        decoder.begin((self._text + self._reply)[-LONGEST_STOP:])  # a stop, or a character that the last reply left incomplete
        times = [perf_counter()]
        with self._command.interruptible():
            try:
                for token in self._command.ask(tokens, request):
                    write(decoder.push(token))
                    self._reply.append(token)
                    times.append(perf_counter())
                write(decoder.finish() + "\n")
            except (ChildError, InputError) as error:
                write("\n" if len(times) > 1 else "")  # so that the message begins a line
                raise (error if isinstance(error, ChildError) else ChildError(str(error))) from None
        stats = self._command.show_notices(others=True) or ""
        if self._settings.switches["stats"]:
            say(speed(times) + "".join(stats.partition("; ")[1:]))  # with the child's count of guesses

    def _fitting(self, tokens: list[int]) -> list[int]:
        """Return the last tokens that leave room for the reply in the context, or that a request can hold with --overflow."""
        config, request = self._settings.config, self._settings.request
        if request.get("overflow") == "stop":
            return tokens
        if "overflow" in request:  # slide
            room, rule = MOST_TOKENS, f"a request holds at most {MOST_TOKENS}"
        else:
            new = request["max_new_tokens"]
            room, rule = config.maxT - new, f"the context holds {config.maxT}, including {new} new tokens"
        if len(tokens) > room:
            what = "text and the reply so far have" if self._reply else "text has"
            say(f"the {what} {len(tokens)} tokens; only the last {room} are used, because {rule}")
        return tokens[-room:]

    def _show_tokens(self) -> None:
        """Show the ids of the text and the reply, each with its piece of text."""
        for name, tokens in ("text", self._text), ("reply", self._reply):
            pieces = [f"{token:>7}  {piece(self._tokenizer.decode_bytes([token]))}" for token in tokens]
            show("\n".join([f"{name}: {plural(len(tokens), 'token')}", *pieces]))

    def _show_probabilities(self) -> None:
        """Show the most probable tokens after the text, with bars. The child returns only ids, so run the model here."""
        from ..model import GPT2

        tokens, overflow = self._fitting(self._text), self._settings.request.get("overflow")
        try:
            with GPT2.load(self._model, **self._loading) as model:
                count = min(10, model.config.V)
                [completion] = model.generate_batch([tokens], max_new_tokens=1, overflow=overflow, top_logprobs=count)
        except KeyboardInterrupt:
            return show("")
        rows = [(token, self._tokenizer.decode_bytes([token]), exp(logprob)) for token, logprob in completion.infos[0].top]
        return show(table(rows, prompt_stream()))


def speed(times: Sequence[float]) -> str:
    """Describe a reply's speed. times: when it was requested and when each token arrived, in seconds."""
    begin, *tokens = times
    if not tokens:
        return "0 tokens"
    rest = f", then {(len(tokens) - 1) / (tokens[-1] - tokens[0]):.1f} tokens/s" if tokens[-1] > tokens[0] else ""
    return f"{plural(len(tokens), 'token')}, the first after {tokens[0] - begin:.2f} s{rest}"


def line_reader() -> Callable[[str], str]:
    """Return a function that asks for a line on the terminal; several pasted lines may be one text.

    prompt_toolkit or else readline provides history, editing and pasting. If both are missing or TERM is dumb, use input()."""
    dumb, bold = os.environ.get("TERM", "dumb") == "dumb", not os.environ.get("NO_COLOR")
    if not dumb:
        with suppress(ImportError):
            session = import_module("prompt_toolkit").PromptSession(enable_suspend=True)
            return lambda prompt: str(session.prompt([("bold" if bold else "", prompt)]))
    with suppress(ImportError):
        readline = import_module("readline")  # input() uses it
        if not dumb:
            readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off; libedit lacks it
            return lambda prompt: input(f"\001\033[1m\002{prompt}\001\033[0m\002" if bold else prompt)
    return input


@contextmanager
def on_terminal() -> Iterator[None]:
    """In this block, stdout is the terminal, where line editors write. Without an editor, a terminal cuts long lines."""
    held = os.dup(1)
    if not os.isatty(1):
        os.dup2(2 if os.isatty(2) else 0, 1)
    try:
        yield
    finally:
        os.dup2(held, 1)
        os.close(held)


def ask_text(ask: Callable[[str], str]) -> str:
    """Ask for a text. If a line ends in a backslash, ask for the next line too. Two backslashes at the end stand for one."""
    with on_terminal():
        text = given_text(ask(PROMPT))
        while text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1] + "\n" + given_text(ask(CONTINUED))
    return text[:-1] if text.endswith("\\\\") else text


def prompt_stream() -> TextIO:
    """Return the stream of the prompt, which also shows the output of / commands."""
    return sys.stdout if sys.stdout.isatty() else sys.stderr


def show(text: str) -> None:
    """Show the output of a / command."""
    print(text, file=prompt_stream())


def read_piped() -> str:
    """Read all of stdin as one text, without its last newline. Raises InputError if it is empty or not UTF-8."""
    text = "".join(read_text("-")).removesuffix("\n")
    if not text:
        raise InputError("the text on standard input is empty: send at least one character")
    return text


def write(text: str) -> None:
    """Print a part of the reply and flush."""
    sys.stdout.write(for_terminal(text, sys.stdout))
    sys.stdout.flush()


def passed_on(options: argparse.Namespace) -> list[str]:
    """Return the given options of the model, for the child."""
    valued = {name: getattr(options, name) for name in ("model", "threads", "tokenizer", "weights", "draft_model")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in valued.items() if value is not None]
    switches = {"--text-only": options.text_only, "--no-mmap": options.no_mmap, "--stats": options.stats}  # it counts guesses
    return words + [flag for flag, given in switches.items() if given]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt chat", usage="pygpt chat [options] [TEXT ...]", description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("words", nargs="*", metavar="TEXT", help="complete this text and exit; without TEXT, ask for texts")
    new = f"number of new tokens in a reply (default {NEW_TOKENS})"
    add("-n", "--new", "--max-new-tokens", dest="max_new_tokens", metavar="N", help=new)
    add("-m", "--model", metavar="MODEL", help="a model file or a downloaded model (default: see pygpt --help)")
    add_model_options(add)
    add_completion_options(parser)
    add("--show-stop", action="store_true", help="print also the stop text at which a reply ends")
    add("--stats", action="store_true", help="print the speed on stderr after each reply")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # argparse itself drops a -- between words
    options = build_parser().parse_intermixed_args(argv[:cut])
    options.words += argv[cut + 1 :]
    return options


def run(options: argparse.Namespace) -> int:
    """Complete the text in the arguments or on stdin; if stdin is a terminal, converse. Return the exit status."""
    if options.words and not any(options.words):
        raise InputError("the text is empty: give at least one character")
    with open_model(find_model(options.model)[0], tokenizer=options.tokenizer) as checkpoint:
        settings = Settings(options, (of_text_only(checkpoint) if options.text_only else checkpoint).config)
    with Command(passed_on(options)) as command:  # start it first: it loads the model while this process prepares
        chat = Chat(command, settings, options.model, threads=options.threads, **load_options(options))
        if not options.words and sys.stdin.isatty():
            return chat.converse()
        return chat.complete(given_text(" ".join(options.words)) if options.words else read_piped())


def prepare_streams() -> None:
    """Let stdout replace what it cannot encode, and stdin keep what it cannot decode. Open the null device for `2>&-`."""
    for name, mode in ("stdin", "r"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (stays open until exit)
    for stream, errors in (sys.stdin, "surrogateescape"), (sys.stdout, "replace"):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat and return its exit status: 0, 1 (failure), 2 (usage), 130 (Ctrl-C), 141 (broken pipe)."""
    prepare_streams()

    def job() -> int:
        try:
            check_stdout("the reply")
            return run(parse(argv))
        except KeyboardInterrupt:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a full pipe must not block the exit
            print(file=sys.stderr)
            raise

    return status_of(job)
