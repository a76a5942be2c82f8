"""What addresses, and the answers of servers, mean to both ways of downloading."""

import re
from email.utils import parsedate_to_datetime
from time import time
from urllib.parse import urlsplit, urlunsplit

from ..errors import InputError, PyGPTError

HUB = "https://huggingface.co"
RETRY_AFTER_LIMIT = 120.0  # seconds


def check_url(url: str, what: str) -> str:
    """An http(s) address, checked."""
    try:
        parts = urlsplit(url)
        sound = bool(re.fullmatch(r"[!-~]+", url) and parts.scheme in ("http", "https") and parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"{what} is {url[:200]!r}: it must be an address such as {HUB}/NAME/resolve/main/model.safetensors")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"{what} has a user name or password in it: set HF_TOKEN instead")
    return urlunsplit(parts._replace(fragment=""))


def is_safetensors(url: str) -> bool:
    """Whether an address is of a Hugging Face model."""
    return urlsplit(url).path.endswith(".safetensors")


def within(url: str, endpoint: str) -> str:
    """The path of an address within an endpoint's; "" where it is another's."""
    parts, own = urlsplit(url), urlsplit(endpoint)
    return parts.path.removeprefix(own.path) if origin(url) == origin(endpoint) and parts.path.startswith(own.path) else ""


def beside(url: str, name: str) -> str:
    """The address of another file in the same folder."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def origin(url: str) -> tuple[str, str | None, int | None]:
    """The scheme, host and port of an address: where a token may go."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def refusal(url: str, code: int, reason: str) -> PyGPTError:
    """What a status that stays means for the user."""
    meaning = {
        401: "it wants a token: set HF_TOKEN to one that may read this model, and look whether the address is right",
        403: "HF_TOKEN is not allowed to read this: ask for access on the model's page",
        404: "there is no such file: look at the address",
    }
    text = meaning.get(code, reason)
    if 300 <= code < 400:
        text = f"redirected without end, or not to an http(s) address: {reason}"
    return PyGPTError(f"{url}: the server answers {code}: {text}")


def retry_after(text: str | None) -> float | None:
    """The seconds that a server asks to wait, within reason: given as a number or a date; None for anything else."""
    if text is None:
        return None
    seconds: float | None = whole_number(text.strip())
    if seconds is None:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time()
        except (ValueError, OverflowError, OSError):
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT)


def whole_number(text: str | None) -> int | None:
    """A number in ASCII digits; None for anything else."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text) else None
