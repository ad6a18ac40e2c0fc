"""Writes checkpoints of random weights to measure with: `python -m benchmarks.checkpoints 1b DIR`.

In the `-hf` layout, which transformers and other servers read as well as ours. `1b` has the shapes of InternVL3-1B (938
million numbers), `small` those of a model that shows what a request costs besides the arithmetic. The tokenizer is
learned from Python's library and filled up to the vocabulary's size. What such a model answers means nothing, but it
answers until it is stopped: no token beyond the learned ones is ever likely.
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TILE_SIZE: Final = 448
_LEARNED_TOKENS: Final = 8000
_CHAT_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_INTERNVL_TOKENS: Final = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<|video_pad|>"),
)
# Qwen2's own: digits stand alone, a word takes the space before it.
_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the two halves are."""

    vocabulary: int
    vision: Mapping[str, int]
    language: Mapping[str, int]


def _sizes(hidden: int, layers: int, heads: int, intermediate: int, **more: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    } | more


SHAPES: Final[Mapping[str, Shape]] = {
    "1b": Shape(151_674, _sizes(1024, 24, 16, 4096), _sizes(896, 24, 14, 4864, num_key_value_heads=2)),
    "small": Shape(8192, _sizes(256, 6, 4, 1024), _sizes(256, 6, 4, 1024, num_key_value_heads=2)),
}


def write_checkpoint(directory: Path, shape: Shape, seed: int = 0) -> int:
    """Write a checkpoint; return how many numbers its weights have. Takes the memory of the weights once more."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(directory, shape.vocabulary)
    for name, content in _descriptions().items():
        (directory / name).write_text(json.dumps(content, indent=1))
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    return _write_weights(directory, shape, ids, seed)


def _write_weights(directory: Path, shape: Shape, ids: Mapping[str, int], seed: int) -> int:
    from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

    torch.manual_seed(seed)
    config = InternVLConfig(**_config(shape, ids))
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = InternVLForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "position_embeddings" in name or "cls_token" in name:
            parameter.normal_(0, 0.02)  # zeros otherwise, and zeros could hide a mistake
    head = model.lm_head.weight.normal_(0, 0.02)
    head[_LEARNED_TOKENS:] *= 0.01
    stop, padding = ids["<|im_end|>"], ids["<|endoftext|>"]
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=padding, do_sample=False)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def _config(shape: Shape, ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "dynamic", "factor": 2.0},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **shape.language,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "image_size": [TILE_SIZE, TILE_SIZE],
            "patch_size": [14, 14],
            "attention_bias": True,
            "use_qk_norm": False,
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
            "layer_scale_init_value": 0.1,
            "use_mean_pooling": True,
            **shape.vision,
        },
        "image_token_id": ids["<IMG_CONTEXT>"],
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }


def _write_tokenizer(directory: Path, size: int) -> dict[str, int]:
    """Write the tokenizer's files; return the ids of the added tokens, which are the last of the vocabulary."""
    bare = json.loads(_learned().to_str())
    vocabulary: dict[str, int] = bare["model"]["vocab"]
    added_tokens = (*_CHAT_TOKENS, *_INTERNVL_TOKENS)
    first = size - len(added_tokens)
    vocabulary |= {f"\u0120tok{index}": index for index in range(len(vocabulary), first)}
    ids = {token: first + index for index, token in enumerate(added_tokens)}
    tokenizer = Tokenizer.from_str(json.dumps(bare))
    tokenizer.add_special_tokens(list(added_tokens))
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    (directory / "added_tokens.json").write_text(json.dumps(ids))
    (directory / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(ids), indent=1))
    return ids


def _learned() -> Tokenizer:
    bare = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bare.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_LEARNED_TOKENS, initial_alphabet=alphabet, show_progress=False)
    bare.train([str(file) for file in sorted(Path(os.__file__).parent.glob("*.py"))], trainer)
    return bare


def _tokenizer_config(ids: Mapping[str, int]) -> dict[str, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<|video_pad|>",
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token_id): {"content": token, **flags} for token, token_id in ids.items()},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": named,
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
        **named,
    }


def _descriptions() -> dict[str, dict[str, Any]]:
    """Return what other servers read to prepare pictures and videos, by file."""
    pictures: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": TILE_SIZE, "width": TILE_SIZE},
    }
    tiling = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    return {
        "preprocessor_config.json": pictures | tiling | {"image_processor_type": "GotOcr2ImageProcessor"},
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 256},
        "video_preprocessor_config.json": pictures | {"video_processor_type": "InternVLVideoProcessor"},
    }


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    numbers = write_checkpoint(arguments.directory, SHAPES[arguments.shape], arguments.seed)
    print(f"{arguments.directory}: {numbers / 1e6:.1f} million numbers")


if __name__ == "__main__":
    main()
