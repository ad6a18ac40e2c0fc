"""Rotary position embedding, half-split form: plain, dynamic NTK, and the long rope of Phi-3."""

from dataclasses import dataclass
from typing import Final

import torch

from llm_service.model.config import RopeConfig

_LEAST_KNOWN: Final = 1024  # positions of which the rotation is kept


class Rope:
    """Gives cos and sin for positions. Each sequence's own length decides its frequencies, whatever else is batched.

    Dynamic NTK: up to `max_positions` plain rope; beyond, base' = base * (f * n / max - (f - 1)) ** (d / (d - 2)) for
    the current length n. Long rope: short factors up to `original_max_positions`, beyond it long ones. Keys that are
    already cached stay as they were rotated.
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._config = config
        self._head_dim = head_dim
        self._device = device
        self._short = self._frequencies(config.theta, config.short_factors)
        self._amplitude = config.amplitude
        self._long = self._frequencies(config.theta, config.long_factors)
        self._table: Rotation | None = None  # of the plain rotation, by position

    def rotation_in(self, dtype: torch.dtype, positions: torch.Tensor, lengths: torch.Tensor) -> "Rotation":
        """Return the rotation, for which see `rotation`, in the type of what is rotated.

        On a CPU the plain one of whole positions is looked up: a step that decodes would wait for ten small operators.
        """
        is_plain = positions.device.type == "cpu" and not positions.is_floating_point() and self._are_short(lengths)
        if not is_plain:
            return Rotation.of(*self.rotation(positions, lengths), dtype)
        count = int(positions.max()) + 1
        if self._table is None or len(self._table.cos) < count or self._table.cos.dtype != dtype:
            known = torch.arange(max(_LEAST_KNOWN, 1 << (count - 1).bit_length()))
            self._table = Rotation.of(*self.rotation(known, torch.ones_like(known)), dtype)
        return Rotation(self._table.cos.index_select(0, positions), self._table.sin.index_select(0, positions))

    def rotation(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, float32 [tokens, head_dim].

        `positions` and `lengths` are int64 [tokens]: each token's position and the present length of its sequence.
        """
        angles = positions.to(torch.float32)[:, None] * self._frequencies_for(lengths)
        both_halves = torch.cat((angles, angles), dim=-1)
        return both_halves.cos() * self._amplitude, both_halves.sin() * self._amplitude

    def _frequencies_for(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return inverse frequencies, [head_dim / 2] where all sequences are short, else [tokens, head_dim / 2]."""
        if self._are_short(lengths):
            return self._short
        rows = {length: self._for_length(length) for length in set(lengths.tolist())}
        return torch.stack([rows[int(length)] for length in lengths])

    def _are_short(self, lengths: torch.Tensor) -> bool:
        return self._config.kind == "default" or int(lengths.max()) <= self._config.plain_limit

    def _for_length(self, length: int) -> torch.Tensor:
        if length <= self._config.plain_limit:
            return self._short
        if self._config.kind == "longrope":
            return self._long
        limit, factor = self._config.max_positions, self._config.factor
        exponent = self._head_dim / (self._head_dim - 2)
        return self._frequencies(self._config.theta * ((factor * length / limit) - (factor - 1)) ** exponent)

    def _frequencies(self, base: float, factors: tuple[float, ...] = ()) -> torch.Tensor:
        steps = torch.arange(0, self._head_dim, 2, dtype=torch.int64, device=self._device).to(torch.float32)
        stretched = base ** (steps / self._head_dim)
        if factors:
            stretched = torch.tensor(factors, dtype=torch.float32, device=self._device) * stretched
        return 1.0 / stretched


def rotation_of(config: RopeConfig, length: int) -> int:
    """Return a number that is the same for prompts of all lengths that are rotated alike; 0 is the plain rotation."""
    if config.kind == "default" or length <= config.plain_limit:
        return 0
    return 1 if config.kind == "longrope" else length


@dataclass(frozen=True, slots=True)
class Rotation:
    """What queries and keys of a batch's tokens are rotated by, [tokens, 1, 2, head_dim / 2] each.

    `sin` is negative in the first half: there the second half is subtracted.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> "Rotation":
        """Return the rotation by cos and sin [tokens, head_dim]."""
        cos, sin = (part.to(dtype).view(len(part), 1, 2, -1) for part in (cos, sin))
        return cls(cos, torch.cat((-sin[:, :, :1], sin[:, :, 1:]), dim=2))

    def to(self, device: torch.device) -> "Rotation":
        """Return the rotation on a device."""
        return Rotation(self.cos.to(device), self.sin.to(device))
