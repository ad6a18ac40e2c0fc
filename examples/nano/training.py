"""Training: one step, the schedule, the moving average of the weights, and the state that a later run goes on from."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from examples.nano.accuracy import hidden_states_over
from examples.nano.batches import NO_TARGET, Batch
from examples.nano.guide import Guide
from examples.nano.model import Nano, tensors_of

# Root mean square of visual tokens. Norms hide a token's size, so nothing else keeps it from growing; and beside large
# ones what the decoder's layers add is lost, such as which of several pictures a token belongs to.
VISUAL_SIZE = 2.0
_MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to learn. Either `steps` or `seconds` says when training ends.

    In the last `answering_steps` of `steps` the vision transformer is left as it is; projector and language model learn
    alone, by a schedule of their own.
    """

    steps: int | None
    seconds: float | None
    learning_rate: float = 1e-3
    answering_steps: int = 0
    matrix_share: float = 2.0  # of the learning rate, for the matrices that Muon steps
    guide_share: float = 0.5  # of the guide's loss
    size_share: float = 0.2  # within the guide's loss, of visual tokens that are larger or smaller than `VISUAL_SIZE`
    seeing_rate: float = 4.0  # times the learning rate before the first words
    falling_part: float = 0.6  # of the training, at its end: the rate stays until then, and falls to zero
    warm_up_steps: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    average_decay: float = 0.999
    # In the answering steps: Muon takes a third of the time of a batch, and late in training few batches say little.
    batches_per_change: int = 2

    @property
    def size_loss_share(self) -> float:
        """The share of visual tokens' size in the whole loss."""
        return self.guide_share * self.size_share

    def is_answering(self, step: int) -> bool:
        """Whether a step is one of those in which the vision transformer does not learn."""
        return self.steps is not None and step >= self.steps - self.answering_steps

    def changes_weights_after(self, step: int) -> bool:
        """Whether the weights change after this step, or its gradients wait for the next."""
        if self.steps is None or not self.is_answering(step):
            return True
        done = step + 1 - (self.steps - self.answering_steps)
        return done % self.batches_per_change == 0 or step + 1 == self.steps


@dataclass(slots=True)
class Progress:
    """How far training has come. `history` holds one entry per measurement; `has_grown` says that the model has."""

    step: int = 0
    has_grown: bool = False
    situations: int = 0
    answers: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def fraction(self, plan: Plan) -> float:
        """Return how much of the plan is done, from 0 to 1."""
        if plan.steps is not None:
            return min(1.0, self.step / plan.steps)
        assert plan.seconds is not None
        return min(1.0, self.seconds / plan.seconds)


class StateMismatch(Exception):
    """A state file belongs to another training."""


class Trainer:
    """A model, its optimiser and the moving average of its weights. `identity` names what is being trained.

    `grow` makes the model that learns in the answering steps from the one that has learned until then.
    """

    def __init__(
        self,
        model: Nano,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        identity: str,
        *,
        grow: Callable[[Nano], Nano] | None = None,
        compiles: bool = False,
    ) -> None:
        self.plan = plan
        self.progress = Progress()
        self.seeing_loss = 0.0
        self._device, self._dtype, self._identity = device, dtype, identity
        self._grow, self._compiles = grow, compiles
        self._begin_with(model)

    def step(self, batch: Batch) -> float:
        """Learn from a batch; return its loss, the mean over answer tokens by their weights.

        A step whose gradients are not numbers changes nothing.
        """
        if self._grow and self.plan.is_answering(self.progress.step) and not self.progress.has_grown:
            self._begin_with(self._grow(self.averaged()))
            self.progress.has_grown = True
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                rate = self._learning_rate() * group["share"]
                group["lr"] = rate if batch.situations or self.progress.situations else rate * self.plan.seeing_rate
        tensors = tensors_of(batch, self._device)
        if self.plan.is_answering(self.progress.step):
            visual_tokens = self._projected(tensors)
            loss = self._answering_loss(tensors, visual_tokens)
            (loss + self.plan.size_loss_share * _size_loss(visual_tokens)).backward()  # type: ignore[no-untyped-call]
        else:
            loss, seeing = self._losses(tensors, has_answers=bool(batch.situations))
            (loss + self.plan.guide_share * seeing).backward()  # type: ignore[no-untyped-call]
            self.seeing_loss = float(seeing.detach())
        if self.plan.changes_weights_after(self.progress.step):
            self._change_weights()
        self.progress.step += 1
        self.progress.situations += batch.situations
        self.progress.answers += len(batch.kinds)
        return float(loss.detach())

    def _change_weights(self) -> None:
        learning = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(learning, self.plan.clip)
        if torch.isfinite(norm):
            for optimiser in self._optimisers:
                optimiser.step()
            self._update_average()
        else:
            self.progress.skipped_steps += 1
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)

    def averaged(self) -> Nano:
        """Return a model with the averaged weights, on the CPU."""
        copy = Nano(self.model.tower.config, self.model.decoder.config)
        for name, parameter in copy.named_parameters():
            parameter.data.copy_(self.average[name])
        return copy.eval()

    def save(self, file: Path) -> None:
        """Write everything that `load` needs, at once or not at all."""
        tensors = {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self._learning():
            tensors[name] = parameter.detach()
            if parameter.grad is not None:  # of a batch after which the weights were not changed
                tensors[f"grad.{name}"] = parameter.grad
            for moment, value in self._state_of(parameter).items():
                tensors[f"{moment}.{name}"] = value.detach().float()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.new")
        metadata = {"identity": self._identity, "progress": json.dumps(asdict(self.progress))}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
        os.replace(beside, file)

    def load(self, file: Path) -> None:
        """Go on from a state file, or raise `StateMismatch`."""
        with safe_open(file, "pt", device=str(self._device)) as stored:
            metadata = stored.metadata() or {}
            if metadata.get("identity") != self._identity:
                raise StateMismatch(f"{file} was written by {metadata.get('identity')}, this is {self._identity}.")
            self.progress = Progress(**json.loads(metadata["progress"]))
            if self.progress.has_grown and self._grow:
                self._begin_with(self._grow(self.model))
            names = set(stored.keys())
            for name, average in self.average.items():
                average.copy_(stored.get_tensor(f"average.{name}"))
            for name, parameter in self._learning():
                parameter.data.copy_(stored.get_tensor(name))
                parameter.grad = stored.get_tensor(f"grad.{name}") if f"grad.{name}" in names else None
                moments = [moment for moment in _MOMENTS if f"{moment}.{name}" in names]
                self._state_of(parameter).update({moment: stored.get_tensor(f"{moment}.{name}") for moment in moments})

    def _begin_with(self, model: Nano) -> None:
        """Learn with this model from here on: optimisers, average and guide begin afresh."""
        self.model = model.to(self._device)
        if self._compiles:
            self.model.compile_layers()
        self.average = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        tower = model.tower.config
        torch.manual_seed(0)
        self.guide = Guide(tower.hidden_size, tower.shuffle_factor).to(self._device)
        self._optimisers = _optimisers(self.model, self.guide, self.plan)

    def _learning(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield everything that learns, by the name it is saved under."""
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter
        for name, parameter in self.guide.named_parameters():
            yield f"guide.{name}", parameter

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Return the moments that the parameter's optimiser keeps; filling them in is how training goes on."""
        for optimiser in self._optimisers:
            if any(parameter is owned for group in optimiser.param_groups for owned in group["params"]):
                return optimiser.state[parameter]
        raise AssertionError("every parameter has an optimiser")

    def _losses(self, tensors: Mapping[str, torch.Tensor], *, has_answers: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the answers, zero where there are none, and that of the guide."""
        with self._precision():
            visual_tokens = self.model.visual_tokens(tensors["tiles"])
            seeing = self.guide(visual_tokens, tensors["seen"], tensors["boxes"])
            seeing = seeing + self.plan.size_share * _size_loss(visual_tokens)
        if not has_answers:
            return torch.zeros((), device=self._device), seeing
        return self._answering_loss(tensors, visual_tokens), seeing

    def _projected(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the visual tokens of a batch's tiles, through which nothing but the projector learns."""
        with self._precision():
            with torch.no_grad():
                merged = self.model.merged_patches(tensors["tiles"])
            return self.model.projected(merged)

    def _answering_loss(self, tensors: Mapping[str, torch.Tensor], visual_tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss of the answers about pictures of which these are the visual tokens."""
        with self._precision():
            hidden = hidden_states_over(self.model, dict(tensors), visual_tokens)
            asked = tensors["targets"] != NO_TARGET
            logits = self.model.logits(hidden[asked])
        losses = functional.cross_entropy(logits, tensors["targets"][asked], reduction="none")
        weights = tensors["weights"][asked]
        return (losses * weights).sum() / weights.sum()

    def _precision(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def _learning_rate(self) -> float:
        plan, step, fraction = self.plan, self.progress.step, self.progress.fraction(self.plan)
        if plan.steps is not None and plan.answering_steps:
            before = plan.steps - plan.answering_steps
            step, length = (step - before, plan.answering_steps) if plan.is_answering(step) else (step, before)
            fraction = step / length
        warm = min(1.0, (step + 1) / plan.warm_up_steps)
        falling = 1.0 if plan.is_answering(self.progress.step) else plan.falling_part
        return plan.learning_rate * warm * min(1.0, (1 - fraction) / falling)

    def _update_average(self) -> None:
        decay = min(self.plan.average_decay, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [weight.data for weight in self.model.parameters()], 1 - decay
            )


def _size_loss(visual_tokens: torch.Tensor) -> torch.Tensor:
    if not len(visual_tokens):
        return visual_tokens.new_zeros(())
    return (visual_tokens.float().square().mean().sqrt() / VISUAL_SIZE).log().square()


def _optimisers(model: Nano, guide: Guide, plan: Plan) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of layers, AdamW for all else.

    Muon's steps are scaled to the size of AdamW's, so that one schedule serves both.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = list(guide.parameters())
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.endswith(("embed.weight", "head.weight"))
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            [{"params": matrices, "share": plan.matrix_share}],
            weight_decay=plan.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([{"params": others, "share": 1.0}], betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
