"""The API's own description: OpenAPI for programs, and a page of it for people, which loads nothing from elsewhere."""

import asyncio
from collections.abc import Iterator, Mapping
from functools import cached_property
from html import escape
from typing import Any, Final

from fastapi import FastAPI, Response
from starlette.responses import HTMLResponse, JSONResponse

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; }
h2 code { font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884; }
"""
_REFERENCE: Final = "#/components/schemas/"
Document = dict[str, Any]


class Reference:
    """Tells what an API has; written when first asked for, which takes a good part of a second, beside the loop."""

    def __init__(self, api: FastAPI, *, needs_key: bool) -> None:
        self._api = api
        self._needs_key = needs_key

    def add(self) -> None:
        """Add `/openapi.json` and `/docs` to the API."""
        self._api.get("/openapi.json", include_in_schema=False)(self.tell_document)
        self._api.get("/docs", include_in_schema=False)(self.show_page)

    async def tell_document(self) -> Response:
        """Return the description for programs."""
        return JSONResponse(await asyncio.to_thread(lambda: self._document))

    async def show_page(self) -> Response:
        """Return the description for people."""
        page = await asyncio.to_thread(lambda: _page(self._document))
        return HTMLResponse(page, headers={"content-security-policy": _POLICY, "x-content-type-options": "nosniff"})

    @cached_property
    def _document(self) -> Document:
        document: Document = self._api.openapi()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; what is invalid is 400 here
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        if self._needs_key:
            _require_key(document)
        return document


def _require_key(document: Document) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in () if path.startswith("/health") else operations.values():
            operation["security"] = [{"key": []}]


def _page(document: Document) -> str:
    info = document["info"]
    sections = "".join(_sections(document))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f"<style>{_STYLE}</style><h1>{escape(info['title'])}</h1><p>{escape(info['summary'])} "
        f'For programs: <a href="/openapi.json">openapi.json</a>.</p>{sections}</html>'
    )


def _sections(document: Document) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>"
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for name in _references(content.get("schema", {})):
                yield _table(document["components"]["schemas"], name)


def _table(schemas: Mapping[str, Any], name: str) -> str:
    """Return the fields of a body, and those of every object in it that has a name of its own."""
    names, shown = [name], []
    for each in names:
        names += [inner for inner in _references(schemas[each]) if inner not in names]
        shown.append(_fields(each, schemas[each]))
    return "".join(shown)


def _fields(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{' *' if field in required else ''}</td><td>{escape(_kind(facts))}</td>"
        f"<td>{escape(facts.get('description', ''))}</td></tr>"
        for field, facts in schema.get("properties", {}).items()
    )
    return f"<h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p><table>{rows}</table>"


def _kind(schema: Mapping[str, Any]) -> str:
    """Return in a few words what a value may be."""
    if "$ref" in schema:
        return str(schema["$ref"]).removeprefix(_REFERENCE)
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(kind for each in schema[choice] if (kind := _kind(each)) != "null")
    if "items" in schema:
        return f"list of {_kind(schema['items'])}"
    return str(schema.get("type", "anything"))


def _references(schema: object) -> list[str]:
    """Return the names of all objects that a schema refers to."""
    if isinstance(schema, Mapping):
        own = [schema["$ref"].removeprefix(_REFERENCE)] if isinstance(schema.get("$ref"), str) else []
        return own + [name for value in schema.values() for name in _references(value)]
    if isinstance(schema, list):
        return [name for value in schema for name in _references(value)]
    return []
