"""An answerer over a golden checkpoint, with the golden pictures behind it instead of vision replicas."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from llm_service.admission import Admission
from llm_service.answerer import Answerer, Finished, GenerationOptions
from llm_service.app import LoadedModel
from llm_service.candidate import Delta
from llm_service.embeddings import EmbeddingReader
from llm_service.engine.engine import PagedEngine
from llm_service.engine.sequence import SamplingParams
from llm_service.metrics import UNOBSERVED, LlmMetrics
from llm_service.prompt.dialogue import Dialogue, EmbeddingRef, Role, Segment, TextSegment, Turn, VisualSegment
from llm_service.settings import LlmSettings
from shared.digest import digest_of_fields
from shared.embedding import Embedding, EmbeddingInfo
from shared.local_cache import LocalEmbeddingCache
from shared.store import NoEmbeddingStore
from shared.tensors import bytes_of
from tests.golden_cases import GOLDEN, GoldenImage, GoldenTurn, pieces_of
from tests.golden_models import GoldenModel, golden_model

CHECKPOINT = "internvl3-8b-tiny"


class GoldenMedia:
    """Stands in for the vision replicas: encodes golden pictures, or several of them as the frames of one video."""

    def __init__(self, model: GoldenModel) -> None:
        self._model = model
        self._held: dict[str, tuple[GoldenImage, ...]] = {}
        self.fetched: list[str] = []

    def ref(self, images: Sequence[GoldenImage], *, is_video: bool = False) -> EmbeddingRef:
        fields = [field for image in images for field in (image.name, image.content, image.max_tiles)]
        digest = digest_of_fields(*fields, is_video)
        self._held[digest] = tuple(images)
        tiles = sum(image.num_tiles for image in images)
        config = self._model.config
        return EmbeddingRef(
            digest, tiles, tiles * config.tokens_per_tile, config.hidden_size, "float32", "", len(images) * is_video
        )

    async def fetch(self, ref: EmbeddingRef) -> Embedding:
        self.fetched.append(ref.digest)
        rows = torch.cat([self._model.embedding(image) for image in self._held[ref.digest]])
        info = EmbeddingInfo(ref.tile_count, ref.token_count, ref.hidden_size, "float32", 1, 1, 1, 1)
        return Embedding(ref.key, info, bytes_of(rows))

    def dialogue(self, case: GoldenTurn, *, as_video: bool = False) -> Dialogue:
        """Return a case's dialogue; `as_video` its pictures are the frames of one medium."""
        groups = list(case.groups)
        video = self.ref([image for group in groups for image in group], is_video=True) if as_video else None
        turns, frame = [], 0
        for role, text in case.tagged_texts:
            segments: list[Segment] = []
            for part in pieces_of(text, groups) if role == "user" else [text]:
                if isinstance(part, str):
                    segments.append(TextSegment(part))
                elif video:
                    segments.append(VisualSegment((video,), frame))
                    frame += 1
                else:
                    segments.append(VisualSegment(tuple(self.ref([image]) for image in part)))
            turns.append(Turn(Role(role), tuple(segments)))
        return Dialogue(tuple(turns), case.system_message)


@dataclass
class Said:
    """An answer, candidate by candidate."""

    ids: list[list[int]]
    texts: list[str]
    logprobs: list[list[Any]]
    finished: Finished = field(init=False)


@dataclass(frozen=True)
class Asking:
    """A running answerer and what it is made of."""

    model: LoadedModel
    media: GoldenMedia
    engine: PagedEngine
    answerer: Answerer

    async def ask(self, dialogue: Dialogue, options: GenerationOptions) -> Said:
        count = options.num_candidates
        said = Said([[] for _ in range(count)], [""] * count, [[] for _ in range(count)])
        async with aclosing(self.answerer.answer(dialogue, options)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    said.ids[event.candidate] += event.token_ids
                    said.texts[event.candidate] += event.text
                    said.logprobs[event.candidate] += event.logprobs
                elif isinstance(event, Finished):
                    said.finished = event
        return said

    def options(self, max_output_tokens: int = 12, **given: Any) -> GenerationOptions:
        names = GenerationOptions.__dataclass_fields__.keys()
        sampling = {name: value for name, value in given.items() if name not in names}
        params = SamplingParams(
            max_output_tokens, **({"stop_token_ids": self.answerer.facts.stop_token_ids} | sampling)
        )
        return GenerationOptions(params, **{name: value for name, value in given.items() if name in names})


@cache
def loaded(checkpoint: str) -> LoadedModel:
    return LoadedModel(LlmSettings(model=GOLDEN / "checkpoints" / checkpoint, kv_cache_bytes=32 << 20))


@asynccontextmanager
async def asking(checkpoint: str = CHECKPOINT, metrics: LlmMetrics = UNOBSERVED) -> AsyncIterator[Asking]:
    """Yield an answerer; at the end every block has come back."""
    model, media = loaded(checkpoint), GoldenMedia(golden_model(checkpoint))
    reader = EmbeddingReader(LocalEmbeddingCache(64 << 20), NoEmbeddingStore(), media)
    engine = model.engine()
    engine.start()
    admission = Admission(100, 64 << 20)
    answerer = Answerer(model.facts(), model.writer(), model.schemas(), reader, engine, admission, metrics)
    try:
        yield Asking(model, media, engine, answerer)
    finally:
        engine.stop()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def plain(text: str, **given: Any) -> Dialogue:
    return Dialogue((Turn(Role.USER, (TextSegment(text),)),), **given)
