"""Runs torch's work beside the model's thread without slowing that down ever after."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_passing_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that blocks in a thread of its own, which ends with it; return what it returns.

    GNU's OpenMP, which torch computes with on CPUs, keeps a pool for every living thread that has run a parallel
    operation. Once the pools have more threads than the machine has cores, none of them waits actively any more, and
    each operation of the model's thread begins with waking the others up: a step of some hundred small operations takes
    half as long again. asyncio's own executor would keep its threads.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="passing")
    try:
        work = copy_context().run
        return await asyncio.get_running_loop().run_in_executor(executor, lambda: work(function, *args, **kwargs))
    finally:
        executor.shutdown(wait=False)
