"""What the model is trained on is what the services say: prompts, tokens, newlines."""

import json
from pathlib import Path

import pytest

from examples.nano.batches import BatchMaker
from examples.nano.prompts import PromptWriter
from examples.nano.tokenizer import CHAT_TOKENS, INTERNVL_TOKENS, MAX_VOCABULARY, write_tokenizer
from examples.nano.world import Kind, Shown, Situation, Turn, situation, texts
from examples.nano.world.wording import SYSTEM_MESSAGE
from gateway.content import MediaPart, Medium, Message, Role, TextPart
from gateway.dialogue import Dialogue
from gateway.prompt import EmbeddingHandle, prompt_of
from gateway.prompt import TextSegment as GatewayText
from llm_service.prompt.dialogue import Dialogue as LlmDialogue
from llm_service.prompt.dialogue import EmbeddingRef, TextSegment, VisualSegment
from llm_service.prompt.dialogue import Role as LlmRole
from llm_service.prompt.dialogue import Turn as LlmTurn
from llm_service.prompt.splice import splice
from llm_service.prompt.template import TEMPLATES
from llm_service.prompt.tokenizer import load_tokenizer

SITUATIONS = [situation(31, index) for index in range(60)]


def served_ids(directory: Path, found: Situation, turns: tuple[Turn, ...], tile_counts: list[int]) -> list[int]:
    """The prompt's ids as the gateway and the LLM service make them of a client's messages."""
    media = {Medium(str(index)): tiles for index, tiles in enumerate(tile_counts)}
    handles = {medium: EmbeddingHandle(medium.digest, tiles, 16 * tiles, b"") for medium, tiles in media.items()}
    prompt = prompt_of(Dialogue(found.system_message, (), messages_of(turns)), handles)
    llm_turns = []
    for turn in prompt.turns:
        segments = tuple(
            TextSegment(segment.text)
            if isinstance(segment, GatewayText)
            else VisualSegment(
                tuple(EmbeddingRef(h.digest, h.tile_count, h.token_count, 32, "float32", "") for h in segment.handles)
            )
            for segment in turn.segments
        )
        llm_turns.append(LlmTurn(LlmRole(turn.role), segments))
    template = TEMPLATES["internvl2_5"].with_system_message(SYSTEM_MESSAGE)
    dialogue = LlmDialogue(tuple(llm_turns), prompt.system_message)
    return list(splice(template.render(dialogue), load_tokenizer(directory)).ids)


def messages_of(turns: tuple[Turn, ...]) -> tuple[Message, ...]:
    messages = []
    for turn in turns:
        parts = tuple(
            TextPart(part)
            if isinstance(part, str)
            else MediaPart(tuple(Medium(str(index)) for index in part.media), len(part.media) > 1)
            for part in turn.parts
        )
        messages += [Message(Role.USER, parts), Message(Role.ASSISTANT, (TextPart(turn.answer),))]
    return tuple(messages[:-1])


@pytest.mark.parametrize("index", range(0, 60, 6))
def test_a_training_prompt_is_what_gateway_and_llm_service_make_of_it(
    index: int, directory: Path, maker: BatchMaker
) -> None:
    found = SITUATIONS[index]
    tile_counts = [len(maker.view(medium).tiles) for medium in found.media]
    for dialogue in found.dialogues[:2]:
        prompt = maker.writer.prompt(dialogue, tile_counts, found.system_message)
        assert list(prompt.ids) == served_ids(directory, found, dialogue, tile_counts)


def test_the_prompt_reads_as_the_released_template_says(writer: PromptWriter) -> None:
    turn = Turn((Shown((0,)), "\nWhat is this?"), "a red star", Kind.DESCRIBE)
    sequence = writer.sequence((turn,), [1], None)
    text = b"".join(map(writer.tokenizer.bytes_of, sequence.ids)).decode()
    assert text == (
        f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 16}</img>\n"
        "What is this?<|im_end|>\n<|im_start|>assistant\na red star<|im_end|>"
    )


def test_every_prompt_of_a_dialogue_begins_with_the_one_before_and_its_answer(writer: PromptWriter) -> None:
    for found in SITUATIONS:
        for dialogue in found.dialogues:
            counts = [2] * len(found.media)
            whole = writer.sequence(dialogue, counts, found.system_message)
            for length, span in enumerate(whole.answers, start=1):
                prompt = writer.prompt(dialogue[:length], counts, found.system_message)
                assert whole.ids[: span.start] == prompt.ids
                answer = writer.answer_ids(dialogue[length - 1].answer)
                assert list(whole.ids[span.start : span.end]) == answer
                assert writer.text_of(answer) == dialogue[length - 1].answer


def test_the_tokenizer_gives_every_text_of_the_world_back(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    for text in texts(8, 150):
        ids = tokenizer.encode(text, markup=True)
        assert b"".join(map(tokenizer.bytes_of, ids)).decode() == text


def test_the_tokenizer_gives_any_other_text_back(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    text = "Größe? 東京 \N{OWL}\t<img> 12.5 %\n\n  end"
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))).decode() == text


def test_digits_stand_alone(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert [tokenizer.bytes_of(token) for token in tokenizer.encode("4821")] == [b"4", b"8", b"2", b"1"]


def test_markers_are_tokens_in_answers_and_plain_text_in_questions(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    text = "<ref>the star</ref>"
    assert tokenizer.token_id("<ref>") in tokenizer.encode(text, markup=True)
    assert tokenizer.token_id("<ref>") not in tokenizer.encode(text)
    assert tokenizer.token_id("<ref>") not in tokenizer.hidden_ids


def test_the_same_texts_always_give_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_tokenizer(tmp_path / name, texts(8, 150), 112)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_the_vocabulary_is_small_and_ends_with_the_added_tokens(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    added = [*CHAT_TOKENS, *INTERNVL_TOKENS]
    assert [tokenizer.token_id(token) for token in added] == list(range(tokenizer.size - len(added), tokenizer.size))
    assert tokenizer.size <= MAX_VOCABULARY + len(added)
    config = json.loads((directory / "config.json").read_text())
    assert config["llm_config"]["vocab_size"] == tokenizer.size
