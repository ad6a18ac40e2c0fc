"""A model that has grown answers as before, and everything new in it learns."""

from pathlib import Path

import pytest
import torch

from examples.nano.accuracy import hidden_states
from examples.nano.batches import BatchMaker
from examples.nano.checkpoint import SHAPES, Shape, config_of, write_description
from examples.nano.growth import grown
from examples.nano.model import Nano, tensors_of
from examples.nano.training import Plan, Trainer
from shared.checkpoint import read_config

# Heads of 32 as in the smallest shape, of which each half is wider, and one layer more.
_WIDER = Shape(32, 1, 2, 64, 2, 4, 96)
_SMALL = Shape(32, 1, 2, 32, 1, 2, 64)


def models(directory: Path) -> tuple[Nano, Nano]:
    """Return a small model and one that has grown from it."""
    small = Nano.of(config_of(directory, _SMALL), seed=1)
    for norm in [small.decoder.norm, *(layer.attention_norm for layer in small.decoder.layers)]:
        norm.weight.data.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    for layer in small.decoder.layers:
        layer.attention.qkv.bias.data.normal_()  # type: ignore[union-attr]
    return small, grown(small, Nano.of(config_of(directory, _WIDER), seed=2))


def test_a_model_that_has_grown_computes_what_it_did(directory: Path, maker: BatchMaker) -> None:
    small, large = models(directory)
    tensors = tensors_of(maker.batch(0), torch.device("cpu"))
    with torch.inference_mode():
        before, after = (model.logits(hidden_states(model, tensors)) for model in (small, large))
    assert float((before - after).abs().max()) < 1e-3 * float(before.abs().max())


def test_everything_new_learns(directory: Path, maker: BatchMaker) -> None:
    _, large = models(directory)
    trainer = Trainer(
        large, Plan(steps=9, seconds=None, warm_up_steps=1), torch.device("cpu"), torch.float32, "a training"
    )
    before = {name: weight.detach().clone() for name, weight in large.named_parameters()}
    for step in range(2):  # what reads the new parts has a gradient once something was written to them
        trainer.step(maker.batch(step))
    for name, weight in large.decoder.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            changed = weight != before[f"decoder.{name}"]
            assert changed[-1].any(), name
            assert changed[:, -1].any(), name


def test_heads_of_another_size_are_refused(directory: Path) -> None:
    small = Nano.of(config_of(directory, _SMALL), seed=1)
    other = Nano.of(config_of(directory, Shape(32, 1, 2, 64, 1, 2, 64)), seed=2)
    with pytest.raises(ValueError, match="heads"):
        grown(small, other)


def test_training_goes_on_in_a_model_that_has_grown(directory: Path, maker: BatchMaker, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(
            Nano.of(config_of(directory, _SMALL), seed=1),
            Plan(steps=6, seconds=None, warm_up_steps=1, answering_steps=3),
            torch.device("cpu"),
            torch.float32,
            "a training",
            grow=lambda small: grown(small, Nano.of(config_of(directory, _WIDER), seed=2)),
        )

    batches = [maker.batch(step) for step in range(6)]
    through, first, second = trainer(), trainer(), trainer()
    losses = [through.step(batch) for batch in batches]
    assert through.averaged().decoder.config.hidden_size == _WIDER.language_width
    for batch in batches[:4]:
        first.step(batch)
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    assert [second.step(batch) for batch in batches[4:]] == losses[4:]


def test_the_larger_shape_differs_in_its_language_model_alone(tmp_path: Path) -> None:
    write_description(tmp_path, SHAPES["large"])
    large, base = read_config(tmp_path), config_of(tmp_path, SHAPES["base"])
    assert large.llm["vocab_size"] == base.llm["vocab_size"]
    assert Nano.of(large).tower.config.vit == Nano.of(base).tower.config.vit
