"""How much tenants may ask of this gateway: buckets that fill with time, and turns in progress.

Kept in this process: behind one address with several gateways a tenant has its limits as many times.
"""

import time
from collections.abc import Callable, Mapping
from typing import Final

from gateway.keys import TenantLimits
from gateway.metrics import QUOTAS
from gateway.weight import Weight
from shared.errors import RateLimited

_ROUNDING: Final = 1e-6  # of a unit: whoever has waited as long as told must pass
REQUESTS, CONCURRENT, TILES, TOKENS = QUOTAS
_WORDS: Final = {
    REQUESTS: "This tenant has made its requests of this minute.",
    CONCURRENT: "This tenant has as many turns in progress as it may have.",
    TILES: "This tenant has had its tiles of this minute encoded.",
    TOKENS: "This tenant has used its tokens of this minute.",
}


class TokenBucket:
    """Lets `per_minute` units through a minute: all at once after a pause, evenly in the long run.

    Who takes more than is there leaves a debt, which has to fill up first. More than it holds passes when it is full.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._read_at = clock()

    def wait_s(self, amount: int) -> float:
        """Return in how many seconds so much passes if nobody else takes any; 0: now."""
        if amount <= 0:
            return 0.0
        missing = min(amount, self.per_minute) - self._filled()
        return 0.0 if missing < _ROUNDING else missing * 60.0 / self.per_minute

    def take(self, amount: int) -> None:
        """Take so much, whether or not it is there; less than nothing gives back."""
        self._level = min(self._filled() - amount, float(self.per_minute))

    def resize(self, per_minute: int) -> None:
        """Change the limit; what was taken stays taken."""
        taken = self.per_minute - self._filled()
        self.per_minute = per_minute
        self._level = per_minute - taken

    def _filled(self) -> float:
        now = self._clock()
        grown = (now - self._read_at) * self.per_minute / 60.0
        self._level, self._read_at = min(self._level + grown, float(self.per_minute)), now
        return self._level


class Account:
    """One tenant's budgets and its turns in progress."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.in_progress = 0
        self._clock = clock
        self._most_in_progress: int | None = None
        self._buckets: dict[str, TokenBucket] = {}

    def limit(self, limits: TenantLimits) -> None:
        """Hold the tenant to these limits from now on."""
        self._most_in_progress = limits.concurrent_requests
        for name in (REQUESTS, TILES, TOKENS):
            per_minute: int | None = getattr(limits, name)
            if per_minute is None:
                self._buckets.pop(name, None)
            elif name not in self._buckets:
                self._buckets[name] = TokenBucket(per_minute, self._clock)
            elif self._buckets[name].per_minute != per_minute:
                self._buckets[name].resize(per_minute)

    def check(self, amounts: Mapping[str, int], *, turn_s: float | None) -> None:
        """Raise `RateLimited` unless so much may be taken, by a turn of about `turn_s` seconds or by none."""
        waits = {name: bucket.wait_s(amounts.get(name, 0)) for name, bucket in self._buckets.items()}
        most = self._most_in_progress
        if turn_s is not None and most is not None and self.in_progress >= most:
            waits[CONCURRENT] = turn_s / most
        quota = max(waits, key=lambda name: waits[name], default=None)
        if quota is not None and waits[quota] > 0.0:
            raise RateLimited(_WORDS[quota], retry_after_s=waits[quota], quota=quota)

    def take(self, amounts: Mapping[str, int]) -> None:
        """Take so much."""
        for name, amount in amounts.items():
            if name in self._buckets:
                self._buckets[name].take(amount)


class Charge:
    """What somebody has taken of a tenant's budgets; None: of a tenant that has none. `end` it once."""

    def __init__(self, account: Account | None, amounts: Mapping[str, int], *, is_turn: bool) -> None:
        self._account = account
        self._amounts = dict(amounts)
        self._is_turn = is_turn
        self._change(self._amounts)
        if account and is_turn:
            account.in_progress += 1

    def settle(self, *, tokens: int | None = None, tiles: int | None = None) -> None:
        """Take what was really used in place of what was guessed; None: the guess stays."""
        used = {TOKENS: tokens, TILES: tiles}
        settled = {name: amount for name, amount in used.items() if amount is not None}
        self._change({name: amount - self._amounts.get(name, 0) for name, amount in settled.items()})
        self._amounts |= settled

    def undo(self) -> None:
        """Give everything back: nothing was done for it."""
        self._change({name: -amount for name, amount in self._amounts.items()})
        self._amounts.clear()

    def end(self) -> None:
        """Note that the turn is over."""
        if self._account and self._is_turn:
            self._account.in_progress -= 1

    def _change(self, amounts: Mapping[str, int]) -> None:
        if self._account:
            self._account.take(amounts)


class Budgets:
    """The budgets of all tenants. One event loop only. `limits_of` is asked each time: limits may change."""

    def __init__(
        self,
        limits_of: Callable[[str], TenantLimits] = lambda tenant: TenantLimits(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits_of = limits_of
        self._clock = clock
        self._accounts: dict[str, Account] = {}  # no more than there are tenants with limits

    def turn(self, tenant: str, weight: Weight, turn_s: float) -> Charge:
        """Take what a turn will take as one guesses; raise `RateLimited` where a budget is used up, and take nothing.

        `turn_s` is how long turns take of late: where too many are in progress, one may have ended after a part of it.
        """
        amounts = {REQUESTS: 1, TILES: weight.tiles, TOKENS: weight.tokens}
        account = self._account(tenant)
        if account:
            account.check(amounts, turn_s=turn_s)
        return Charge(account, amounts, is_turn=True)

    def media(self, tenant: str, tiles: int) -> Charge:
        """Take tiles of media that are encoded without a question; raise `RateLimited`."""
        account = self._account(tenant)
        if account:
            account.check({TILES: tiles}, turn_s=None)
        return Charge(account, {TILES: tiles}, is_turn=False)

    def _account(self, tenant: str) -> Account | None:
        limits = self._limits_of(tenant)
        if all(getattr(limits, quota) is None for quota in QUOTAS):
            return None
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(self._clock)
        account.limit(limits)
        return account
