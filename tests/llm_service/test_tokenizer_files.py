"""Tokenizer files of a checkpoint: read for what they are, refused by name where they are damaged, never executed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from llm_service.prompt.tokenizer import listed_special_tokens, load_tokenizer
from shared.errors import CheckpointError
from tests.golden_cases import GOLDEN

FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(GOLDEN / "checkpoints" / "internvl2-8b-tiny" / name, tmp_path)
    return tmp_path


def change(directory: Path, **settings: Any) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_code_that_a_checkpoint_brings_along_is_never_run(directory: Path) -> None:
    mark = directory / "was_run"
    code = f"open({str(mark)!r}, 'w').close()\nclass InternLM2Tokenizer: pass\n"
    (directory / "tokenization_internlm2.py").write_text(code)
    change(directory, auto_map={"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]})
    load_tokenizer(directory)
    assert not mark.exists()


def test_a_class_that_is_not_known_is_named_with_those_that_are(directory: Path) -> None:
    change(directory, tokenizer_class="OtherTokenizer")
    with pytest.raises(CheckpointError, match=r"'OtherTokenizer'.*InternLM2Tokenizer"):
        load_tokenizer(directory)


def test_a_missing_model_file_is_named(directory: Path) -> None:
    (directory / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is missing"):
        load_tokenizer(directory)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 100])
def test_a_damaged_model_file_is_named(directory: Path, content: bytes) -> None:
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read"):
        load_tokenizer(directory)


def test_a_beginning_is_written_only_where_the_checkpoint_says_so(directory: Path) -> None:
    assert load_tokenizer(directory).bos_ids == (1,)
    change(directory, add_bos_token=False)
    assert load_tokenizer(directory).bos_ids == ()


def test_the_files_of_internlm3s_own_class_read_as_internlm2s(directory: Path) -> None:
    text = "Hello <|im_end|> 世界"
    before = load_tokenizer(directory).encode(text)
    change(directory, tokenizer_class="InternLM3Tokenizer")
    assert load_tokenizer(directory).encode(text) == before


def test_a_beginning_that_is_written_as_an_object_is_read_and_none_is_none(directory: Path) -> None:
    change(directory, bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False})
    assert load_tokenizer(directory).bos_ids == (1,)
    change(directory, bos_token=None)
    assert load_tokenizer(directory).bos_ids == ()


def test_a_beginning_that_the_vocabulary_does_not_have_is_named(directory: Path) -> None:
    change(directory, bos_token="<|none|>")
    with pytest.raises(CheckpointError, match=r"no bos_token '<\|none\|>'"):
        load_tokenizer(directory)
    change(directory, add_bos_token=False)
    assert load_tokenizer(directory).bos_ids == ()


@pytest.mark.parametrize("token", [3, ["<s>"], {"content": 1}])
def test_a_special_token_that_is_no_text_is_refused(directory: Path, token: Any) -> None:
    change(directory, bos_token=token)
    with pytest.raises(CheckpointError, match="no text"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    "listed",
    [
        {"extra_special_tokens": ["<box>", {"content": "<ref>"}], "additional_special_tokens": None},
        {"extra_special_tokens": {"box_token": "<box>"}, "additional_special_tokens": ["<ref>"]},
        {"extra_special_tokens": None, "additional_special_tokens": [{"content": "<box>"}, "<ref>"]},
    ],
)
def test_special_tokens_are_read_in_every_form_that_the_library_has_had(listed: dict[str, Any]) -> None:
    assert listed_special_tokens({"eos_token": {"content": "</s>"}, **listed}) == {"</s>", "<box>", "<ref>"}


@pytest.mark.parametrize(
    "checkpoint",
    [
        "internvl2-1b-tiny",
        "internvl2_5-4b-tiny",
        "internvl3-8b-tiny",
        "internvl3-78b-tiny",
        "internvl2-llama3-76b-tiny",
    ],
)
def test_a_tokenizer_that_transformers_has_saved_again_is_the_same_one(tmp_path: Path, checkpoint: str) -> None:
    given = GOLDEN / "checkpoints" / checkpoint
    name = json.loads((given / "tokenizer_config.json").read_text())["tokenizer_class"]
    getattr(transformers, name).from_pretrained(str(given)).save_pretrained(tmp_path)
    before, after = load_tokenizer(given), load_tokenizer(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert isinstance(saved["extra_special_tokens"], list)
    assert after.size == before.size
    for kind in ("bos_ids", "hidden_ids", "control_ids", "marker_ids", "set_apart_ids", "has_markers"):
        assert getattr(after, kind) == getattr(before, kind), kind
    text = "Hello <|im_end|> <ref>世界</ref> <tool_call>\n\n 123"
    for markup in (False, True):
        assert after.encode(text, markup=markup) == before.encode(text, markup=markup)


def test_a_sentencepiece_model_in_the_librarys_own_form_is_refused_and_not_misread(tmp_path: Path) -> None:
    given = GOLDEN / "checkpoints" / "internvl2-8b-tiny"
    transformers.PreTrainedTokenizerFast.from_pretrained(str(given)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no byte-level vocabulary"):
        load_tokenizer(tmp_path)
