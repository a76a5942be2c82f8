"""The fields of requests and answers, as JSON schemas: they check requests, and the OpenAPI document publishes them.

Refuses to know about models. What depends on one, such as the length of its context, is checked in call.py."""

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NamedTuple

from .. import __version__
from ..errors import near, shown
from ..formats.safetensors import unique
from ..generation.request import MOST_GUESSES

Schema = dict[str, Any]
Fields = dict[str, Schema]

MOST_LOGPROBS = 20
ROLES = ("system", "user", "assistant")
TEXT: Schema = {"type": "string", "minLength": 1}
ID: Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _field(description: str, **schema: Any) -> Schema:
    return {"description": description, **schema}


def _number(description: str, minimum: float, maximum: float, kind: str = "number") -> Schema:
    return _field(description, type=kind, minimum=minimum, maximum=maximum)


def _whole(description: str, minimum: int, maximum: int = 1 << 31) -> Schema:
    return _number(f"a whole number{description}", minimum, maximum, "integer")


FLAG, STRING = {"type": "boolean"}, {"type": "string"}
SWITCH = _field("true or false", **FLAG)
IDS = _list(ID, minItems=1)
PROMPTS = [TEXT, _list(TEXT, minItems=1), IDS, _list(IDS, minItems=1)]
NO_MORE = {"additionalProperties": False}
BIASES = {"patternProperties": {"^[0-9]{1,7}$": _number("a bias", -100, 100)}, **NO_MORE}
USAGES = ("include_usage", "continuous_usage_stats")
OPTIONS = {"type": "object", "properties": dict.fromkeys((*USAGES, "include_obfuscation"), SWITCH), **NO_MORE}
MESSAGE = _object(role={"enum": [*ROLES]}, content=STRING)
GUESSES = f"a whole number from 1 to {MOST_GUESSES} of tokens to guess in a step"
MODEL = {"model": _field("the name of a served model; GET /v1/models lists them", **STRING)}
_SHARED: Fields = {
    **MODEL,
    "max_tokens": _whole(" of new tokens (default 16); 0 needs echo", 0),
    "temperature": _number("a number from 0, which chooses the most probable token, to 1000 (default 1)", 0, 1000),
    "top_p": _number("a number from 0 to 1", 0, 1),
    "top_k": _whole(" from -1 to 2^31; 0 and -1 keep all tokens", -1),
    "min_p": _number("a number from 0 to 1", 0, 1),
    "repetition_penalty": _number("a number from 0.01 to 100; 1 changes nothing", 0.01, 100),
    "frequency_penalty": _number("a number from -2 to 2", -2, 2),
    "presence_penalty": _number("a number from -2 to 2", -2, 2),
    "logit_bias": _field("an object from token ids to numbers from -100 to 100", type="object", **BIASES),
    "n": _whole(" of choices from 1 to 65536 (default 1)", 1, 1 << 16),
    "seed": _whole(" from -2^63 to 2^64 - 1", -(1 << 63), (1 << 64) - 1),
    "stop": _field("a string or a list of up to 64 strings, none of them empty", anyOf=[TEXT, _list(TEXT, maxItems=64)]),
    "stop_token_ids": _field("a list of up to 1024 token ids", **_list(ID, maxItems=1024)),
    "ignore_eos": _field("true or false: whether to continue after <|endoftext|>", **FLAG),
    "sampler": _field("sample, greedy or median", enum=["sample", "greedy", "median"]),
    "speculation": _field(f"true, false, or {GUESSES} (default: --speculate)", anyOf=[FLAG, _whole("", 1, MOST_GUESSES)]),
    "stream": SWITCH,
    "stream_options": _field(f"an object with {' and '.join(USAGES)}, each true or false; it needs stream", **OPTIONS),
    "user": _field("a string, which is not used", **STRING),
}
COMPLETION: Fields = {
    "prompt": _field(
        "a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty", anyOf=PROMPTS
    ),
    **_SHARED,
    "echo": _field("true or false: whether the answer begins with the prompt", **FLAG),
    "logprobs": _whole(f" from 0 to {MOST_LOGPROBS}", 0, MOST_LOGPROBS),
    "best_of": _whole(", the same as n", 1, 1 << 16),
    "return_token_ids": SWITCH,
    "suffix": _field("left out or null: GPT-2 cannot fill in text", enum=[None]),
}
CHAT: Fields = {
    "messages": _field(
        "a list of objects with a role (system, user or assistant) and a content string", **_list(MESSAGE, minItems=1)
    ),
    **_SHARED,
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), _whole(" of new tokens from 1 (default 16)", 1)),
}
TOKENIZE: Fields = {
    **MODEL,
    **dict.fromkeys(("prompt", "content"), _field("a string", **STRING)),
    **dict.fromkeys(("add_special_tokens", "add_special"), _field("true or false, without effect for GPT-2", **FLAG)),
    "parse_special": _field("true or false (default): whether special tokens in the text become their ids", **FLAG),
    **dict.fromkeys(("with_pieces", "return_token_strs"), _field("true or false: whether to return each token's text", **FLAG)),
}
DETOKENIZE: Fields = {**MODEL, "tokens": _field("a list of token ids", **_list(ID))}
INSPECT: Fields = {
    **MODEL,
    "tokens": _field("a list of token ids, not empty", **IDS),
    "layer": _whole(" from 0 (default 0)", 0),
    "position": _whole(" from 0, of a token (default the last)", 0),
    "head": _whole(" from 0 (default all)", 0),
}


class ApiError(Exception):
    """An error that is the answer to a request. status: HTTP's. param: the field at fault. code: a name for programs."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read_object(body: bytes, fields: Fields, required: tuple[str, ...]) -> dict[str, Any]:
    """Parse a request's JSON object and check its fields; return those that are not null.

    Raises ApiError, which names the field, for text that is not JSON, an unknown field that is not null, and a bad value."""
    try:
        found = json.loads(body, parse_float=_number_of, parse_constant=unique)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(f"the body is {shown(found)}: it must be a JSON object")
    given = {name: value for name, value in found.items() if value is not None}
    for name in required:
        if name not in given:
            raise ApiError(f"{name} is missing: it must be {fields[name]['description']}", name)
    for name, value in given.items():
        if name not in fields:
            raise ApiError(f"unknown field {shown(name)}: {near(name, fields)}", name[:60])
        if not fits(value, fields[name]):
            raise ApiError(f"{name} is {shown(value)}: it must be {fields[name]['description']}", name)
    return given


def _number_of(text: str) -> int | float:
    return int(value) if (value := float(text)).is_integer() else value


def fits(value: Any, schema: Schema) -> bool:
    """Return whether a JSON value fits a schema. The schema may have the keywords that this module uses."""
    if "anyOf" in schema:
        return any(fits(value, choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return (value is None or isinstance(value, str)) and value in schema["enum"]
    match schema["type"]:
        case "string":
            return isinstance(value, str) and len(value) >= schema.get("minLength", 0)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", 1 << 62)
            return isinstance(value, list) and least <= len(value) <= most and all(fits(v, schema["items"]) for v in value)
        case "object":
            return isinstance(value, dict) and _members_fit(value, schema)
        case kind:
            right = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
            return right and schema["minimum"] <= value <= schema["maximum"]


def _members_fit(value: dict[str, Any], schema: Schema) -> bool:
    for bias in schema.get("patternProperties", {}).values():
        return all(key.isascii() and key.isdigit() and len(key) < 8 and fits(item, bias) for key, item in value.items())
    right = all(fits(value[name], member) for name, member in schema["properties"].items() if name in value)
    known = schema.get("additionalProperties", True) or value.keys() <= schema["properties"].keys()
    return right and known and set(schema.get("required", ())) <= value.keys()


# ---------------------------------------------------------------- the OpenAPI document

TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}


class Endpoint(NamedTuple):
    """A route. fields: those of its JSON object; with fields, the route is a POST. key: whether it needs an API key."""

    path: str
    handler: Callable[..., Awaitable[Any]]
    fields: Fields | None = None
    required: tuple[str, ...] = ()
    key: bool = True


ERROR = _object(error=_object(message=STRING, type=STRING, param=TEXT_OR_NULL, code=TEXT_OR_NULL))
LOGPROBS = _object(
    tokens=_list(STRING),
    token_logprobs=_list({"type": ["number", "null"]}),
    top_logprobs=_list({"type": ["object", "null"], "additionalProperties": {"type": "number"}}),
    text_offset=_list(COUNT),
    token_ids=_list(COUNT),
    bytes=_list(_list(COUNT)),
    top=_list({"type": ["array", "null"], "items": {"type": "array", "minItems": 3, "maxItems": 3}}),
)
LOGPROBS["type"] = ["object", "null"]
USAGE = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)


def answer(**content: Schema) -> Schema:
    """Return the schema of an answer. content: the fields of a choice that hold its text."""
    choice = _object(index=COUNT, finish_reason={"enum": ["stop", "length", None]}, logprobs=LOGPROBS, **content)
    texts = dict.fromkeys(("id", "object", "model"), STRING)
    return _object(**texts, created=COUNT, system_fingerprint=TEXT_OR_NULL, choices=_list(choice), usage=USAGE)


ANSWERS = {  # by path; any other path may answer with any object
    "/v1/completions": answer(text=STRING),
    "/v1/chat/completions": answer(message=_object(role={"const": "assistant"}, content=STRING)),
    "/v1/models": _object(object={"const": "list"}, data=_list({"type": "object"})),
    "/tokenize": _object(tokens=_list({"type": ["integer", "object"]})),
    "/detokenize": _object(prompt=STRING, content=STRING),
}


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    content = {"text/plain" if endpoint.path == "/metrics" else "application/json": {"schema": ANSWERS.get(endpoint.path, {})}}
    if endpoint.path.endswith("/completions"):
        content["text/event-stream"] = {"schema": {}}
    summary = (endpoint.handler.__doc__ or "").partition("\n")[0]
    found: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": summary, "content": content}}}
    for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504):
        if endpoint.key if status == 401 else status in (500, 503) or endpoint.fields is not None or "{" in endpoint.path:
            content = {"application/json": {"schema": {} if endpoint.path in ("/health", "/ready") else ERROR}}
            found["responses"][str(status)] = {"description": HTTPStatus(status).phrase, "content": content}
    if endpoint.fields is not None:
        required, null = list(endpoint.required), {"type": "null"}  # every other field may be null
        fields = {name: field if name in required else {"anyOf": [field, null]} for name, field in endpoint.fields.items()}
        body = {"type": "object", "properties": fields, "required": required, "additionalProperties": null}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if "{" in endpoint.path:
        found["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": STRING}]
    return {**found, "security": [{"key": []}, {}] if endpoint.key else []}


def document(endpoints: list[Endpoint], root_path: str) -> dict[str, Any]:
    """Return the OpenAPI document. root_path: the prefix of all paths, or ""."""
    methods = ["get" if one.fields is None else "post" for one in endpoints]
    return {
        "openapi": "3.1.0",
        "info": {"title": "pygpt", "version": __version__, "description": "OpenAI's completions API for GPT-2 on the CPU."},
        "servers": [{"url": root_path or "/"}],
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {one.path.replace(":path", ""): {how: _operation(one)} for one, how in zip(endpoints, methods, strict=True)},
    }
