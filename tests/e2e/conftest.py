"""Whole systems as processes, shared by the tests that do not harm them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.local import LocalStack, StackOptions
from internvl_client import Client
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS

StartStack = Callable[..., LocalStack]


@pytest.fixture(scope="session")
def start_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartStack]:
    """Starts a system for a checkpoint; it is stopped at the end if the test has not done so."""
    with ExitStack() as stacks:

        def start(model: Path, **environment: str) -> LocalStack:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                options = StackOptions(model, logs=tmp_path_factory.mktemp("logs"), drain_grace_s=60)
                return stacks.enter_context(LocalStack(options))

        yield start


@pytest.fixture(scope="session")
def stack(start_stack: StartStack) -> LocalStack:
    """The system that tests share: InternVL3, and nobody may harm it."""
    return start_stack(checkpoint_directory(CHECKPOINTS[0]))


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    with Client(stack.address, timeout_s=60) as client:
        yield client


@pytest.fixture
def doomed(start_stack: StartStack) -> Iterator[LocalStack]:
    """A system of the test's own, to be harmed."""
    stack = start_stack(checkpoint_directory(CHECKPOINTS[0]), LLM_MAX_OPEN_REQUESTS="1")
    yield stack
    stack.stop()
