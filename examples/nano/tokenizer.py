"""Builds the tokenizer files of the released Qwen2 layout: byte-level BPE, learned from the world's own texts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
INTERNVL_TOKENS: Final = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)
MAX_VOCABULARY: Final = 900
# Qwen2's own: digits stand alone, a word takes the space before it.
_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(directory: Path, texts: Iterable[str], tile_size: int) -> int:
    """Learn a vocabulary from `texts` and write the tokenizer files; return the number of tokens, added ones included.

    Of the tokens only the chat's are listed as special, as in InternVL3: grounding markers survive decoding.
    """
    directory.mkdir(parents=True, exist_ok=True)
    bare = _learn(texts)
    bare.model.save(str(directory))  # vocab.json, merges.txt
    first = bare.get_vocab_size()
    added = {token: first + index for index, token in enumerate((*CHAT_TOKENS, *INTERNVL_TOKENS))}
    for name, content in _files(added, tile_size).items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return first + len(added)


def _learn(texts: Iterable[str]) -> Tokenizer:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bare.train_from_iterator(texts, trainer)
    return bare


def _files(added: dict[str, int], tile_size: int) -> dict[str, dict[str, Any]]:
    """Return the content of every other file, by name."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens.json": dict(sorted(added.items())),
        "special_tokens_map.json": {
            "additional_special_tokens": list(CHAT_TOKENS[1:]),
            "eos_token": {"content": CHAT_TOKENS[2], **flags},
            "pad_token": {"content": CHAT_TOKENS[0], **flags},
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token_id): {"content": token, **flags, "special": True} for token, token_id in added.items()
            },
            "additional_special_tokens": list(CHAT_TOKENS[1:]),
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": CHAT_TOKENS[2],
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": CHAT_TOKENS[0],
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        "generation_config.json": {"eos_token_id": [added[CHAT_TOKENS[2]]], "pad_token_id": added[CHAT_TOKENS[0]]},
        "preprocessor_config.json": {
            "crop_size": tile_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": tile_size,
        },
    }
