"""Training learns, stops and goes on as if it had not stopped."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.nano.batches import Batch, BatchMaker, BatchSource, Recipe, WorkerLost
from examples.nano.model import Nano
from examples.nano.train import Reporting, Run, main, stop_on_signals
from examples.nano.training import Plan, StateMismatch, Trainer
from examples.nano.world import EASY, FULL
from shared.checkpoint import read_config

PLAN = Plan(steps=40, seconds=None, warm_up_steps=2)


def new_trainer(directory: Path, identity: str = "a training") -> Trainer:
    model = Nano.of(read_config(directory), seed=5)
    return Trainer(model, PLAN, torch.device("cpu"), torch.float32, identity)


@pytest.fixture(scope="module")
def batches(maker: BatchMaker) -> list[Batch]:
    return [maker.batch(step) for step in range(6)]


def test_the_loss_on_a_batch_that_is_seen_again_falls(directory: Path, batches: list[Batch]) -> None:
    quick = replace(PLAN, learning_rate=1e-2)
    trainer = Trainer(new_trainer(directory).model, quick, torch.device("cpu"), torch.float32, "a training")
    losses = [trainer.step(batches[0]) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_going_on_from_a_saved_state_gives_the_losses_of_running_through(
    directory: Path, batches: list[Batch], tmp_path: Path
) -> None:
    through = new_trainer(directory)
    losses = [through.step(batch) for batch in batches]
    first = new_trainer(directory)
    for batch in batches[:3]:
        first.step(batch)
    first.save(tmp_path / "state.safetensors")
    second = new_trainer(directory)
    second.load(tmp_path / "state.safetensors")
    assert [second.step(batch) for batch in batches[3:]] == losses[3:]
    assert second.progress == through.progress
    for name, tensor in through.average.items():
        assert torch.equal(tensor, second.average[name])


def test_a_state_of_another_training_is_refused(directory: Path, tmp_path: Path) -> None:
    new_trainer(directory).save(tmp_path / "state.safetensors")
    with pytest.raises(StateMismatch):
        new_trainer(directory, "another").load(tmp_path / "state.safetensors")


def test_gradients_that_are_no_numbers_change_nothing(directory: Path, batches: list[Batch]) -> None:
    trainer = new_trainer(directory)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.step(replace(batches[0], weights=np.full_like(batches[0].weights, np.nan)))
    assert trainer.progress.skipped_steps == 1
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_worker_processes_make_the_batches_that_this_process_makes(directory: Path) -> None:
    recipe = Recipe(directory, seed=2, situations_per_batch=2)
    maker = BatchMaker(recipe)
    with BatchSource(recipe, first_step=3, num_workers=1) as source:
        for step, batch in zip((3, 4), source, strict=False):
            expected = maker.batch(step)
            assert np.array_equal(batch.ids, expected.ids)
            assert np.array_equal(batch.tiles, expected.tiles)


def test_a_worker_that_fails_ends_the_training(tmp_path: Path) -> None:
    with BatchSource(Recipe(tmp_path, seed=2), first_step=0, num_workers=1) as source, pytest.raises(WorkerLost):
        next(iter(source))


def test_at_the_end_all_but_the_vision_transformer_learns_by_a_rate_of_its_own(
    directory: Path, batches: list[Batch]
) -> None:
    plan = Plan(steps=6, seconds=None, warm_up_steps=1, answering_steps=4)
    model = Nano.of(read_config(directory), seed=5)
    trainer = Trainer(model, plan, torch.device("cpu"), torch.float32, "a training")
    for batch in batches[:2]:
        trainer.step(batch)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert trainer._learning_rate() == plan.learning_rate
    for batch in batches[2:5]:
        trainer.step(batch)
    assert trainer._learning_rate() == pytest.approx(plan.learning_rate / 4)
    changes = [step for step in range(plan.steps or 0) if plan.changes_weights_after(step)]
    assert changes == [0, 1, 3, 5]
    unchanged = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert unchanged == {name for name in before if name.startswith("tower.vision_model.")}


def test_the_easy_world_is_left_behind() -> None:
    recipe = Recipe(Path(), seed=1, easy_situations=100)
    assert recipe.config_of(0) is EASY
    assert recipe.config_of(100) is FULL
    assert {recipe.config_of(index) is EASY for index in range(100)} == {True, False}


def test_training_writes_a_checkpoint_with_its_card(tmp_path: Path) -> None:
    out, state = tmp_path / "internvl-nano", tmp_path / "state.safetensors"
    options = ["--out", str(out), "--state", str(state), "--shape", "tiny", "--threads", "1", "--workers", "0"]
    assert (
        main(
            [
                *options,
                "--steps",
                "3",
                "--seeing",
                "1",
                "--answering",
                "1",
                "--batch",
                "2",
                "--final",
                "4",
                "--rolling",
                "4",
            ]
        )
        == 0
    )
    names = {file.name for file in out.iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "training.json", "learning-curve.png"} <= names
    assert "4 situations" in (out / "README.md").read_text()
    assert main([*options, "--steps", "2", "--seeing", "1", "--batch", "2"]) == 2  # a state is there already


class InterruptedTrainer(Trainer):
    """Is told to stop in its third step."""

    def step(self, batch: Batch) -> float:
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().step(batch)


def test_a_training_that_is_told_to_stop_saves_its_state_after_the_step(directory: Path, tmp_path: Path) -> None:
    state, before = tmp_path / "state.safetensors", signal.getsignal(signal.SIGTERM)
    model = Nano.of(read_config(directory), seed=5)
    trainer = InterruptedTrainer(model, PLAN, torch.device("cpu"), torch.float32, "a training")
    run = Run(trainer, Recipe(directory, seed=1, situations_per_batch=2), state, Reporting())
    try:
        stop_on_signals(run)
        run.train(num_workers=0)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    again = new_trainer(directory)
    again.load(state)
    assert again.progress.step == 3
