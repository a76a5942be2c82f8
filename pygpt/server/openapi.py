"""The OpenAPI document of the server, from its routes and from the schemas that check requests."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NamedTuple

from .. import __version__
from .schema import Fields, Schema, published

TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}


class Endpoint(NamedTuple):
    """A route. fields: of its JSON object, which makes it a POST. key: whether it needs an API key."""

    path: str
    handler: Callable[..., Awaitable[Any]]
    fields: Fields | None = None
    required: tuple[str, ...] = ()
    key: bool = True


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


ERROR = _object(error=_object(message={"type": "string"}, type={"type": "string"}, param=TEXT_OR_NULL, code=TEXT_OR_NULL))
LOGPROBS = _object(
    tokens=_list({"type": "string"}),
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
    texts = {name: {"type": "string"} for name in ("id", "object", "model")}
    return _object(**texts, created=COUNT, system_fingerprint=TEXT_OR_NULL, choices=_list(choice), usage=USAGE)


ANSWERS = {  # of the paths whose answer is not just any object
    "/v1/completions": answer(text={"type": "string"}),
    "/v1/chat/completions": answer(message=_object(role={"const": "assistant"}, content={"type": "string"})),
    "/v1/models": _object(object={"const": "list"}, data=_list({"type": "object"})),
    "/tokenize": _object(tokens=_list({"type": ["integer", "object"]})),
    "/detokenize": _object(prompt={"type": "string"}, content={"type": "string"}),
}
ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    kinds = {"/metrics": "text/plain"}
    content = {kinds.get(endpoint.path, "application/json"): {"schema": ANSWERS.get(endpoint.path, {})}}
    if endpoint.path.endswith("/completions"):
        content["text/event-stream"] = {"schema": {}}
    summary = (endpoint.handler.__doc__ or "").partition("\n")[0]
    found: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": summary, "content": content}}}
    for status in ERRORS:
        if endpoint.key if status == 401 else status in (500, 503) or endpoint.fields is not None or "{" in endpoint.path:
            content = {"application/json": {"schema": {} if endpoint.path in ("/health", "/ready") else ERROR}}
            found["responses"][str(status)] = {"description": HTTPStatus(status).phrase, "content": content}
    if endpoint.fields is not None:
        body = published(endpoint.fields, endpoint.required)
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if "{" in endpoint.path:
        found["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {**found, "security": [{"key": []}, {}] if endpoint.key else []}


def document(endpoints: list[Endpoint], root_path: str) -> dict[str, Any]:
    """Return the OpenAPI document. root_path: the prefix of all paths, or ""."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "pygpt", "version": __version__, "description": "OpenAI's completions API for GPT-2 on the CPU."},
        "servers": [{"url": root_path or "/"}],
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            one.path.replace(":path", ""): {"post" if one.fields is not None else "get": _operation(one)} for one in endpoints
        },
    }
