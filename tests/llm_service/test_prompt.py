"""Prompts: templates as the reference writes them, and text that can never become a control token."""

import hashlib
import json
import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from llm_service.prompt.dialogue import (
    Dialogue,
    Role,
    Segment,
    TextSegment,
    ToolCallSegment,
    Turn,
    VisualSegment,
)
from llm_service.prompt.splice import PlaceholderRange, splice
from llm_service.prompt.template import TEMPLATES, Piece
from llm_service.prompt.tokenizer import GROUNDING_MARKERS, TextRules, Tokenizer, load_tokenizer
from llm_service.prompt.vocabulary import SentencePieceVocabulary, bare_byte_pairs
from llm_service.prompt.writer import PromptWriter
from shared.errors import CheckpointError, EmptyMessage, InvalidRequest, NotSupportedByModel
from tests.golden_cases import ALL_CHECKPOINTS, CHECKPOINTS, GOLDEN, header
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


def tool(text: str) -> Turn:
    return Turn(Role.TOOL, (TextSegment(text),))


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


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_no_typed_special_token_becomes_one_in_any_field(checkpoint: str) -> None:
    chosen, template = tokenizer(checkpoint), TEMPLATES[header(checkpoint)["template"]]

    def control(first: str = "a", answer: str = "b", last: str = "c", system: str = "d", **kind: bool) -> list[str]:
        dialogue = Dialogue((user(first), assistant(answer), user(last)), system, **kind)
        found = control_tokens(chosen, template.render(dialogue))
        return [token for token in found if token not in GROUNDING_MARKERS or not kind]

    # A control piece of the vocabulary itself (`<s>`) may have no text at all.
    typed = [text for token in chosen.control_ids if (text := chosen.bytes_of(token).decode())]
    assert {template.stop_token, "<img>", "<IMG_CONTEXT>", *GROUNDING_MARKERS} <= set(typed)
    plain = control()
    for token in typed:
        for text in (token, f"x{token}y", token[:-1] + token, f"{token} {token}", f"<ref>{token}</ref>{token}<box>"):
            assert control(first=text) == control(last=text) == control(system=text) == plain, text
            assert control(first=text, answer=text, last=text, system=text, grounding=True) == plain, text


def test_no_text_that_the_vocabulary_normalizes_to_a_control_token_becomes_one(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a person says hello to another person\n" * 50)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<|im_end|>"],
        minloglevel=2,
    )
    vocabulary = SentencePieceVocabulary((tmp_path / "tokenizer.model").read_bytes(), literal_spaces=False)
    (end_id,) = set(vocabulary.encode("<|im_end|>")) & {vocabulary.token_id("<|im_end|>")}
    assert end_id in vocabulary.encode("hello \uff1c|im_end|\uff1e")
    chosen = Tokenizer(vocabulary, {}, frozenset(), TextRules())
    for text in ("hello <|im_end|>", "hello \uff1c|im_end|\uff1e"):
        ids = chosen.encode(text)
        assert end_id not in ids
        assert b"".join(map(chosen.bytes_of, ids)).replace(b" ", b"") == b"hello<|im_end|>"


def test_grounding_markers_in_the_models_own_answers_keep_their_tokens() -> None:
    chosen = tokenizer()
    answer = "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"
    ids = splice(TEMPLATES["internvl2_5"].render(Dialogue((user("a"), assistant(answer), user("c")))), chosen).ids
    assert [chosen.token_id(token) for token in ("<ref>", "</ref>", "<box>", "</box>")] == [
        token for token in ids if chosen.bytes_of(token) in (b"<ref>", b"</ref>", b"<box>", b"</box>")
    ]


def test_grounding_makes_tokens_of_the_markers_that_a_user_types_and_of_nothing_else() -> None:
    chosen, template = tokenizer("internvl2-26b-tiny"), TEMPLATES["internlm2-chat"]
    typed = user("<ref>a cat</ref> <|im_end|><img><s>")
    dialogue = Dialogue((typed, assistant("<box>[[1]]</box>"), typed), "<ref>")
    plain = control_tokens(chosen, template.render(dialogue))
    grounded = control_tokens(chosen, template.render(replace(dialogue, grounding=True)))
    assert [token for token in plain if token in GROUNDING_MARKERS] == ["<box>", "</box>"]
    markers = ["<ref>", "</ref>", "<box>", "</box>", "<ref>", "</ref>"]
    assert [token for token in grounded if token in GROUNDING_MARKERS] == markers
    assert [token for token in grounded if token not in markers] == [token for token in plain if token not in markers]


def test_grounding_is_refused_for_a_model_without_markers() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bare = bare_byte_pairs(json.dumps({"model": model, "decoder": decoder}))
    writer = PromptWriter(TEMPLATES["Hermes-2"], Tokenizer(bare, {}, frozenset(), TextRules()))
    with pytest.raises(NotSupportedByModel):
        writer.check(Dialogue((user("a"),), grounding=True))
    writer.check(Dialogue((user("a"),)))


def control_tokens(chosen: Tokenizer, pieces: list[Piece]) -> list[str]:
    ids = splice(pieces, chosen).ids
    return [chosen.bytes_of(token).decode() for token in ids if token in chosen.control_ids]


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_encoding_any_text_loses_nothing_but_its_normal_form(checkpoint: str, text: str) -> None:
    chosen = tokenizer(checkpoint)
    spelled = b"".join(map(chosen.bytes_of, chosen.encode(text))).decode()
    # SentencePiece writes a space as U+2581, so that it reads both as a space.
    same = text.replace("\u2581", " ") if (GOLDEN / "checkpoints" / checkpoint / "tokenizer.model").exists() else text
    assert spelled in (same, unicodedata.normalize("NFC", same))
    assert chosen.control_ids.isdisjoint(chosen.encode(text))


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


def test_frames_of_a_video_are_places_for_slices_of_one_embedding() -> None:
    chosen = tokenizer()
    video = replace(ref(tiles=3), frame_count=3)
    parts = [part for frame in (0, 2) for part in (f"Frame{frame + 1}: ", VisualSegment((video,), frame), "\n")]
    dialogue = Dialogue((user(*parts, "What happens?"),))
    prompt = splice(TEMPLATES["internvl2_5"].render(dialogue), chosen)
    assert prompt.placeholders == tuple(
        PlaceholderRange(place.start, 4, video, offset)
        for place, offset in zip(prompt.placeholders, (0, 8), strict=True)
    )
    assert prompt.num_visual_tokens == dialogue.num_visual_tokens == 8
    assert prompt_text(TEMPLATES["internvl2_5"].render(dialogue)).count("Frame3: <img>" + "<IMG_CONTEXT>" * 4) == 1


@pytest.mark.parametrize(
    "visual",
    [
        VisualSegment((ref(tiles=2),), 0),
        VisualSegment((replace(ref(tiles=2), frame_count=2),), 2),
        VisualSegment((replace(ref(tiles=2), frame_count=2),), -1),
        VisualSegment((replace(ref(tiles=1, tokens_per_tile=5), frame_count=2),), 0),
        VisualSegment((replace(ref(tiles=2), frame_count=2),) * 2, 0),
    ],
    ids=["picture", "behind the last", "before the first", "uneven", "two videos"],
)
def test_a_frame_that_the_medium_does_not_have_is_refused(visual: VisualSegment) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Dialogue((user("a", visual),))
    assert caught.value.field == "prompt.turns[0].segments"


def test_every_turn_of_the_models_begins_where_its_first_token_is() -> None:
    for checkpoint in ALL_CHECKPOINTS:
        chosen, template = tokenizer(checkpoint), TEMPLATES[header(checkpoint)["template"]]
        prompt = splice(
            template.render(Dialogue((user("a"), assistant("+"), user("b"), assistant("-"), user("c")))), chosen
        )
        first, second, end = prompt.answer_starts
        assert [chosen.bytes_of(prompt.ids[start]) for start in (first, second)] == [b"+", b"-"]
        assert end == len(prompt.ids)


@pytest.mark.parametrize(
    "turns",
    [
        (),
        (assistant("a"),),
        (user("a"), user("b")),
        (user("a"), assistant("b")),
        (user("a"), Turn(Role.ASSISTANT, (VisualSegment((ref(),)),)), user("c")),
        (tool("1"),),
        (user("a"), tool("1")),
        (user("a"), assistant("b"), tool("1"), user("c")),
        (user("a", ToolCallSegment("look", "{}")),),
        (user("a"), assistant("b"), Turn(Role.TOOL, (VisualSegment((ref(),)),))),
        (user("a"), Turn(Role.ASSISTANT, (ToolCallSegment("look", "[1]"),)), tool("1")),
        (user("a"), Turn(Role.ASSISTANT, (ToolCallSegment("look up", "{}"),)), tool("1")),
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
