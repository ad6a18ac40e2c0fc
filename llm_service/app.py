"""Puts the LLM service together: opens what has to be closed, loads the model, warms up."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import structlog
import torch

from internvl_serving.llm.v1 import llm_service_pb2, llm_service_pb2_grpc
from llm_service.admission import Admission
from llm_service.answerer import Answerer, LanguageModelFacts
from llm_service.clients import VisionReplicas
from llm_service.embeddings import EmbeddingReader
from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.model_runner import ModelRunner
from llm_service.engine.pace import StepLimits
from llm_service.engine.sequence import EngineRequest, SamplingParams
from llm_service.metrics import LlmMetrics
from llm_service.model import flash_attention
from llm_service.model.attention import KVCache
from llm_service.model.decoder import Decoder
from llm_service.model.loader import LoadSettings, load_decoder
from llm_service.model.rope import rotation_of
from llm_service.prompt.splice import PromptTokens
from llm_service.prompt.template import TEMPLATES, Template
from llm_service.prompt.tokenizer import Tokenizer, load_tokenizer
from llm_service.prompt.writer import PromptWriter
from llm_service.schema.compiler import SchemaCompiler
from llm_service.servicer import LlmServicer
from llm_service.settings import LlmSettings
from shared.busy_sign import BusySign, Side
from shared.checkpoint import InternVLConfig, read_config, read_json
from shared.erasures import heeding_erasures
from shared.errors import CheckpointError
from shared.local_cache import LocalEmbeddingCache
from shared.metrics import NO_METRICS, Registry
from shared.passing_thread import in_passing_thread
from shared.redis_link import RedisLink, open_link
from shared.rpc.handles import HandleSigner
from shared.rpc.server import Application
from shared.service_status import ModelStatus, ProcessStatus
from shared.stall import Progress
from shared.store import open_embedding_store
from shared.store_metrics import StoreMetrics
from shared.tensors import resolve_device, resolve_dtype
from shared.tls_files import watched

log = structlog.get_logger()
_CPU_KV_CACHE_BYTES = 1 << 30
_BLOCK_SIZE = 16
_GPU_KV_CACHE_FRACTION = 0.85
_WARM_UPS, _WARM_UP_TOKENS = 3, 64
_SERVICE = llm_service_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name


@asynccontextmanager
async def lifespan(settings: LlmSettings, address: str, registry: Registry = NO_METRICS) -> AsyncIterator[Application]:
    """Yield the service; the model is loaded by its warm-up. Everything that was opened is closed at the end."""
    async with AsyncExitStack() as stack:
        prefixes = KeptPrefixes()
        store_metrics = StoreMetrics.declared(registry)
        link = await stack.enter_async_context(open_link(settings, store_metrics))
        reader = await _open_reader(settings, link, stack, store_metrics, prefixes)
        signer = HandleSigner(settings.embedding_key.get_secret_value())
        process = ProcessStatus(link.redis if link else None)
        servicer = LlmServicer(settings.default_output_tokens, signer, process)
        broken = asyncio.Event()
        parts: list[Callable[[], Progress]] = []
        metrics = LlmMetrics.declared(registry)

        async def warm_up() -> None:
            model = await in_passing_thread(LoadedModel, settings)
            process.model = model.status()
            engine = model.engine()
            engine.start(broken.set)
            stack.callback(engine.stop)
            metrics.engine.connect(engine.stats)
            prefixes.engine = engine
            await _warm_up(engine)
            parts.append(engine.progress)
            schemas = await in_passing_thread(model.schemas)
            admission = Admission(settings.max_open_requests, settings.max_embedding_bytes)
            servicer.answerer = Answerer(
                model.facts(),
                model.writer(),
                schemas,
                reader,
                engine,
                admission,
                metrics,
                settings.stream_interval_seconds,
            )

        yield Application(
            register=lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(servicer, server),
            services=[_SERVICE],
            warm_up=warm_up,
            broken=broken,
            parts=parts,
        )


class LoadedModel:
    """A checkpoint's language side: decoder, template, tokenizer. Loading blocks; errors are `CheckpointError`."""

    def __init__(self, settings: LlmSettings) -> None:
        started = time.monotonic()
        self._settings = settings
        self.config = read_config(settings.model)
        self.template = _template_of(self.config)
        self.tokenizer = load_tokenizer(settings.model)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.decoder: Decoder = load_decoder(settings.model, self.config, _load_settings(settings))
        log.info(
            "model_loaded",
            model=self.config.name,
            weights_mib=self.decoder.weight_bytes >> 20,
            device=",".join(dict.fromkeys(map(str, self.decoder.layer_devices))),
            dtype=str(self.decoder.dtype),
            quantization=settings.quantization,
            native_kernels=self.decoder.uses_native_kernels,
            seconds=round(time.monotonic() - started, 2),
        )

    def engine(self) -> PagedEngine:
        """Return an engine with a KV cache of its own, not yet started."""
        settings = self._settings
        limits = EngineLimits(
            max_sequences=settings.max_sequences,
            step=_step_limits(settings),
            max_tokens=settings.max_context_tokens or self.decoder.config.rope.max_positions,
        )
        on_cpu = self.decoder.device.type == "cpu"
        neighbour = BusySign.at(settings.neighbour_file, Side.LANGUAGE) if on_cpu else None
        return PagedEngine(*self.runner(), limits, partial(rotation_of, self.decoder.config.rope), neighbour)

    def runner(self) -> tuple[ModelRunner, BlockManager]:
        """Return a runner with a KV cache of its own, and the manager of the cache's blocks."""
        decoder, block_size, num_blocks = self.decoder, self._block_size, self._num_blocks()
        try:
            cache = KVCache(decoder.config, num_blocks, block_size, decoder.dtype, decoder.layer_devices)
        except RuntimeError:  # torch's out of memory, on a CPU and on a GPU
            raise CheckpointError(
                f"there is no memory for {num_blocks} blocks of KV cache; set kv_cache_bytes."
            ) from None
        log.info("kv_cache_ready", tokens=num_blocks * block_size)
        return ModelRunner(decoder, cache), BlockManager(num_blocks, block_size)

    def writer(self) -> PromptWriter:
        """Return what writes prompts in the model's template."""
        return PromptWriter(self.template, self.tokenizer)

    def schemas(self) -> SchemaCompiler:
        """Return what follows JSON schemas with the model's tokens. Takes seconds, and lets no other thread run."""
        facts = self.facts()
        return SchemaCompiler(self.tokenizer, facts.vocabulary_size, facts.stop_token_ids)

    def facts(self) -> LanguageModelFacts:
        """Return what the answerer has to know."""
        return LanguageModelFacts(
            name=self.config.name,
            hidden_size=self.config.hidden_size,
            vocabulary_size=self.decoder.config.vocab_size,
            tokens_per_tile=self.config.tokens_per_tile,
            dtype=self.decoder.dtype,
            stop_token_ids=_stop_token_ids(self._settings, self.config, self.template, self.tokenizer),
        )

    def status(self) -> ModelStatus:
        """Return what is said of the model where somebody asks how the service is."""
        devices = ",".join(dict.fromkeys(map(str, self.decoder.layer_devices)))
        dtype = str(self.decoder.dtype).removeprefix("torch.")
        return ModelStatus(self.config.name, self.config.hidden_size, self.config.tokens_per_tile, dtype, devices)

    @property
    def _block_size(self) -> int:
        has_flash = self.decoder.device.type == "cuda" and flash_attention.is_installed()
        return self._settings.block_size or (flash_attention.BLOCK_SIZE if has_flash else _BLOCK_SIZE)

    def _num_blocks(self) -> int:
        settings, decoder = self._settings, self.decoder
        budget = settings.kv_cache_bytes or _CPU_KV_CACHE_BYTES
        if not settings.kv_cache_bytes and decoder.device.type == "cuda":
            torch.cuda.empty_cache()  # what loading needed besides the weights
            budget = int(self._free_cache_bytes() * _GPU_KV_CACHE_FRACTION)
        block_bytes = KVCache.block_bytes(decoder.config, self._block_size, decoder.dtype)
        if budget < block_bytes * 4:
            raise CheckpointError(f"kv_cache_bytes of {budget} is too little: a block of this model has {block_bytes}.")
        return budget // block_bytes

    def _free_cache_bytes(self) -> int:
        """Return how much KV cache of all layers there is memory for, when each layer's is on the layer's device."""
        layers = Counter(self.decoder.layer_devices)
        shared = self.decoder.device if self._settings.vit_shares_first_device else None
        return min(
            torch.cuda.mem_get_info(device)[0] // (2 if device == shared else 1) * layers.total() // count
            for device, count in layers.items()
        )


class KeptPrefixes:
    """What the engine keeps of prompts, as a memory that hears of erasures. Whose it was it cannot tell."""

    def __init__(self) -> None:
        self.engine: PagedEngine | None = None

    def erase_tagged(self, tenant_tag: str, media_digest: str | None) -> None:
        """Forget everything."""
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        if self.engine is not None:
            self.engine.forget()


async def _warm_up(engine: PagedEngine) -> None:
    """Run every kind of step, so that nothing is set up at the first request, and the engine learns how fast it is."""
    params = SamplingParams(max_output_tokens=2)
    for _ in range(_WARM_UPS):
        engine.forget()
        async for _ in engine.generate(EngineRequest(PromptTokens((0,) * _WARM_UP_TOKENS), (), params)):
            pass
    engine.forget()


async def _open_reader(
    settings: LlmSettings,
    link: RedisLink | None,
    stack: AsyncExitStack,
    metrics: StoreMetrics,
    prefixes: KeptPrefixes,
) -> EmbeddingReader:
    store = await stack.enter_async_context(open_embedding_store(link, settings))
    vision = VisionReplicas(settings.max_message_bytes, watched(settings.stage_tls))
    stack.push_async_callback(vision.aclose)
    cache = LocalEmbeddingCache(settings.local_cache_bytes, metrics)
    metrics.cache_bytes.follow(lambda: cache.size_bytes, cache="embeddings")
    if link is not None:
        await stack.enter_async_context(heeding_erasures(link, cache, prefixes))
    return EmbeddingReader(cache, store, vision)


def _step_limits(settings: LlmSettings) -> StepLimits:
    tokens, seconds = max(settings.max_batch_tokens, settings.max_sequences), settings.max_step_seconds
    return StepLimits(tokens, seconds, 5 * seconds)


def _load_settings(settings: LlmSettings) -> LoadSettings:
    device, *more = (resolve_device(name) for name in settings.devices.split(","))
    return LoadSettings(
        device,
        resolve_dtype(settings.dtype, device),
        settings.quantization,
        tuple(more),
        settings.vit_shares_first_device,
    )


def _template_of(config: InternVLConfig) -> Template:
    if config.template not in TEMPLATES:
        raise CheckpointError(f"template {config.template!r} in config.json is none of {', '.join(TEMPLATES)}.")
    return TEMPLATES[config.template].with_system_message(config.system_message)


def _stop_token_ids(
    settings: LlmSettings, config: InternVLConfig, template: Template, tokenizer: Tokenizer
) -> frozenset[int]:
    """Return the template's stop token and every end token that the checkpoint declares."""
    file = settings.model / "generation_config.json"
    declared = [config.llm.get("eos_token_id")]
    if file.is_file():
        declared.append(read_json(file).get("eos_token_id"))
    flat = [token for entry in declared for token in (entry if isinstance(entry, list) else [entry])]
    return frozenset({tokenizer.token_id(template.stop_token), *(token for token in flat if token is not None)})
