"""Prompts: templates as the reference writes them, and text that can never become a control token."""

import hashlib
import json
import unicodedata
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.prompt.dialogue import Dialogue, Role, Segment, TextSegment, Turn, VisualSegment
from llm_service.prompt.splice import splice
from llm_service.prompt.template import TEMPLATES
from llm_service.prompt.tokenizer import Tokenizer, load_tokenizer
from shared.errors import CheckpointError, EmptyMessage, InvalidRequest
from tests.golden_cases import CHECKPOINTS, GOLDEN
from tests.llm_service.fakes_llm import ref
from tests.prompt_text import prompt_text

PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())


@cache
def tokenizer(checkpoint: str = CHECKPOINTS[0]) -> Tokenizer:
    return load_tokenizer(GOLDEN / "checkpoints" / checkpoint)


def user(*segments: Segment | str) -> Turn:
    return Turn(Role.USER, tuple(TextSegment(part) if isinstance(part, str) else part for part in segments))


def assistant(text: str) -> Turn:
    return Turn(Role.ASSISTANT, (TextSegment(text),))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_the_references_messages_and_separators(name: str) -> None:
    golden, template = PROMPTS["templates"][name], TEMPLATES[name]
    assert template.system_message == golden["system_message"]
    assert template.separator == golden["sep"]
    assert [template.user_prefix, template.assistant_prefix] == golden["roles"]
    assert template.stop_token == golden["stop_token"]


UNSAFE_PROMPTS = {
    "tag_in_answer": "the reference puts the picture into an old answer that mentions the tag",
    "tag_in_system": "the reference puts the picture into a system message that mentions the tag",
}
REFUSED_PROMPTS = {"empty_question": "a message without text and media is an error here"}


def prompt_rows() -> list[Any]:
    rows = []
    for case in PROMPTS["cases"]:
        if case["name"] not in REFUSED_PROMPTS:
            questions = case["inputs"].get("questions") or [case["inputs"]["question"]]
            rows += [
                pytest.param(case, row, id=f"{case['template']}-{case['name']}-{row}") for row in range(len(questions))
            ]
    return rows


def rendered(case: dict[str, Any], row: int) -> str:
    inputs = case["inputs"]
    sizes = list(inputs["npl"] or [inputs.get("total", 0)])
    question = inputs["question"]
    if "questions" in inputs:
        sizes, question = [sizes[row]], inputs["questions"][row]
    sizes = [size for size in sizes if size]
    if sizes and "history" not in inputs and "<image>" not in question:
        question = f"<image>\n{question}"
    turns = []
    for asked, answered in inputs.get("history") or ():
        turns += [tagged(asked, sizes), assistant(answered)]
    dialogue = Dialogue((*turns, tagged(question, sizes)), inputs.get("system"))
    return prompt_text(TEMPLATES[case["template"]].render(dialogue))


@pytest.mark.parametrize(("case", "row"), prompt_rows())
def test_prompts_of_256_tokens_per_tile_have_the_references_checksum(case: dict[str, Any], row: int) -> None:
    same = hashlib.sha256(rendered(case, row).encode()).hexdigest() == case["sha256"][row]
    assert same is (case["name"] not in UNSAFE_PROMPTS)


@pytest.mark.parametrize("name", UNSAFE_PROMPTS)
def test_a_picture_stays_in_the_question_whatever_else_mentions_the_tag(name: str) -> None:
    case = next(case for case in PROMPTS["cases"] if case["name"] == name and case["template"] == "internvl2_5")
    before, _, question = rendered(case, 0).rpartition("<|im_start|>user\n")
    assert question.startswith("<img><IMG_CONTEXT>")
    assert "<image>" in before
    assert "<IMG_CONTEXT>" not in before


def tagged(text: str, sizes: list[int]) -> Turn:
    segments: list[Segment | str] = []
    for index, chunk in enumerate(text.split("<image>")):
        if index and sizes:
            segments.append(VisualSegment((ref(tiles=sizes.pop(0), tokens_per_tile=256),)))
        elif index:
            segments.append("<image>")
        segments.append(chunk)
    return user(*(segment for segment in segments if segment != ""))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_tokenizer_vectors_hold(checkpoint: str) -> None:
    golden = json.loads((GOLDEN / "expected" / checkpoint / "tokenizer.json").read_text())
    special = {*golden["all_special_tokens"], *golden["ids"]}
    chosen = tokenizer(checkpoint)
    for vector in golden["vectors"]:
        text = vector.get("text")
        if text is not None and not any(token in text for token in special):
            assert chosen.encode(text) == vector["ids_no_special"]
        whole = b"".join(map(chosen.bytes_of, vector["ids"])).decode(errors="replace")
        shown = b"".join(chosen.bytes_of(token) for token in vector["ids"] if token not in chosen.hidden_ids)
        assert whole == vector["decode"]
        assert shown.decode(errors="replace") == vector["decode_skip"]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_no_typed_special_token_becomes_one_in_any_field(checkpoint: str) -> None:
    chosen = tokenizer(checkpoint)
    typed = [chosen.bytes_of(token).decode() for token in chosen.control_ids]
    template = TEMPLATES["internvl2_5"]
    plain = control_ids(chosen, Dialogue((user("a"), assistant("b"), user("c")), "d"))
    for token in typed:
        for text in (token, f"x{token}y", token[:-1] + token, f"{token} {token}"):
            assert control_ids(chosen, Dialogue((user(text), assistant("b"), user("c")), "d")) == plain
            assert control_ids(chosen, Dialogue((user("a"), assistant("b"), user(text)), "d")) == plain
            assert control_ids(chosen, Dialogue((user("a"), assistant("b"), user("c")), text)) == plain
            if token not in ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"):
                assert control_ids(chosen, Dialogue((user("a"), assistant(text), user("c")), "d")) == plain
    assert template.stop_token in typed


def control_ids(chosen: Tokenizer, dialogue: Dialogue) -> list[int]:
    prompt = splice(TEMPLATES["internvl2_5"].render(dialogue), chosen)
    return [token for token in prompt.ids if token in chosen.control_ids]


def test_grounding_markers_in_the_models_own_answers_keep_their_tokens() -> None:
    chosen = tokenizer()
    answer = "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"
    ids = splice(TEMPLATES["internvl2_5"].render(Dialogue((user("a"), assistant(answer), user("c")))), chosen).ids
    assert [chosen.token_id(token) for token in ("<ref>", "</ref>", "<box>", "</box>")] == [
        token for token in ids if chosen.bytes_of(token) in (b"<ref>", b"</ref>", b"<box>", b"</box>")
    ]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_encoding_any_text_loses_nothing_but_its_normal_form(text: str) -> None:
    chosen = tokenizer()
    assert b"".join(map(chosen.bytes_of, chosen.encode(text))).decode() == unicodedata.normalize("NFC", text)


def test_placeholders_stand_where_the_segments_are_and_nowhere_else() -> None:
    chosen = tokenizer()
    first, second = ref("aa" * 32, tiles=2), ref("bb" * 32)
    turn = user("<image> is text, this is not: ", VisualSegment((first,)), " and ", VisualSegment((second, first)))
    prompt = splice(TEMPLATES["internvl2_5"].render(Dialogue((turn,))), chosen)
    context, start, end = (chosen.token_id(token) for token in ("<IMG_CONTEXT>", "<img>", "</img>"))
    assert [placeholder.ref for placeholder in prompt.placeholders] == [first, second, first]
    assert prompt.num_visual_tokens == prompt.ids.count(context) == 20
    for placeholder in prompt.placeholders:
        covered = prompt.ids[placeholder.start : placeholder.start + placeholder.length]
        assert set(covered) == {context}
        assert placeholder.length == placeholder.ref.token_count
    assert (prompt.ids.count(start), prompt.ids.count(end)) == (2, 2)


@pytest.mark.parametrize(
    "turns",
    [
        (),
        (assistant("a"),),
        (user("a"), user("b")),
        (user("a"), assistant("b")),
        (user("a"), Turn(Role.ASSISTANT, (VisualSegment((ref(),)),)), user("c")),
    ],
)
def test_a_dialogue_in_no_order_that_a_template_knows_is_refused(turns: tuple[Turn, ...]) -> None:
    with pytest.raises(InvalidRequest):
        Dialogue(turns)


def test_a_last_turn_without_text_and_media_is_refused() -> None:
    with pytest.raises(EmptyMessage):
        Dialogue((user(""),))


def test_an_empty_earlier_answer_is_legal() -> None:
    assert Dialogue((user("a"), assistant(""), user("b")))


def test_an_unknown_control_token_is_a_fault_of_the_checkpoint() -> None:
    with pytest.raises(CheckpointError):
        tokenizer().token_id("<|no_such_token|>")
