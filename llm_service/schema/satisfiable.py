"""Finds out whether a JSON schema asks for something endless, such as an object that has to hold its own kind.

The grammar library refuses the contradictions that it sees; that a recursion has no way out it does not see.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

_Node = tuple[int, str]  # a schema, by its identity, and the type of value that its surroundings ask for
_Needs = list[list[tuple[Any, str]]]  # of each group one schema has to be possible


def is_satisfiable(schema: Any) -> bool:
    """Return whether some finite value may meet the schema; True where it is not plain that none does."""
    needs = _all_needs(schema)
    possible: set[_Node] = set()
    grows = True
    while grows:
        grows = False
        for node, groups in reversed(needs.items()):  # most schemas were found after those that need them
            if node not in possible and _met(groups, possible):
                possible.add(node)
                grows = True
    return (id(schema), "") in possible


def _met(groups: _Needs, possible: set[_Node]) -> bool:
    return all(any((id(schema), kind) in possible for schema, kind in group) for group in groups)


def _all_needs(schema: Any) -> dict[_Node, _Needs]:
    needs: dict[_Node, _Needs] = {}
    pending = [(schema, "")]
    while pending:
        part, kind = pending.pop()
        if (id(part), kind) not in needs:
            needs[id(part), kind] = groups = list(_needs_of(part, kind, schema))
            pending += [entry for group in groups for entry in group]
    return needs


def _needs_of(schema: Any, kind: str, root: Any) -> Iterator[list[tuple[Any, str]]]:
    if schema is False:
        yield []
    if not isinstance(schema, dict) or "enum" in schema or "const" in schema:
        return
    kind = _kind_of(schema) or kind
    if isinstance(reference := schema.get("$ref"), str):
        target = _target(reference, root)
        if target is not None:
            yield [(target, kind)]
    for part in _list(schema.get("allOf")):
        yield [(part, kind)]
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            yield [(part, kind) for part in _list(schema[keyword])]
    if kind == "object":
        yield from ([(part, "")] for part in _required_properties(schema))
    if kind == "array":
        yield from ([(part, "")] for part in _required_items(schema))


def _kind_of(schema: dict[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list) and len(kind) == 1:
        kind = kind[0]
    return kind if isinstance(kind, str) else ""


def _required_properties(schema: dict[str, Any]) -> Iterator[Any]:
    properties = schema.get("properties")
    for name in _list(schema.get("required")):
        if isinstance(properties, dict) and isinstance(name, str) and name in properties:
            yield properties[name]
        elif "patternProperties" not in schema:
            yield schema.get("additionalProperties", True)


def _required_items(schema: dict[str, Any]) -> Iterator[Any]:
    least = schema.get("minItems", 0)
    listed = _list(schema.get("prefixItems"))
    if isinstance(least, int):
        yield from listed[: max(least, 0)]
        if least > len(listed):
            yield schema.get("items", True)


def _target(reference: str, root: Any) -> Any:
    """Return the schema that a `#/...` reference points to; None for any other, or one that leads nowhere."""
    if not reference.startswith("#") or (reference != "#" and not reference.startswith("#/")):
        return None
    target = root
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict):
            target = target.get(name)
        elif isinstance(target, list):
            target = target[int(name)] if name.isascii() and name.isdigit() and int(name) < len(target) else None
    return target


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
