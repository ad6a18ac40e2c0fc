"""Frequencies and rotations of every kind of rope are the reference's (tests/golden/rope.json)."""

import json
from typing import Any

import pytest
import torch

from llm_service.model.config import RopeConfig, decoder_config
from llm_service.model.rope import Rope, Rotation
from shared.errors import CheckpointError
from tests.golden_cases import GOLDEN

ROPE = json.loads((GOLDEN / "rope.json").read_text())
LLM: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 131072,
}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def rope_of(case: dict[str, Any]) -> Rope:
    config = RopeConfig(
        theta=case["rope_theta"],
        kind={"dynamic_ntk": "dynamic", "phi3_su": "longrope"}[case["kind"]],
        factor=case.get("factor", 1.0),
        max_positions=case["max_position_embeddings"],
        original_max_positions=case.get("original_max_position_embeddings", 0),
        short_factors=tuple(case.get("short_factor", ())),
        long_factors=tuple(case.get("long_factor", ())),
    )
    return Rope(config, case["head_dim"], torch.device("cpu"))


def last_rotation(rope: Rope, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope.rotation(torch.tensor([length - 1]), torch.tensor([length]))
    return cos[0], sin[0]


@pytest.mark.parametrize("case", ROPE["cases"], ids=lambda case: f"{case['kind']}-{case['seq_len']}")
def test_the_last_position_is_rotated_as_in_the_reference(case: dict[str, Any]) -> None:
    cos, sin = last_rotation(rope_of(case), case["seq_len"])
    # An angle of tens of thousands has an error of some thousandths in float32 itself.
    tolerance = {"atol": max(1e-6, case["seq_len"] * 2e-7), "rtol": 0.0}
    torch.testing.assert_close(cos, torch.tensor(case["cos_last"]), **tolerance)
    torch.testing.assert_close(sin, torch.tensor(case["sin_last"]), **tolerance)


def test_a_long_sequence_does_not_change_a_later_short_one() -> None:
    leak = ROPE["internlm2_state_leak"]
    rope = rope_of({**leak, "kind": "dynamic_ntk"})
    lengths = [call["seq_len"] for call in leak["calls"]]
    first, *_ = rotations = [last_rotation(rope, length) for length in lengths]
    again = lengths.index(lengths[0], 1)
    assert torch.equal(rotations[again][0], first[0])


def test_each_sequence_of_a_batch_is_rotated_by_its_own_length() -> None:
    for case in (ROPE["cases"][0], next(case for case in ROPE["cases"] if case["kind"] == "phi3_su")):
        rope = rope_of(case)
        limit = case.get("original_max_position_embeddings") or case["max_position_embeddings"]
        lengths = torch.tensor([5, limit, limit + 1, limit * 2])
        cos, sin = rope.rotation(lengths - 1, lengths)
        alone = [last_rotation(rope, int(length)) for length in lengths]
        assert torch.equal(cos, torch.stack([pair[0] for pair in alone]))
        assert torch.equal(sin, torch.stack([pair[1] for pair in alone]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ROPE["cases"], ids=lambda case: f"{case['kind']}-{case['seq_len']}")
def test_what_is_looked_up_is_what_is_computed(case: dict[str, Any], dtype: torch.dtype) -> None:
    rope = rope_of(case)
    for lengths in ((3, 1), (1025, 900), (5000,), (case["seq_len"], 2)):  # the table grows meanwhile
        of = torch.tensor(lengths)
        found, expected = rope.rotation_in(dtype, of - 1, of), Rotation.of(*rope.rotation(of - 1, of), dtype)
        tolerance = {"atol": 1e-6 if dtype == torch.float32 else 2**-8, "rtol": 0.0}  # cosines of vectors and of one
        torch.testing.assert_close(found.cos, expected.cos, **tolerance)
        torch.testing.assert_close(found.sin, expected.sin, **tolerance)


def test_positions_between_whole_ones_are_computed() -> None:
    rope, positions, lengths = rope_of(ROPE["cases"][0]), torch.tensor([0.5, 7.25]), torch.ones(2, dtype=torch.int64)
    found = rope.rotation_in(torch.float32, positions, lengths)
    assert torch.equal(found.cos, Rotation.of(*rope.rotation(positions, lengths), torch.float32).cos)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 4096},
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096, **FACTORS}},
        {
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 4096,
                "factor": 32.0,
                **FACTORS,
            },
        },
    ],
)
def test_the_long_rope_is_read_in_every_form_that_files_have(settings: dict[str, Any]) -> None:
    rope = decoder_config(LLM | settings).rope
    assert (rope.theta, rope.kind, rope.original_max_positions) == (10000.0, "longrope", 4096)
    assert (rope.short_factors, rope.long_factors) == ((1.0,) * 8, (2.0,) * 8)
    assert rope.amplitude == pytest.approx(1.190238, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "su", **FACTORS}}, "original_max_position_embeddings"),
        (
            {"rope_scaling": {"type": "su", **FACTORS, "long_factor": [1.0]}, "original_max_position_embeddings": 9},
            "factor",
        ),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 9}, "short_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None}, "not supported"),
        ({"num_attention_heads": "four"}, "wrong type"),
    ],
)
def test_a_setting_that_cannot_be_computed_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        decoder_config(LLM | settings)
