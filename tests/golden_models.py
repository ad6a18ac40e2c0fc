"""The golden checkpoints as models: the real tower and the real decoder in float32, fed with the golden ids."""

from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.model_runner import ModelRunner
from llm_service.engine.sequence import EngineRequest, SamplingParams
from llm_service.model.attention import BatchLayout, KVCache, Span
from llm_service.model.decoder import Decoder
from llm_service.model.loader import LoadSettings, load_decoder
from llm_service.model.rope import Rope
from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.splice import PlaceholderRange, PromptTokens
from shared.checkpoint import Checkpoint, read_config
from tests.golden_cases import GOLDEN, GoldenImage, GoldenTurn, header
from vision_service.model.loader import load_tower
from vision_service.model.tower import TowerConfig, VisionTower
from vision_service.preprocess.image import preprocess
from vision_service.preprocess.tiling import TilingSpec

CPU = torch.device("cpu")
BLOCK_SIZE = 16
NUM_BLOCKS = 4096


class GoldenModel:
    """Both sides of one golden checkpoint. `llm_changes` replaces settings of its `llm_config`."""

    def __init__(self, checkpoint: str, **llm_changes: Any) -> None:
        directory = GOLDEN / "checkpoints" / checkpoint
        config = read_config(directory)
        self.config = replace(config, llm={**config.llm, **llm_changes})
        self.decoder: Decoder = load_decoder(directory, self.config, LoadSettings(CPU, torch.float32))
        self.header = header(checkpoint)
        self._directory = directory
        self._embedded: dict[GoldenImage, torch.Tensor] = {}

    @cached_property
    def tower(self) -> VisionTower:
        """The vision side."""
        return load_tower(Checkpoint(self._directory), TowerConfig.of(self.config), CPU, torch.float32).tower

    def embedding(self, image: GoldenImage) -> torch.Tensor:
        """Return a picture's visual tokens [tokens, hidden]."""
        if image not in self._embedded:
            spec = TilingSpec.of(self.config).adjusted(image.max_tiles, None)
            picture = preprocess(image.content, spec, 10**8)
            with torch.inference_mode():
                self._embedded[image] = self.tower(torch.tensor(picture.tiles)).flatten(0, 1)
        return self._embedded[image]

    def request(self, case: GoldenTurn) -> EngineRequest:
        """Return what the engine is asked in a case: the golden ids, pictures at the context tokens in order."""
        embeddings = tuple(self.embedding(image) for group in case.groups for image in group)
        context_id = self.header["img_context_token_id"]
        places = iter([place for place, token in enumerate(case.input_ids) if token == context_id])
        placeholders = []
        for embedding in embeddings:
            own = [next(places) for _ in range(len(embedding))]
            assert own == list(range(own[0], own[0] + len(own)))
            ref = EmbeddingRef("", 1, len(embedding), embedding.shape[1], "float32", "")
            placeholders.append(PlaceholderRange(own[0], len(embedding), ref))
        assert not embeddings or next(places, None) is None
        params = SamplingParams(
            max_output_tokens=case.config["max_new_tokens"],
            repetition_penalty=case.config.get("repetition_penalty", 1.0),
            stop_token_ids=frozenset({self.header["eos_token_id"]}),
        )
        return EngineRequest(PromptTokens(tuple(case.input_ids), tuple(placeholders)), embeddings, params)

    def logits(self, request: EngineRequest) -> torch.Tensor:
        """Return float32 logits [tokens, vocab] of a prompt, without the engine."""
        return prompt_logits(self.decoder, request.prompt, request.embeddings)

    def engine(self) -> PagedEngine:
        """Return an engine over the decoder, not yet started."""
        cache = KVCache(self.decoder.config, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
        limits = EngineLimits(max_sequences=64, max_batch_tokens=2048, max_tokens=NUM_BLOCKS * BLOCK_SIZE)
        return PagedEngine(ModelRunner(self.decoder, cache), BlockManager(NUM_BLOCKS, BLOCK_SIZE), limits)


@torch.inference_mode()
def prompt_logits(decoder: Decoder, prompt: PromptTokens, embeddings: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
    """Return a decoder's float32 logits [tokens, vocab] of a prompt, computed at once."""
    count = len(prompt.ids)
    hidden = decoder.embed(torch.tensor(prompt.ids))
    for place, embedding in zip(prompt.placeholders, embeddings, strict=True):
        hidden[place.start : place.start + place.length] = embedding
    cache = KVCache(decoder.config, -(-count // BLOCK_SIZE), BLOCK_SIZE, decoder.dtype, CPU)
    positions = torch.arange(count)
    layout = BatchLayout((Span(0, count, count, torch.arange(cache.num_blocks)),), positions)
    rope = Rope(decoder.config.rope, decoder.config.head_dim, CPU)
    return decoder.logits(decoder(hidden, positions, torch.full((count,), count), layout, cache, rope))


@cache
def golden_model(checkpoint: str) -> GoldenModel:
    """Return a golden checkpoint's model, loaded once."""
    return GoldenModel(checkpoint)
