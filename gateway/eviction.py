"""Says at start whether the Redis of conversations may forget them when its memory is full."""

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.service_status import store_of

log = structlog.get_logger()
_KEEPS = "noeviction"


async def warn_of_eviction(redis: Redis) -> None:
    """Log a warning if this Redis evicts keys. Never raises; where it does not answer, or may not, nothing is known."""
    try:
        store = store_of(await redis.info("memory"))  # CONFIG GET is forbidden more often
    except (RedisError, OSError, TimeoutError) as error:
        log.info("eviction_policy_unknown", error=type(error).__name__)
        return
    if store.max_bytes and store.eviction_policy not in ("", _KEEPS):
        log.warning(
            "conversations_may_be_evicted",
            maxmemory_policy=store.eviction_policy,
            maxmemory_mib=store.max_bytes >> 20,
        )
