"""What went wrong, as HTTP tells it: the status, OpenAI's error object, and when to try again."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import HTTPException

from shared.errors import ServiceError

_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_REQUEST_ERROR: Final = "invalid_request_error"
_RETRY_S: Final = 1.0  # where an error that will pass does not say when
_PASSING: Final = (429, 503)
_WORST: Final = 500


@dataclass(frozen=True, slots=True)
class Problem:
    """What a client is told: `code` is our reason, `param` the field at fault; and the gRPC code for our own books."""

    status: int
    message: str
    grpc_code: str = "INVALID_ARGUMENT"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, _REQUEST_ERROR)
        facts = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": facts}

    @property
    def content(self) -> bytes:
        """The object as JSON."""
        return json.dumps(self.body).encode()


def problem_of(error: ServiceError) -> Problem:
    """Return what a client is told of an error of ours."""
    status = _STATUS.get(error.code.value, _WORST)
    headers: dict[str, str] = {}
    retry_s = error.retry_after_s
    if retry_s is not None or status in _PASSING:
        wait_s = _RETRY_S if retry_s is None else retry_s
        headers = {"retry-after": str(max(1, math.ceil(wait_s))), "retry-after-ms": str(math.ceil(wait_s * 1000))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Problem(status, error.message, error.code.value, error.reason, error.field or error.resource, headers)


def refused(message: str, param: str | None = None, status: int = 400) -> Problem:
    """Return the problem of a request that nothing can be made of."""
    return Problem(status, message, code="INVALID_REQUEST", param=param)


NOTHING_HERE: Final = Problem(404, "There is nothing at this path.", "UNIMPLEMENTED")


class Refusal(HTTPException):
    """A request whose body is not read to its end. FastAPI lets no other kind of error out of a body."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.status, problem.message)
        self.problem = problem


# What is told of a value that is not allowed, by pydantic's own name for what is wrong with it; its words stay inside.
_WORDS: Final = {
    "missing": "This field is required.",
    "extra_forbidden": "There is no such field.",
    "json_invalid": "The body is no JSON, or nested too deeply.",
    "bool_type": "This has to be true or false.",
    "int_type": "This has to be a whole number.",
    "float_type": "This has to be a number.",
    "finite_number": "This has to be a number.",
    "string_type": "This has to be text.",
    "list_type": "This has to be a list.",
    "dict_type": "This has to be an object.",
    "model_attributes_type": "This has to be an object.",
    "model_type": "This has to be an object.",
    "none_required": "This has to be null or absent.",
    "literal_error": "This value is not known, or not supported here.",
    "union_tag_invalid": "This kind is not known, or not supported here.",
    "union_tag_not_found": "This says of no kind that it is.",
    "greater_than": "This has to be more than {gt}.",
    "greater_than_equal": "This has to be at least {ge}.",
    "less_than_equal": "This has to be at most {le}.",
    "too_short": "This needs at least {min_length} entries.",
    "too_long": "This has at most {max_length} entries.",
}


def problem_of_value(errors: Sequence[Mapping[str, Any]], body: object) -> Problem:
    """Return the problem of a body of which pydantic says `errors`: the one that lies deepest, in words of our own."""
    error = max(errors, key=lambda error: len(error["loc"]))
    words = _WORDS.get(error["type"], "This value is not allowed here.").format_map(error.get("ctx", {}))
    if error["type"] == "json_invalid":
        return refused(words)
    if error["loc"][:1] == ("body",) and isinstance(body, bytes):
        return refused("The body has to be JSON, with the content type application/json.", status=415)
    return refused(words, _param(error["loc"], body))


def _param(location: Sequence[int | str], body: object) -> str | None:
    """Return where in the body pydantic means; the names that it gives to the kinds of a union are left out."""
    path, node = "", body
    for position, key in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(node, Mapping) and isinstance(key, str) and (key in node or is_last):
            path, node = f"{path}.{key}" if path else key, node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            path, node = f"{path}[{key}]", node[key]
    return path or None
