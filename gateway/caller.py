"""Who asks: the tenant that a call belongs to, known wherever the call is worked on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who was let in. `tenant` separates what is kept; empty: nobody is told apart.

    `key_name` says in logs which of the tenant's keys was used.
    """

    tenant: str = ""
    key_name: str = ""


ANYBODY = Caller()
_current: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    """Return who the running call belongs to; `ANYBODY` where nobody has to say who they are."""
    return _current.get()


def admit(caller: Caller) -> None:
    """Note who the running call belongs to, for the rest of its task and for tasks that it starts."""
    _current.set(caller)


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Work for somebody who does not wait, such as the owner of a batch. For one task, without `yield` to another."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)
