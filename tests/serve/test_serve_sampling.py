"""The choice of tokens: greedy, by probability, inside the nucleus, and the same whatever the neighbours are."""

import math

import pytest
import torch
from tenfold.serve.sampling import Sampling, choose_tokens, logprobs_of, nucleus, uniform

PROBABILITIES = [0.5, 0.2, 0.2, 0.1]
LOGITS = torch.tensor([[math.log(p) for p in PROBABILITIES]])


def choose(draw, **options):
    return choose_tokens(LOGITS, [Sampling(**options)], [draw]).item()


def test_temperature_zero_takes_the_most_probable_token():
    assert choose(0.99, temperature=0.0) == 0


@pytest.mark.parametrize(
    ("draw", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.69, 1), (0.71, 2), (0.89, 2), (0.91, 3), (1 - 2**-53, 3)]
)
def test_a_draw_lands_in_its_part_of_the_cumulative_distribution(draw, token):
    assert choose(draw) == token


def test_temperature_two_flattens_by_the_square_root():
    roots = [math.sqrt(p) for p in PROBABILITIES]
    edge = roots[0] / sum(roots)
    assert choose(edge - 1e-6, temperature=2.0) == 0
    assert choose(edge + 1e-6, temperature=2.0) == 1


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    kept = nucleus(torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[0.6]]))
    assert kept.tolist() == [[0.0, 0.5, pytest.approx(0.3), 0.0]]


def test_a_tiny_top_p_keeps_the_most_probable_token():
    assert choose(0.999, top_p=1e-9) == 0


def test_equal_tokens_at_the_edge_of_the_nucleus_all_stay():
    kept = nucleus(torch.tensor([PROBABILITIES]), torch.tensor([[0.6]]))
    assert (kept > 0).tolist() == [[True, True, True, False]]


def test_top_p_draws_from_the_renormalised_nucleus():
    # Inside 0.6 are 0.5, 0.2, 0.2: the first has 5/9 of it.
    assert choose(5 / 9 - 1e-6, top_p=0.6) == 0
    assert choose(5 / 9 + 1e-6, top_p=0.6) == 1
    assert choose(1 - 2**-53, top_p=0.6) == 2


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator) * 3
    samplings = [
        Sampling(),
        Sampling(top_p=0.5),
        Sampling(temperature=0.0),
        Sampling(temperature=0.3),
        Sampling(top_p=0.9),
    ]
    draws = [uniform(seed, 0) for seed in range(5)]
    together = choose_tokens(logits, samplings, draws).tolist()
    alone = [choose_tokens(logits[i : i + 1], [samplings[i]], [draws[i]]).item() for i in range(5)]
    assert together == alone


def test_frequencies_follow_the_probabilities():
    draws = [uniform(seed, 0) for seed in range(4000)]
    chosen = choose_tokens(LOGITS.expand(4000, 4), [Sampling()] * 4000, draws)
    frequencies = torch.bincount(chosen, minlength=4) / 4000
    # Four standard deviations of the most spread one: 4 * sqrt(0.25 / 4000).
    assert (frequencies - torch.tensor(PROBABILITIES)).abs().max() < 0.032


def test_draws_depend_on_seed_and_place_alone():
    assert uniform(7, 3) == uniform(7, 3)
    values = {uniform(seed, place) for seed in (-1, 0, 1, 2**62) for place in range(50)}
    assert len(values) == 200
    assert all(0 <= value < 1 for value in values)


def test_log_probabilities_are_the_models_own_before_temperature_and_top_p():
    sampling = Sampling(temperature=0.1, top_p=0.5, num_top_logprobs=2)
    (found,) = logprobs_of(LOGITS, torch.tensor([3]), [sampling])
    assert found.chosen == pytest.approx(math.log(0.1))
    assert found.top[0][0] == 0
    assert [value for _, value in found.top] == pytest.approx([math.log(0.5), math.log(0.2)])


def test_rows_get_as_many_alternatives_as_they_asked_for():
    logits = LOGITS.repeat(3, 1)
    samplings = [Sampling(num_top_logprobs=0), Sampling(), Sampling(num_top_logprobs=20)]
    first, second, third = logprobs_of(logits, torch.tensor([0, 0, 1]), samplings)
    assert first.top == ()
    assert second is None
    assert len(third.top) == 4
    assert third.chosen == pytest.approx(math.log(0.2))
