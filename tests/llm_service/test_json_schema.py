"""JSON schemas: what is refused before anything runs, and that whatever is drawn meets what was asked for."""

import asyncio
import json
import random
import signal
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llm_service.prompt.tokenizer import Tokenizer, load_tokenizer
from llm_service.schema import check
from llm_service.schema.compiler import MAX_SCHEMA_CHARACTERS, MAX_WAITING, SchemaCompiler, SchemaConstraint
from llm_service.schema.satisfiable import is_satisfiable
from shared.checkpoint import read_config
from shared.errors import InvalidJsonSchema, QueueFull
from tests.golden_cases import GOLDEN

# One of each kind of tokenizer: Qwen2, Llama 3, InternLM2, Phi-3, Yi.
CHECKPOINTS = (
    "internvl3-8b-tiny",
    "internvl2-llama3-76b-tiny",
    "internvl2-8b-tiny",
    "internvl2-4b-tiny",
    "internvl2-40b-tiny",
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "c d"]}, "minItems": 1, "maxItems": 3},
        "size": {"type": ["number", "null"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "object", "properties": {"child": {"$ref": "#"}}, "required": ["child"]}


def meets_person(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"name", "age", "tags"} <= value.keys() <= PERSON["properties"].keys()  # type: ignore[attr-defined]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "bé", "c d"}
        and isinstance(value.get("size"), int | float | None)
    )


@cache
def vocabulary(checkpoint: str) -> tuple[Tokenizer, int, frozenset[int]]:
    directory = GOLDEN / "checkpoints" / checkpoint
    tokenizer = load_tokenizer(directory)
    cases = json.loads((GOLDEN / "expected" / checkpoint / "cases.json").read_text())
    return tokenizer, int(read_config(directory).llm["vocab_size"]), frozenset({int(cases["eos_token_id"])})


def schemas(checkpoint: str = CHECKPOINTS[0]) -> SchemaCompiler:
    return SchemaCompiler(*vocabulary(checkpoint))


def walk(constraint: SchemaConstraint, checkpoint: str, chooser: random.Random, most: int = 3000) -> tuple[str, bool]:
    """Draw among the allowed tokens, each as likely as any other; return the text and whether it ended by itself."""
    tokenizer, _, stops = vocabulary(checkpoint)
    said = b""
    for _ in range(most):
        token = chooser.choice(torch.nonzero(constraint.allowed()).flatten().tolist())
        constraint.accept(token)
        if token in stops:
            return said.decode(), True
        assert token not in tokenizer.control_ids
        said += tokenizer.bytes_of(token)
    return said.decode(errors="replace"), False


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
async def test_whatever_is_drawn_with_any_familys_tokens_meets_the_schema(checkpoint: str) -> None:
    beginning = await schemas(checkpoint).constraint(json.dumps(PERSON))
    for seed in range(20):
        text, ended = walk(beginning.copy(), checkpoint, random.Random(seed))
        assert ended
        assert meets_person(json.loads(text)), text


@pytest.mark.parametrize(
    ("schema", "is_met"),
    [
        ({"const": {"a": [1, "x"]}}, lambda value: value == {"a": [1, "x"]}),
        ({"type": "boolean"}, lambda value: isinstance(value, bool)),
        (
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
            lambda value: 2 <= len(value) <= 4 and set(value) <= set("abc"),
        ),
        ({"anyOf": [{"type": "null"}, {"const": "yes"}]}, lambda value: value in (None, "yes")),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"const": "b"}},
            lambda value: all(entry == (1 if name == "a" else "b") for name, entry in value.items()),
        ),
        (
            {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
            lambda value: isinstance(value, list),
        ),
    ],
)
async def test_kinds_of_schemas_are_met(schema: Any, is_met: Any) -> None:
    beginning = await schemas().constraint(json.dumps(schema))
    ends = []
    for seed in range(20):
        text, ended = walk(beginning.copy(), CHECKPOINTS[0], random.Random(seed), most=400)
        ends.append(ended)
        assert not ended or is_met(json.loads(text)), text
    assert any(ends)


async def test_the_end_is_allowed_only_where_the_text_is_complete() -> None:
    tokenizer, _, stops = vocabulary(CHECKPOINTS[0])
    constraint = (await schemas().constraint('{"const": "ab"}')).copy()
    (stop,) = stops
    for token in tokenizer.encode('"ab"'):
        allowed = constraint.allowed()
        assert allowed[token]
        assert not allowed[stop]
        constraint.accept(token)
    assert torch.nonzero(constraint.allowed()).flatten().tolist() == [stop]


async def test_copies_go_their_own_ways() -> None:
    tokenizer, _, stops = vocabulary(CHECKPOINTS[0])
    first = (await schemas().constraint('{"enum": [1, 2]}')).copy()
    second = first.copy()
    first.accept(tokenizer.encode("1")[0])
    assert first.allowed()[list(stops)].all()
    assert not second.allowed()[list(stops)].any()


@pytest.mark.parametrize(
    "schema",
    [
        "",
        "{",
        "[]",
        "3",
        '"x"',
        '{"const": "\\ud800"}',
        '{"type": "thing"}',
        '{"type": "string", "pattern": "(a"}',
        '{"not": {}}',
        '{"type": "array", "contains": {"type": "integer"}}',
        '{"x-guidance": {"lenient": true}, "not": {}}',
        '{"$ref": "http://127.0.0.1:1/x.json"}',
        '{"$ref": "#/$defs/none"}',
        '{"items": ' * 2000 + "{}" + "}" * 2000,
        '{"type": "integer", "minimum": ' + "9" * 5000 + "}",
    ],
)
async def test_a_malformed_or_unsupported_schema_is_refused(schema: str) -> None:
    with pytest.raises(InvalidJsonSchema, match="malformed"):
        await schemas().constraint(schema)


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"$ref": "#"},
        ENDLESS,
        {"type": "object", "required": ["a"], "properties": {"a": False}},
    ],
)
async def test_a_schema_that_no_text_meets_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidJsonSchema, match="No text"):
        await schemas().constraint(json.dumps(schema))


async def test_a_schema_that_takes_for_ever_is_cut_off_and_holds_nobody_up() -> None:
    patterns = [{"type": "string", "pattern": f".*[ab].{{{length}}}c.*"} for length in range(10, 30)]
    compiling = schemas()
    endless = asyncio.create_task(compiling.constraint(json.dumps({"allOf": patterns})))
    await compiling.constraint('{"type": "integer"}')
    assert not endless.done()
    with pytest.raises(InvalidJsonSchema, match="too much work"):
        await endless


async def test_a_check_that_is_abandoned_leaves_no_process_behind() -> None:
    before = children()
    task = asyncio.create_task(schemas().constraint("{}"))
    while children() == before:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


def children() -> set[str]:
    """Return the process ids of this process's children."""
    own = Path("/proc/self/task")
    return {child for thread in own.iterdir() for child in (thread / "children").read_text().split()}


async def test_a_schema_too_long_is_refused_unread() -> None:
    with pytest.raises(InvalidJsonSchema, match=str(MAX_SCHEMA_CHARACTERS)):
        await schemas().constraint(" " * (MAX_SCHEMA_CHARACTERS + 1))


class Checks:
    """Verdicts by hand, counted. A closed `gate` holds them back."""

    def __init__(self, verdict: int = check.SOUND) -> None:
        self.verdict = verdict
        self.checked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, schema: str) -> int:
        self.checked.append(schema)
        await self.gate.wait()
        return self.verdict


def checked_by(checks: Checks) -> SchemaCompiler:
    return SchemaCompiler(*vocabulary(CHECKPOINTS[0]), checks)


async def test_a_schema_that_is_known_is_not_checked_again() -> None:
    checks = Checks()
    compiling = checked_by(checks)
    for _ in range(3):
        await compiling.constraint('{"type": "integer"}')
    assert checks.checked == ['{"type": "integer"}']


@pytest.mark.parametrize("verdict", [check.INVALID, check.UNSATISFIABLE, check.TOO_MUCH, -signal.SIGXCPU])
async def test_a_refusal_is_remembered(verdict: int) -> None:
    checks = Checks(verdict)
    compiling = checked_by(checks)
    messages = set()
    for _ in range(3):
        with pytest.raises(InvalidJsonSchema) as refused:
            await compiling.constraint("{}")
        messages.add(refused.value.message)
    assert len(checks.checked) == len(messages) == 1


@pytest.mark.parametrize("verdict", [-signal.SIGKILL, 1])
async def test_a_check_that_came_to_no_verdict_is_made_again(verdict: int) -> None:
    checks = Checks(verdict)
    compiling = checked_by(checks)
    with pytest.raises(InvalidJsonSchema, match="too much work"):
        await compiling.constraint("{}")
    checks.verdict = check.SOUND
    await compiling.constraint("{}")
    assert len(checks.checked) == 2


async def test_schemas_too_many_to_wait_are_refused_and_those_that_wait_already_are_not() -> None:
    checks = Checks()
    compiling = checked_by(checks)
    checks.gate.clear()
    waiting = [asyncio.create_task(compiling.constraint(schema(index))) for index in range(MAX_WAITING)]
    again = asyncio.create_task(compiling.constraint(schema(MAX_WAITING - 1)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await compiling.constraint(schema(MAX_WAITING))
    waiting.pop(0).cancel()
    await asyncio.sleep(0)
    more = asyncio.create_task(compiling.constraint(schema(MAX_WAITING)))
    await asyncio.sleep(0)
    checks.gate.set()
    await asyncio.gather(*waiting, again, more)
    assert sorted(checks.checked) == sorted(map(schema, range(MAX_WAITING + 1)))


def schema(number: int) -> str:
    return json.dumps({"const": number})


async def test_no_request_reads_the_vocabulary() -> None:
    tokenizer, size, stops = vocabulary(CHECKPOINTS[0])
    counting = CountingTokenizer(tokenizer)
    compiling = SchemaCompiler(cast(Tokenizer, counting), size, stops)
    assert counting.num_read == size
    await asyncio.gather(*(compiling.constraint(schema(index)) for index in range(3)))
    assert counting.num_read == size


class CountingTokenizer:
    """A tokenizer that counts how many of its tokens were looked at."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_read = 0

    def bytes_of(self, token_id: int) -> bytes:
        self.num_read += 1
        return self._tokenizer.bytes_of(token_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


async def test_what_one_request_uses_up_is_not_taken_from_the_next() -> None:
    tokenizer, _, _ = vocabulary(CHECKPOINTS[0])
    compiling = schemas()
    (quote,), (letter,) = tokenizer.encode('"'), tokenizer.encode("x")
    failures = 0
    for _ in range(3):
        constraint = await compiling.constraint('{"type": "string", "maxLength": 100000}')
        for step in range(30_000):
            try:
                allowed = constraint.allowed()
            except InvalidJsonSchema:
                failures += 1
                assert step > 5_000
                break
            token = letter if step else quote
            assert allowed[token]
            constraint.accept(token)
    assert failures == 3, "the limit is there, and each request has the whole of it"


@pytest.mark.parametrize("pattern", [".*(a.{60}b|b.{50}a).{40}c.*", "(.*a.{30}b.*|.*c.{31}d.*|.*b.{33}a.*)"])
async def test_a_pattern_that_takes_more_and_more_work_fails_early_and_for_its_own_request_only(pattern: str) -> None:
    tokenizer, _, _ = vocabulary(CHECKPOINTS[0])
    compiling = schemas()
    steps = []
    for _ in range(2):
        constraint = await compiling.constraint(json.dumps({"type": "string", "pattern": pattern}))
        chooser = random.Random(1)

        def write(constraint: SchemaConstraint, chooser: random.Random) -> None:
            for step in range(1000):
                constraint.allowed()
                steps.append(step)
                constraint.accept(tokenizer.encode(chooser.choice("ab") if step else '"')[0])

        with pytest.raises(InvalidJsonSchema, match="too much work"):
            write(constraint, chooser)
    first = steps[: len(steps) // 2]
    assert first == steps[len(steps) // 2 :]
    assert 1 < len(first) < 1000


async def test_an_answer_that_nothing_can_go_on_says_that_no_text_is_possible() -> None:
    dead_end = {"b": {"type": "string", "pattern": "^\x01$"}}
    asked = {"type": "object", "properties": dead_end, "required": ["b"], "additionalProperties": False}
    constraint = await schemas().constraint(json.dumps(asked))
    with pytest.raises(InvalidJsonSchema, match="No text can meet"):
        walk(constraint, CHECKPOINTS[0], random.Random(0))


async def test_a_matcher_that_takes_long_to_make_is_refused() -> None:
    with pytest.raises(InvalidJsonSchema, match="too much work"):
        await schemas().constraint('{"type": "integer", "multipleOf": 99991}')
    await schemas().constraint('{"type": "integer", "multipleOf": 997}')


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (True, True),
        ({}, True),
        (ENDLESS, False),
        ({**ENDLESS, "type": ["object", "null"]}, True),
        ({"properties": {"child": {"$ref": "#"}}, "required": ["child"]}, True),
        ({"type": "object", "properties": {"child": {"$ref": "#"}}}, True),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["child"]}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 1}, True),
        ({"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 2}, False),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, True),
        ({"anyOf": [{"$ref": "#"}, False]}, False),
        ({"allOf": [{"$ref": "#/$defs/a~1b"}], "$defs": {"a/b": {"allOf": [{"$ref": "#/$defs/a~1b"}]}}}, False),
        ({"type": "object", "allOf": [{"properties": {"a": {"$ref": "#"}}, "required": ["a"]}]}, False),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "null"}}}, True),
        ({"$ref": "elsewhere"}, True),
    ],
)
def test_recursion_without_a_way_out_is_found(schema: Any, expected: bool) -> None:
    assert is_satisfiable(schema) is expected


def test_a_long_chain_of_references_is_followed_without_recursion() -> None:
    chain = {f"a{index}": {"$ref": f"#/$defs/a{index + 1}"} for index in range(3000)}
    assert is_satisfiable({"$ref": "#/$defs/a0", "$defs": chain | {"a3000": {"type": "null"}}})
    assert not is_satisfiable({"$ref": "#/$defs/a0", "$defs": chain | {"a3000": {"$ref": "#/$defs/a0"}}})


def test_the_checks_verdicts() -> None:
    assert check.verdict_on('{"type": "integer"}') == check.SOUND
    assert check.verdict_on("{") == check.INVALID
    assert check.verdict_on(json.dumps(ENDLESS)) == check.UNSATISFIABLE
