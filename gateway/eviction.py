"""Says at start whether the Redis of conversations may forget them when its memory is full."""

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = structlog.get_logger()
_KEEPS = "noeviction"


async def warn_of_eviction(redis: Redis) -> None:
    """Log a warning if this Redis evicts keys. Never raises; where it does not answer, or may not, nothing is known."""
    try:
        memory = await redis.info("memory")  # CONFIG GET is forbidden more often
    except (RedisError, OSError, TimeoutError) as error:
        log.info("eviction_policy_unknown", error=type(error).__name__)
        return
    policy, limit_bytes = memory.get("maxmemory_policy", _KEEPS), memory.get("maxmemory", 0)
    if limit_bytes and policy != _KEEPS:
        log.warning("conversations_may_be_evicted", maxmemory_policy=policy, maxmemory_mib=limit_bytes >> 20)
