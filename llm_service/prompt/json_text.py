"""JSON inside prompts and answers: read strictly, written as the models' chat templates write it."""

import json
from typing import Any, NoReturn


def read_object(text: str) -> dict[str, Any]:
    """Return the object, or raise `ValueError` if the text is anything else or cannot be written again.

    NaN, infinities (`1e999` too), half surrogate pairs and nesting beyond the interpreter's stack are refused.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
        write(value).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def write(value: Any) -> str:
    """Return the JSON text of a value: one line, `", "` and `": "` between parts, no escapes but the needed ones."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
