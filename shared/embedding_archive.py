"""Copies embeddings between a store and a file: `python -m shared.embedding_archive export FILE --redis-url URL`."""

import asyncio
import sys
from pathlib import Path
from typing import Literal

import structlog
from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from shared.archive_file import ArchiveDamaged, read_contents, writing
from shared.embedding import EmbeddingInfo
from shared.erasures import scan
from shared.errors import StoreUnavailable
from shared.patience import Patience
from shared.progress import ProgressLog
from shared.redis_link import RedisLink, StoreFailed, open_link
from shared.settings import CommandLineSettings, EmbeddingStoreSettings, RedisUrl
from shared.store import RedisEmbeddingStore, open_embedding_store
from shared.stored_name import StoredName, keys_of, name_of, tenant_tag_of

log = structlog.get_logger()


class ArchiveSettings(CommandLineSettings, EmbeddingStoreSettings):
    """What to copy, from flags, `ARCHIVE_*` variables or these defaults."""

    model_config = SettingsConfigDict(env_prefix="ARCHIVE_")

    command: CliPositionalArg[Literal["export", "import"]] = Field(description="export to the file, or import from it")
    file: CliPositionalArg[Path] = Field(description="the archive, a safetensors file")
    redis_url: RedisUrl = Field(description="redis:// URL of the embedding store")
    tenant: str | None = Field(
        None, description="whose embeddings to export; empty: those that are everybody's; without: all"
    )
    redis_timeout_s: float = Field(10.0, gt=0, description="longest wait for one answer of the embedding store")


async def export_embeddings(link: RedisLink, store: RedisEmbeddingStore, file: Path, tenant: str | None) -> int:
    """Write what is stored to a file, one embedding in memory at a time; return how many there are.

    What leaves the store meanwhile is left out. The file appears when it is complete. Raises `StoreFailed`,
    `StoreUnavailable`, `ArchiveDamaged` and `OSError`.
    """
    expected = await _listed(link, store, tenant)
    progress = _progress("embeddings_exported", [info for _, info in expected])
    count = 0
    with writing(file, expected) as archive:
        for name, info in expected:
            found = await store.read(name)
            if found and found[0] == info:
                archive.add(name, *found)
                count += 1
            progress.add(info.size_bytes)
            progress.add_tensors(1)
    return count


async def import_embeddings(store: RedisEmbeddingStore, file: Path) -> int:
    """Store what a file holds, sealed with this store's secret; return how many were not there yet.

    Every embedding is verified first. What is stored already is not written again, so an import that was interrupted
    goes on where it was. Raises `StoreFailed`, `ArchiveDamaged` and `OSError`.
    """
    count = 0
    with file.open("rb") as stream:
        contents = read_contents(stream)
        progress = _progress("embeddings_imported", [entry.info for entry in contents])
        for entry in contents:
            if await store.find(entry.name, Patience(store.timeout_s)) != entry.info:
                await store.write(entry.name, entry.info, entry.read(stream))
                count += 1
            progress.add(entry.info.size_bytes)
            progress.add_tensors(1)
    return count


async def run(settings: ArchiveSettings) -> int:
    """Do what the settings say; return how many embeddings were copied."""
    async with open_link(settings) as link, open_embedding_store(link, settings) as store:
        assert link is not None
        assert isinstance(store, RedisEmbeddingStore)  # the URL cannot be empty
        if settings.command == "export":
            return await export_embeddings(link, store, settings.file, settings.tenant)
        return await import_embeddings(store, settings.file)


def main() -> int:
    """Run the command line; return its exit code."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    settings = ArchiveSettings.from_command_line("shared.embedding_archive")
    try:
        count = asyncio.run(run(settings))
    except (StoreFailed, StoreUnavailable):
        problem = "the embedding store cannot be reached, or refuses; run the command again."
    except ArchiveDamaged as error:
        problem = f"{settings.file}: {error}"
    except OSError as error:
        problem = f"{settings.file}: {error.strerror}"
    else:
        log.info("archive_done", command=settings.command, embeddings=count)
        return 0
    print(f"shared.embedding_archive: {problem}", file=sys.stderr)  # noqa: T201
    return 1


async def _listed(
    link: RedisLink, store: RedisEmbeddingStore, tenant: str | None
) -> list[tuple[StoredName, EmbeddingInfo]]:
    """Return what is stored of a tenant, None: of all, in the order of its names."""
    names: set[StoredName] = set()
    async for keys in scan(link, keys_of(None if tenant is None else tenant_tag_of(tenant))):
        names.update(name for key in keys if (name := name_of(key)))
    ordered = sorted(names, key=lambda name: name.manifest_key)
    found = [(name, await store.find(name, Patience(store.timeout_s))) for name in ordered]
    return [(name, info) for name, info in found if info]


def _progress(event: str, infos: list[EmbeddingInfo]) -> ProgressLog:
    return ProgressLog(event, len(infos), sum(info.size_bytes for info in infos))


if __name__ == "__main__":
    sys.exit(main())
