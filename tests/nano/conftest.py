"""A checkpoint of the smallest shape, with weights that nobody has trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples.nano.batches import BatchMaker, Recipe
from examples.nano.checkpoint import SHAPES, write_description, write_weights
from examples.nano.model import Nano, load_nano
from examples.nano.prompts import PromptWriter
from shared.checkpoint import read_config


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors, one thread; a training sets the whole process, which other tests must not notice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory."""
    directory = tmp_path_factory.mktemp("nano") / "internvl-nano"
    write_description(directory, SHAPES["tiny"])
    write_weights(directory, Nano.of(read_config(directory), seed=3))
    return directory


@pytest.fixture(scope="session")
def writer(directory: Path) -> PromptWriter:
    return PromptWriter(directory)


@pytest.fixture(scope="session")
def maker(directory: Path) -> BatchMaker:
    return BatchMaker(Recipe(directory, seed=1, situations_per_batch=6))


@pytest.fixture
def model(directory: Path) -> Nano:
    """The model as stored: its weights are rounded to bfloat16."""
    return load_nano(directory)
