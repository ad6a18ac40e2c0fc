"""The golden checkpoints as models: the real tower and the real decoder in float32, fed with the golden ids."""

from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import torch

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.model_runner import ModelRunner
from llm_service.engine.pace import StepLimits
from llm_service.engine.sequence import EngineRequest, SamplingParams
from llm_service.model.attention import BatchLayout, KVCache, Span
from llm_service.model.decoder import Decoder
from llm_service.model.loader import LoadSettings, load_decoder
from llm_service.model.rope import Rope, rotation_of
from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.splice import PlaceholderRange, PromptTokens
from shared.checkpoint import Checkpoint, read_config
from shared.digest import digest_of_fields
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
        images = [image for group in case.groups for image in group]
        embeddings = tuple(map(self.embedding, images))
        context_id = self.header["img_context_token_id"]
        places = iter([place for place, token in enumerate(case.input_ids) if token == context_id])
        placeholders = []
        for image, embedding in zip(images, embeddings, strict=True):
            own = [next(places) for _ in range(len(embedding))]
            assert own == list(range(own[0], own[0] + len(own)))
            digest = digest_of_fields(image.name, image.content, image.max_tiles)
            ref = EmbeddingRef(digest, 1, len(embedding), embedding.shape[1], "float32", "")
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

    def engine(self, num_blocks: int = NUM_BLOCKS, max_sequences: int = 64, step_tokens: int = 2048) -> PagedEngine:
        """Return an engine over the decoder, not yet started."""
        cache = KVCache(self.decoder.config, num_blocks, BLOCK_SIZE, torch.float32, CPU)
        limits = EngineLimits(max_sequences, StepLimits(step_tokens), max_tokens=num_blocks * BLOCK_SIZE)
        runner, blocks = ModelRunner(self.decoder, cache), BlockManager(num_blocks, BLOCK_SIZE)
        return PagedEngine(runner, blocks, limits, partial(rotation_of, self.decoder.config.rope))


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
    return decoder.logits(decoder(hidden, positions, torch.full((count,), count), layout, cache, rope)).float()


@cache
def golden_model(checkpoint: str) -> GoldenModel:
    """Return a golden checkpoint's model, loaded once."""
    return GoldenModel(checkpoint)
