"""Every family's prompts are the reference's: text and ids, for every golden conversation and for the critic's."""

import json
import re
from functools import cache

import pytest

from llm_service.prompt.dialogue import Dialogue, EmbeddingRef, Role, Segment, TextSegment, Turn, VisualSegment
from llm_service.prompt.template import TEMPLATES
from llm_service.prompt.tokenizer import load_tokenizer
from llm_service.prompt.writer import PromptWriter
from shared.checkpoint import read_config
from shared.critic import CHOICES, SYSTEM_MESSAGE, critic_turns, solution_steps
from tests.golden_cases import ALL_CHECKPOINTS, GOLDEN, UNSAFE_CASES, expand, header, turns
from tests.prompt_text import golden_dialogue, prompt_text

CRITICS = ["internvl2-8b-tiny", "internvl3-8b-tiny"]


@cache
def writer(checkpoint: str) -> PromptWriter:
    directory = GOLDEN / "checkpoints" / checkpoint
    config = read_config(directory)
    template = TEMPLATES[config.template].with_system_message(config.system_message)
    return PromptWriter(template, load_tokenizer(directory))


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_prompts_and_ids_are_the_references(checkpoint: str) -> None:
    safe = [case for case in turns(checkpoint) if case.name not in UNSAFE_CASES]
    assert len(safe) > 25
    for case in safe:
        dialogue = golden_dialogue(case, header(checkpoint)["num_image_token"])
        assert prompt_text(writer(checkpoint).template.render(dialogue)) == case.prompt, case.name
        assert list(writer(checkpoint).write(dialogue).ids) == case.input_ids, case.name


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_typed_control_tokens_stay_text_where_the_reference_obeys_them(checkpoint: str) -> None:
    control = writer(checkpoint).tokenizer.control_ids
    plain = writer(checkpoint).write(Dialogue((Turn(Role.USER, (TextSegment("Hi"),)),))).ids
    unsafe = [case for case in turns(checkpoint) if case.name in UNSAFE_CASES]
    assert {case.name for case in unsafe} == set(UNSAFE_CASES)
    for case in unsafe:
        ids = writer(checkpoint).write(golden_dialogue(case, header(checkpoint)["num_image_token"])).ids
        assert list(ids) != case.input_ids
        assert [token for token in ids if token in control] == [token for token in plain if token in control]


@pytest.mark.parametrize("checkpoint", CRITICS)
def test_the_critics_prompts_and_places_of_judgement_are_the_references(checkpoint: str) -> None:
    golden = json.loads((GOLDEN / "expected" / checkpoint / "prm.json").read_text())
    assert golden["system_message"] == SYSTEM_MESSAGE
    tokens = golden["image"]["n_tiles"] * header(checkpoint)["num_image_token"]
    picture = EmbeddingRef("a", golden["image"]["n_tiles"], tokens, 64, "float32", "")
    question: list[str | EmbeddingRef] = [picture, f"\n{golden['question']}"]
    for candidate in golden["candidates"]:
        steps = solution_steps(candidate["candidate"])
        assert list(steps) == candidate["steps"]
        said = tuple(
            Turn(Role.ASSISTANT if turn.is_critic else Role.USER, tuple(map(segment, turn.parts)))
            for turn in critic_turns(question, steps)
        )
        dialogue = Dialogue(said, SYSTEM_MESSAGE)
        # The reference reads one more sign, of which nothing is asked.
        ending = CHOICES[0] + writer(checkpoint).template.separator
        assert prompt_text(writer(checkpoint).template.render(dialogue)) + ending == expand(candidate["prompt"])
        prompt = writer(checkpoint).write(dialogue)
        assert list(prompt.ids) == candidate["input_ids"][: len(prompt.ids)]
        assert [start - 1 for start in prompt.answer_starts] == candidate["positions"]
        (places,) = [(place.start, place.length) for place in prompt.placeholders]
        assert expand(candidate["prompt"]).count("<IMG_CONTEXT>") == places[1] == tokens


def segment(part: str | EmbeddingRef) -> Segment:
    return TextSegment(part) if isinstance(part, str) else VisualSegment((part,))


@pytest.mark.parametrize("checkpoint", CRITICS)
def test_each_sign_of_the_critic_is_one_token(checkpoint: str) -> None:
    golden = json.loads((GOLDEN / "expected" / checkpoint / "prm.json").read_text())
    signs = [writer(checkpoint).tokenizer.encode(sign) for sign in CHOICES]
    assert signs == [[golden["plus_token_id"]], [golden["minus_token_id"]]]


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_only_the_qwen_2_5_models_know_tools(checkpoint: str) -> None:
    assert writer(checkpoint).knows_tools is bool(re.match(r"internvl(2_5-4b|3-8b|3-78b)-", checkpoint))
