"""Sampling follows the reference's processors; every sequence draws from its own generator."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from llm_service.engine.sampler import largest, logprobs_of, penalise, probabilities, sample
from llm_service.engine.sequence import EngineRequest, SamplingParams, Sequence
from llm_service.prompt.splice import PromptTokens
from tests.golden_cases import GOLDEN

PARAMETER_SETS = json.loads((GOLDEN / "sampling.json").read_text())


def sequence(generated: tuple[int, ...] = (), **params: Any) -> Sequence:
    asked = EngineRequest(PromptTokens((1, 2)), (), SamplingParams(max_output_tokens=4, **params), generated)
    return Sequence(asked, lambda output: None, 0.0)


@pytest.mark.parametrize("index", range(len(PARAMETER_SETS)), ids=[str(entry) for entry in PARAMETER_SETS])
def test_probabilities_are_the_references(index: int) -> None:
    golden = np.load(GOLDEN / "sampling.npz")
    given = dict(PARAMETER_SETS[index])
    penalty = given.pop("repetition_penalty", 1.0)
    params = SamplingParams(max_output_tokens=1, **({"temperature": 1.0} | given))
    for row, (logits, generated) in enumerate(zip(golden["logits"], golden["generated_ids"], strict=True)):
        scores = torch.from_numpy(logits.copy())
        penalise(scores, generated.tolist(), penalty)
        expected = torch.from_numpy(golden[f"probs.{index}"][row])
        torch.testing.assert_close(probabilities(scores, params), expected, atol=1e-6, rtol=1e-5)


def test_min_p_drops_what_is_less_likely_than_its_fraction_of_the_best() -> None:
    logits = torch.tensor([0.6, 0.3, 0.09, 0.01]).log()
    kept = probabilities(logits, SamplingParams(max_output_tokens=1, temperature=1.0, min_p=0.2))
    torch.testing.assert_close(kept, torch.tensor([2 / 3, 1 / 3, 0.0, 0.0]))


def test_greedy_takes_the_best_after_the_penalty_on_generated_tokens_only() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 2.9]])
    assert sample(logits.clone(), [sequence()]) == [1]
    assert sample(logits.clone(), [sequence(generated=(1,), repetition_penalty=2.0)]) == [3]
    assert sample(logits.clone(), [sequence(repetition_penalty=2.0)]) == [1], "the prompt's tokens do not count"


def test_a_row_that_holds_nan_gives_no_token_and_its_neighbours_theirs() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 5.0], [2.0, 1.0]])
    assert sample(logits, [sequence(), sequence(), sequence()]) == [1, None, 0]


def test_the_same_seed_draws_the_same_tokens_whatever_is_beside_it() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))

    def drawn(neighbours: int) -> list[int]:
        seeded = sequence(seed=42, temperature=1.3)
        others = [sequence(temperature=2.0) for _ in range(neighbours)]
        rows = logits.expand(neighbours + 1, -1)
        for _ in range(20):
            seeded.token_ids.append(sample(rows.clone(), [*others, seeded])[-1] or 0)
        return seeded.output_ids

    assert drawn(0) == drawn(3)
    assert len(set(drawn(0))) > 1


def test_a_step_that_is_repeated_draws_the_same_token_again() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    for seq in (sequence(seed=1, temperature=1.3), sequence(temperature=1.3)):
        assert len({tuple(sample(logits.clone(), [seq])) for _ in range(5)}) == 1


def test_without_a_seed_two_sequences_draw_differently() -> None:
    logits = torch.zeros(2, 1000)
    first, second = sequence(temperature=1.0), sequence(temperature=1.0)
    draws = [tuple(sample(logits.clone(), [first, second])) for _ in range(8)]
    assert any(left != right for left, right in draws)


def test_logprobs_are_the_chosen_tokens_and_the_likeliest_ones_best_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]]).log_softmax(dim=-1)
    first, second = logprobs_of(scores, [0, 0], [2, 0])
    assert [token for token, _ in first.top] == [1, 2]
    assert first.chosen == pytest.approx(scores[0, 0].item())
    assert first.top[0][1] == pytest.approx(scores[0, 1].item())
    assert second.top == ()
    assert second.chosen == pytest.approx(scores[1, 0].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 100, 2047, 2048, 5000, 9 * 1024])
def test_the_largest_logit_is_found_where_it_is_first(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    # Few different numbers, so that the largest is there more than once; rows that are masked but for one token.
    rows = torch.randint(7, (6, size), generator=generator).float()
    masked = torch.full((3, size), -torch.inf)
    for row, place in enumerate((0, size // 2, size - 1)):
        masked[row, place] = -3.0
    logits = torch.cat((rows, masked, torch.full((1, size), -torch.inf))).to(dtype)
    best = logits.max(dim=-1)
    assert largest(logits) == (best.values.tolist(), best.indices.tolist())


@pytest.mark.parametrize("place", [0, 1500, 4999])
def test_a_row_with_a_logit_that_is_no_number_has_no_token_and_its_neighbour_has(place: int) -> None:
    logits = torch.zeros(2, 5000)
    logits[0, place] = torch.nan
    logits[1, 4998] = 1.0
    assert sample(logits, [sequence(), sequence()]) == [None, 4998]
