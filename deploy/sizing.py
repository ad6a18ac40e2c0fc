"""How much memory each released model takes, per service: `python -m deploy.sizing` prints docs/models.md."""

import gzip
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llm_service.model.config import DecoderConfig, architecture_of, decoder_config

# Tensor names and shapes of the released models, which the tests hold the loaders to.
ROWS = Path(__file__).parents[1] / "tests/golden/rows"
_FAMILIES = {
    "Qwen2ForCausalLM": "Qwen2",
    "InternLM2ForCausalLM": "InternLM2",
    "Phi3ForCausalLM": "Phi-3",
    "LlamaForCausalLM": "Llama",
}
_WIDE, _NARROW, _SCALE = 2, 1, 4  # bytes: bf16, int8, the float32 scale of a row of int8
_CONTEXT_TOKENS = 8192
_TEXT = """\
# Models

What each released model takes in memory, by service. Made by `python -m deploy.sizing > docs/models.md` from the names
and shapes of the released tensors; `tests/parity/test_rows.py` loads the same ones on the meta device.

{table}

- Weights are in GiB. At int8 the matrices of the blocks have one byte per number and a float32 scale per row;
  embeddings, head, norms, biases and projector stay at 16 bits.
- The KV cache is at 16 bits, for one sequence; sequences that share a prompt's blocks share their memory.
- An embedding is what one tile becomes, at 16 bits: {tokens} visual tokens. A picture has up to 12 tiles and its
  thumbnail.
- While it loads, a service takes the memory of its weights and some megabytes more. Activations come on top.

## Layouts

A model is served from the layout of the model cards (`InternVLChatModel`) or from the `-hf` layout
(`InternVLForConditionalGeneration`), the latter under the names of the released repositories or of the library's own
state dict; one file or shards with an index. The same weights give the same embedding digests in every layout.

The `-hf` layout names no conversation template in config.json. InternVL2.5 and 3 are served with `internvl2_5`, Phi-3
with `phi3-chat`; for an InternVL2 that was converted, add `"template": "internlm2-chat"` or `"Hermes-2"` to the file.

Language models: Qwen2, Llama (Yi is one), InternLM2, InternLM3, Phi-3. Rotary positions: plain, dynamic NTK, long rope.
A setting that none of them has is refused at start by its name, as is a tensor that config.json does not speak of.
"""


@dataclass(frozen=True, slots=True)
class Sizing:
    """What one model takes, in bytes."""

    name: str
    vision: str
    language: str
    vision_bf16: int
    vision_int8: int
    language_bf16: int
    language_int8: int
    kv_per_token: int
    embedding_per_tile: int


def sizing_of(row: Mapping[str, Any]) -> Sizing:
    """Return what a model takes, from its config and its tensors' shapes."""
    config, tensors = row["config"], row["tensors"]
    decoder = decoder_config(config["llm_config"])
    language = {name: shape for name, shape in tensors.items() if name.startswith("language_model.")}
    vision = {name: shape for name, shape in tensors.items() if name not in language}
    return Sizing(
        name=row["row"],
        vision="InternViT-6B" if config["vision_config"]["num_hidden_layers"] == 45 else "InternViT-300M",
        language=_FAMILIES[architecture_of(config["llm_config"])],
        vision_bf16=_weights(vision, matrix_bytes=_WIDE),
        vision_int8=_weights(vision, matrix_bytes=_NARROW),
        language_bf16=_weights(language, matrix_bytes=_WIDE),
        language_int8=_weights(language, matrix_bytes=_NARROW),
        kv_per_token=kv_bytes_per_token(decoder),
        embedding_per_tile=_tokens_per_tile(config) * decoder.hidden_size * _WIDE,
    )


def kv_bytes_per_token(config: DecoderConfig) -> int:
    """Return the bytes of one token's keys and values over all layers, at 16 bits."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * _WIDE


def released() -> list[Sizing]:
    """Return what each released model takes."""
    return [sizing_of(row) for row in _rows()]


def document() -> str:
    """Return the text of docs/models.md."""
    rows = _rows()
    return _TEXT.format(table=_table([sizing_of(row) for row in rows]), tokens=_tokens_per_tile(rows[0]["config"]))


def _rows() -> list[dict[str, Any]]:
    names = json.loads((ROWS / "index.json").read_text(encoding="utf-8"))
    return [json.loads(gzip.decompress((ROWS / f"{name}.json.gz").read_bytes())) for name in names]


def _weights(shapes: Mapping[str, list[int]], matrix_bytes: int) -> int:
    total = 0
    for name, shape in shapes.items():
        if ".layers." in name and len(shape) == 2 and matrix_bytes == _NARROW:
            total += prod(shape) * _NARROW + shape[0] * _SCALE
        else:
            total += prod(shape) * _WIDE
    return total


def _tokens_per_tile(config: Mapping[str, Any]) -> int:
    side = config["force_image_size"] // config["vision_config"]["patch_size"]
    return int(side**2 * config["downsample_ratio"] ** 2)


def _table(sizings: list[Sizing]) -> str:
    header = (
        "| model | vision | language | vision bf16 | vision int8 | language bf16 | language int8 "
        "| KV per token | KV of 8k tokens | embedding of a tile |"
    )
    return "\n".join([header, "|" + " --- |" * 3 + " ---: |" * 7, *map(_line, sizings)])


def _line(sizing: Sizing) -> str:
    weights = (sizing.vision_bf16, sizing.vision_int8, sizing.language_bf16, sizing.language_int8)
    cells = [
        sizing.name,
        sizing.vision,
        sizing.language,
        *(f"{size / 2**30:.2f}" for size in weights),
        f"{sizing.kv_per_token / 2**10:.0f} KiB",
        f"{sizing.kv_per_token * _CONTEXT_TOKENS / 2**30:.2f} GiB",
        f"{sizing.embedding_per_tile / 2**20:.2f} MiB",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(document())
