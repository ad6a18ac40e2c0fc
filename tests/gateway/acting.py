"""Lets a test be one caller after another."""

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.caller import Caller, admit, current_caller


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Be somebody for a while, and then who one was before."""
    before = current_caller()
    admit(caller)
    try:
        yield
    finally:
        admit(before)
