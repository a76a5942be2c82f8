"""Chat with GPT-2: a text goes in, the model's continuation comes out while it is generated.

The `pygpt` command does the work, as one child process for all texts; this program is its user interface. It turns text
into ids and ids into text, never half a character. Standard output carries the replies and nothing else: where it is
not the terminal, prompts go to standard error, as notices and errors always do.

Refuses to judge the model file, the thread count and the sampler: the child does, and its one-line error is shown.
"""

import argparse
import io
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import PathFinder
from types import FrameType
from typing import Any, NoReturn, TextIO

from pygpt.checkpoint import Checkpoint, find_model
from pygpt.errors import CheckpointError, PyGPTError
from pygpt.tokenizer import StreamDecoder, Tokenizer

PROMPT = "Text: "
NEW_TOKENS = 40
NOTICE, ERROR = "pygpt: ", "pygpt: error: "  # how the child's own lines on its standard error begin
LONGEST_ID = 7  # digits: no vocabulary has more than 2^20 ids
GRACE_SECONDS = 5.0  # for the child to end once its input has ended
INTERRUPTED = (130, -signal.SIGINT)  # how Ctrl-C ends a child: by its own rule, or before it could set one up

EXAMPLES = """\
examples:
  python chat.py                            ask for texts until Ctrl-D or an empty line
  python chat.py "Ladies and"               answer once
  python chat.py -n 100 -m gpt2_124M.bin Ladies and
  python chat.py < letter.txt > reply.txt   the whole input is one text

Ctrl-C stops a reply; pressed twice, it leaves.
"""


class Failure(Exception):
    """Ends the chat: one line for standard error, and the exit status."""

    def __init__(self, line: str, status: int = 1) -> None:
        super().__init__(line)
        self.status = status


def usage_error(message: str) -> Failure:
    """Make the failure for something that the user asked for and cannot have."""
    return Failure(f"chat.py: error: {message}", status=2)


# ---------------------------------------------------------------- the child


class Command:
    """The `pygpt` command as a long-lived child process. Use it in a `with` block.

    Its protocol: a JSON object a line on its input; on its output the new ids, each written when it is known, separated
    by spaces and ended by a newline. SIGINT ends a reply early, and ends the child when it is idle.

    The child gets a process group of its own, so that the terminal's Ctrl-C reaches the chat alone, which passes it on.
    If the chat is killed, the child finds its input ended and ends too.
    """

    def __init__(self, options: Sequence[str]) -> None:
        self.stopped = False  # whether Ctrl-C stopped the latest reply
        self._argv = [sys.executable, "-m", "pygpt", *options, "-"]
        self._shown: set[str] = set()  # notices, which a child that was started again repeats
        self._start()

    def _start(self) -> None:
        self._child = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=child_environment(),
            start_new_session=True,
        )
        pipes = self._child.stdin, self._child.stdout, self._child.stderr
        self._stdin, self._stdout, self._stderr = [pipe for pipe in pipes if pipe]  # there are three, as asked
        for pipe in self._stdin, self._stdout, self._stderr:
            os.set_blocking(pipe.fileno(), False)
        self._unseen = b""  # what it wrote to its standard error and nobody has seen yet
        self._signalled = False  # whether this child ever got a Ctrl-C

    def ask(self, tokens: Sequence[int], new: int) -> Iterator[int]:
        """Yield up to `new` ids that continue `tokens`, each as soon as it is there, and none after stop().

        Raises Failure when the child ends in between or says anything but ids.
        """
        if self.stopped:
            return
        self._stdout.read(1 << 20)  # what a Ctrl-C made the child say after the end of an earlier reply
        request = json.dumps({"tokens": tokens, "max_new_tokens": new}).encode() + b"\n"
        silent = True
        try:
            for token in read_ids(self._exchange(request)):
                if silent:
                    self.show_notices()  # before the reply, as the child wrote them
                silent = False
                if not self.stopped:
                    yield token
        except EOFError:
            if not self._ended_by_ctrl_c():
                raise self._failure() from None
            if silent and not self.stopped:  # the Ctrl-C for an earlier reply came when that was complete
                self._end()
                self._start()
                yield from self.ask(tokens, new)

    def _exchange(self, request: bytes) -> Iterator[bytes]:
        """Send the request and yield what the child answers, until it closes its output.

        All three pipes are served in one loop, so that neither process ever waits for the other to empty a full one.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._stdin in ready and not (request := self._send(request)):
                    selector.unregister(self._stdin)
                if self._stderr in ready and not self._listen():
                    selector.unregister(self._stderr)
                if self._stdout in ready:
                    data = self._stdout.read(65536)
                    self._listen()  # a notice written before this data must not be seen after it
                    if not data:
                        return
                    yield data

    def _send(self, request: bytes) -> bytes:
        """Write what the pipe takes and return the rest: nothing when the child has ended, as its output will tell."""
        try:
            return request[self._stdin.write(request) or 0 :]
        except BrokenPipeError:
            return b""

    def _listen(self) -> bool:
        """Keep what the child has written to its standard error. False at the end of it."""
        data = self._stderr.read(1 << 20)  # None when there is nothing now
        self._unseen += data or b""
        return data != b""

    def show_notices(self, *, others: bool = False) -> None:
        """Show the child's notices, each once, and the `others` of its whole lines if wanted: all but its errors.

        Those others could be the beginning of a traceback, so they wait until it is clear that the child goes on.
        """
        kept = b""
        for raw in self._unseen.splitlines(keepends=True):
            line = raw.decode("utf-8", "replace").rstrip()
            if line.startswith(ERROR) or not raw.endswith(b"\n") or not (others or line.startswith(NOTICE)):
                kept += raw
            elif line not in self._shown:
                self._shown.add(line)
                print(line, file=sys.stderr)
        self._unseen = kept

    def check(self) -> None:
        """Raise Failure if the child has ended unasked, as it does for a bad option: no text need be typed for it."""
        if self._child.poll() is not None and not self._ended_by_ctrl_c():
            raise self._failure()

    def _ended_by_ctrl_c(self) -> bool:
        """Whether the child, whose output has ended, was ended by a Ctrl-C that was passed on to it."""
        return self._child.wait() in INTERRUPTED and self._signalled

    def _failure(self) -> Failure:
        """Say in one line why the child has ended: in its own words if it left an error line, else in ours."""
        status = self._child.wait()
        self._listen()
        heard, _, last = self._unseen.decode("utf-8", "replace").rstrip().rpartition("\n")
        if status in (1, 2, -signal.SIGBUS) and last.startswith(NOTICE):  # an error, even if it should not say so
            self._unseen = heard.encode() + b"\n"
            line = last
        else:
            how = f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"
            line = f"chat.py: error: the pygpt command {how}"
            if last and not last.startswith(NOTICE):
                line += f": {last.strip()}"
        self.show_notices()
        return Failure(line)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In this block Ctrl-C stops the reply, without an exception; only a second one raises KeyboardInterrupt."""

        def on_ctrl_c(_signal: int, _frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stop()

        self.stopped = False
        before = signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def stop(self) -> None:
        """Stop the reply: pass Ctrl-C on to the child, which then ends its line."""
        self.stopped = self._signalled = True
        self._child.send_signal(signal.SIGINT)

    def _end(self) -> None:
        """End the child by ending its input, by force if that does not help."""
        self._stdin.close()
        try:
            self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._stdout.close()
        self._stderr.close()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is not None:  # it may be deep in a computation that nobody wants any more
            self._child.kill()
        self._end()


def child_environment() -> dict[str, str]:
    """Return the child's environment, by which it finds the pygpt beside this file where no other is installed.

    Python puts the folder of this script on the path here, but not in the child. For `-m` it would put the current
    folder there, and any file in it could take the place of a module: PYTHONSAFEPATH leaves it out.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    spec = PathFinder.find_spec("pygpt", [entry for entry in sys.path if os.path.realpath(entry) != here])
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if spec is None or spec.origin is None:  # no origin: a mere folder of that name
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    return environment


def read_ids(chunks: Iterable[bytes]) -> Iterator[int]:
    """Read one line of ids, each as soon as the space or newline after it has come. EOFError if the line never ends."""
    rest = b""
    for chunk in chunks:
        line, newline, _ = (rest + chunk).partition(b"\n")
        *words, rest = line.split(b" ")
        if newline or len(rest) > LONGEST_ID:
            words.append(rest)
        for word in filter(None, words):
            yield read_id(word)
        if newline:
            return
    raise EOFError


def read_id(word: bytes) -> int:
    """Read one id, or raise Failure."""
    if not word.isdigit() or len(word) > LONGEST_ID:
        found = word[:40].decode("utf-8", "replace")
        raise Failure(f"chat.py: error: the pygpt command answered {found!r} where a token id was expected")
    return int(word)


# ---------------------------------------------------------------- the conversation


class Chat:
    """A conversation of independent texts and replies of `new` tokens; `maxT` is the model's context if known."""

    def __init__(self, command: Command, new: int, maxT: int | None) -> None:
        self._command, self._new, self._maxT = command, new, maxT
        self._tokenizer = Tokenizer()

    def answer(self, text: str) -> int:
        """Print the reply to one text and return the exit status: 130 when Ctrl-C stopped it."""
        self._reply(text)
        return 130 if self._command.stopped else 0

    def converse(self) -> int:
        """Ask on the terminal for text after text, until Ctrl-D, an empty line, or Ctrl-C twice (KeyboardInterrupt)."""
        hinted = False
        while True:
            self._command.check()
            try:
                text = ask_user()
            except KeyboardInterrupt:
                if hinted:
                    raise
                hinted = True
                print("\n(Ctrl-C again leaves, and so does Ctrl-D)", file=prompt_stream())
                continue
            except EOFError:
                print(file=prompt_stream())
                return 0
            if not text:
                return 0
            hinted = False
            self._reply(text)

    def _reply(self, text: str) -> None:
        """Print the reply to a text as it comes. An error ends a begun line first, and so gets a line to itself."""
        begun = False
        with self._command.interruptible():
            try:
                for piece in self._pieces(text):
                    write(piece)
                    begun = True
            except (Failure, PyGPTError):
                if begun:
                    write("\n")
                raise
        self._command.show_notices(others=True)

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield the reply's text, token by token, and the newline after it."""
        decoder = StreamDecoder(self._tokenizer)
        for token in self._command.ask(self._fitting(self._tokenizer.encode(text)), self._new):
            yield decoder.push(token)
        yield decoder.finish() + "\n"

    def _fitting(self, tokens: list[int]) -> list[int]:
        """Return the last tokens that leave room for the reply in the context; say so if that is not all."""
        if self._maxT is None or len(tokens) <= (room := self._maxT - self._new):
            return tokens
        print(
            f"chat.py: the text has {len(tokens)} tokens, of which the last {room} are used: "
            f"the context holds {self._maxT}, {self._new} of them new",
            file=sys.stderr,
        )
        return tokens[-room:]


def ask_user() -> str:
    """Ask for a line on the terminal: by input()'s own prompt if standard output is the terminal, too."""
    if sys.stdout.isatty():
        with suppress(ImportError):
            import_module("readline")  # gives input() line editing; without a terminal, importing it may write to stdout
        return input(PROMPT)
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def prompt_stream() -> TextIO:
    """The stream that shows the prompt, for what belongs to it."""
    return sys.stdout if sys.stdout.isatty() else sys.stderr


def read_piped() -> str:
    """Read the whole of standard input as one text, without its last newline."""
    print(PROMPT, end="", file=sys.stderr, flush=True)
    text = sys.stdin.buffer.read().removesuffix(b"\n").decode("utf-8", "replace")
    print(file=sys.stderr)
    if not text:
        raise usage_error("the text on standard input is empty")
    return text


def write(text: str) -> None:
    """Write reply text, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


# ---------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the usage error."""
        raise usage_error(message)


class PassOn(argparse.Action):
    """Keep an option as it was given, in `passed`, for the child to judge."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Note the option's last value, and add its words to those that the child gets."""
        assert option_string is not None
        setattr(namespace, self.dest, values)
        long = option_string.startswith("--")
        namespace.passed = [*namespace.passed, f"{option_string}={values}" if long else option_string + values]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line into words, new, model and passed."""
    parser = Parser(
        prog="chat.py",
        description="Chat with GPT-2 on the CPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(passed=[])
    parser.add_argument("words", nargs="*", metavar="TEXT", help="answer this text once; without it, ask for texts")
    parser.add_argument("-n", "--new", type=positive, metavar="N", help=f"new tokens in a reply (default {NEW_TOKENS})")
    parser.add_argument("-m", "--model", action=PassOn, metavar="FILE", help="llm.c checkpoint, as for the pygpt command")
    parser.add_argument("-t", "--threads", action=PassOn, metavar="N", help="worker threads, as for the pygpt command")
    parser.add_argument("--sampler", action=PassOn, metavar="NAME", help="how tokens are chosen, as for the pygpt command")
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # argparse itself loses it between words
    options = parser.parse_intermixed_args(argv[:cut])
    options.words += argv[cut + 1 :]
    return options


def positive(text: str) -> int:
    """Read a number of tokens."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def context_length(model: str | None) -> int | None:
    """Return the context of the model that will answer, or None if it does not open: the child then says why."""
    try:
        with Checkpoint(find_model(model)[0]) as checkpoint:
            return checkpoint.config.maxT
    except (CheckpointError, MemoryError):
        return None


def new_tokens(wanted: int | None, maxT: int | None) -> int:
    """Return how many tokens a reply gets. At least one token of the context is the text's."""
    if maxT is None:
        return wanted or NEW_TOKENS
    if wanted is not None and wanted >= maxT:
        raise usage_error(f"--new is {wanted}: it must be at most {maxT - 1}, the model's context of {maxT} less one")
    return wanted or min(NEW_TOKENS, maxT - 1)


def run(options: argparse.Namespace) -> int:
    """Answer the text given in words or through a pipe, or else converse. Returns the exit status."""
    if options.words and not any(options.words):
        raise usage_error("the text is empty")
    maxT = context_length(options.model)
    new = new_tokens(options.new, maxT)
    with Command(options.passed) as command:  # first, so that it gets ready meanwhile
        chat = Chat(command, new, maxT)
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


def abandon_stdout() -> None:
    """Point standard output at the null device: what is still buffered must neither fail nor block at exit."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat and return its exit status: 0, 1 (failure), 2 (usage), 130 (Ctrl-C), 141 (broken pipe)."""
    prepare_streams()
    try:
        return run(parse(argv))
    except Failure as failure:
        print(failure, file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        abandon_stdout()
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        abandon_stdout()
        return 141
    except (PyGPTError, ImportError, OSError, MemoryError) as error:
        abandon_stdout()
        print(f"chat.py: error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
