"""Who asks: the tenant that a call belongs to, known wherever the call is worked on."""

from contextvars import ContextVar
from dataclasses import dataclass

import structlog


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who was let in. `tenant` separates what is kept; empty: nobody is told apart.

    `key_name` says in logs which of the tenant's keys was used. `is_isolated`: the tenant shares no embeddings either.
    `is_operator`: it may see how the whole system is.
    """

    tenant: str = ""
    key_name: str = ""
    is_isolated: bool = False
    is_operator: bool = False

    @property
    def key_prefix(self) -> str:
        """What the names of everything that is kept for the tenant in Redis begin with."""
        return f"ivl:tenant:{self.tenant}:" if self.tenant else "ivl:"

    @property
    def embedding_tenant(self) -> str:
        """The tenant whose embeddings the caller's media become; empty: those that are everybody's."""
        return self.tenant if self.is_isolated else ""

    @property
    def shares_embeddings(self) -> bool:
        """Whether an embedding that is found may have been made from the bytes of somebody else."""
        return bool(self.tenant) and not self.is_isolated


ANYBODY = Caller()
_current: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    """Return who the running call belongs to; `ANYBODY` where nobody has to say who they are."""
    return _current.get()


def admit(caller: Caller) -> None:
    """Note who the running call belongs to, for the rest of its task and for tasks that it starts; logs name both."""
    _current.set(caller)
    if caller.tenant:
        structlog.contextvars.bind_contextvars(tenant=caller.tenant, key_name=caller.key_name)
