"""Training: one step, the schedule, the moving average of the weights, and the state that a later run goes on from."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from examples.nano.accuracy import hidden_states
from examples.nano.batches import NO_TARGET, Batch
from examples.nano.model import Nano, tensors_of


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to learn. Either `situations` or `seconds` says when training ends."""

    situations: int | None
    seconds: float | None
    learning_rate: float = 1.5e-3
    final_share: float = 0.03
    warm_up_steps: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    average_decay: float = 0.999


@dataclass(slots=True)
class Progress:
    """How far training has come. `history` holds one entry per measurement."""

    step: int = 0
    situations: int = 0
    answers: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def fraction(self, plan: Plan) -> float:
        """Return how much of the plan is done, from 0 to 1."""
        if plan.situations is not None:
            return min(1.0, self.situations / plan.situations)
        assert plan.seconds is not None
        return min(1.0, self.seconds / plan.seconds)


class StateMismatch(Exception):
    """A state file belongs to another training."""


class Trainer:
    """A model, its optimiser and the moving average of its weights. `identity` names what is being trained."""

    def __init__(self, model: Nano, plan: Plan, device: torch.device, dtype: torch.dtype, identity: str) -> None:
        self.model = model.to(device)
        self.plan = plan
        self.progress = Progress()
        self.average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._device, self._dtype, self._identity = device, dtype, identity
        self._optimiser = torch.optim.AdamW(
            _groups(model, plan.weight_decay), lr=plan.learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True
        )

    def step(self, batch: Batch) -> float:
        """Learn from a batch; return its loss, the mean over answer tokens by their weights.

        A step whose gradients are not numbers changes nothing.
        """
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate()
        loss = self._loss(tensors_of(batch, self._device))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        if torch.isfinite(norm):
            self._optimiser.step()
            self._update_average()
        else:
            self.progress.skipped_steps += 1
        self._optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.situations += batch.situations
        self.progress.answers += len(batch.kinds)
        return float(loss.detach())

    def averaged(self) -> Nano:
        """Return a model with the averaged weights, on the CPU."""
        copy = Nano(self.model.tower.config, self.model.decoder.config)
        for name, parameter in copy.named_parameters():
            parameter.data.copy_(self.average[name])
        return copy.eval()

    def save(self, file: Path) -> None:
        """Write everything that `load` needs, at once or not at all."""
        tensors = {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for moment, value in self._optimiser.state.get(parameter, {}).items():
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
            names = set(stored.keys())
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(stored.get_tensor(f"model.{name}"))
                self.average[name].copy_(stored.get_tensor(f"average.{name}"))
                moments = {key: f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq", "step")}
                if moments["step"] in names:
                    self._optimiser.state[parameter] = {
                        key: stored.get_tensor(stored_name) for key, stored_name in moments.items()
                    }

    def _loss(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with self._precision():
            hidden = hidden_states(self.model, dict(tensors))
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
        plan = self.plan
        warm = min(1.0, (self.progress.step + 1) / plan.warm_up_steps)
        falling = 0.5 * (1 + math.cos(math.pi * self.progress.fraction(plan)))
        return plan.learning_rate * warm * (plan.final_share + (1 - plan.final_share) * falling)

    def _update_average(self) -> None:
        decay = min(self.plan.average_decay, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [weight.data for weight in self.model.parameters()], 1 - decay
            )


def _groups(model: Nano, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters in two groups: only matrices of layers decay."""
    decaying: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith(("embedding", "embed.weight", "head.weight"))
        (decaying if is_matrix else others).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
