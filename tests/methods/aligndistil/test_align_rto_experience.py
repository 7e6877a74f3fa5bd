"""From log-probabilities to a step's targets: the worked numbers, two micro-batches as one, statistics."""

import pytest
import torch
from tenfold.methods.aligndistil.config import RTOOptions
from tenfold.methods.aligndistil.rto_experience import Experience, Judged

IGNORED = -100


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# one response of three tokens behind a prompt of two
LABELS = torch.tensor([[IGNORED, IGNORED, 5, 6, 7, IGNORED]])
WORKED = Experience(
    log_policy=tensor(-1.8, -1.6, -2.9),
    log_dpo=tensor(-1.0, -1.7, -2.5),
    log_reference=tensor(-2.0, -1.5, -3.0),
    values=tensor(0.02, 0.01, 0.0),
)


def random_part(lengths, seed):
    """Experience and labels of responses of these lengths, each behind a prompt of one token."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.full((len(lengths), 1 + max(lengths)), IGNORED)
    for row, length in enumerate(lengths):
        labels[row, 1 : 1 + length] = 3
    numbers = torch.randn(4, sum(lengths), generator=draw, dtype=torch.float64)
    return Experience(*numbers), labels


def test_worked_example_gives_its_advantages_and_returns():
    judged = Judged.of(WORKED, LABELS, RTOOptions())
    assert judged.dense.tolist() == pytest.approx([0.1, -0.02, 0.05], abs=1e-12)
    assert judged.advantages.tolist() == pytest.approx([0.1046725, 0.01755, 0.049], abs=1e-12)
    assert judged.returns.tolist() == pytest.approx([0.1246725, 0.02755, 0.049], abs=1e-12)
    assert judged.num_sequences == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("reward_beta", 0.2), ("reward_clip", 0.03), ("kl_coefficient", 0.0), ("gamma", 0.5), ("gae_lambda", 0.0)],
)
def test_every_option_changes_the_advantages(option, value):
    changed = Judged.of(WORKED, LABELS, RTOOptions(**{option: value})).advantages
    assert not torch.allclose(changed, Judged.of(WORKED, LABELS, RTOOptions()).advantages)


def test_advantages_of_one_sequence_do_not_reach_into_another():
    experience, labels = random_part([3, 1, 4], seed=0)
    together = Judged.of(experience, labels, RTOOptions())
    assert together.num_sequences == 3
    at = 0
    for row, length in enumerate([3, 1, 4]):
        own = Experience(*(getattr(experience, name)[at : at + length] for name in vars(experience)))
        alone = Judged.of(own, labels[row : row + 1], RTOOptions())
        torch.testing.assert_close(alone.advantages, together.advantages[at : at + length])
        at += length


def test_targets_are_standardised_over_all_micro_batches_of_a_step():
    parts = [Judged.of(*random_part(lengths, seed), RTOOptions()) for seed, lengths in enumerate(([3, 5], [2]))]
    moments = torch.stack([part.moments for part in parts]).sum(0)
    found = [part.targets(moments) for part in parts]
    whole = torch.cat([part.advantages for part in parts])
    expected = (whole - whole.mean()) / whole.std(unbiased=False)
    torch.testing.assert_close(torch.cat([part.advantages for part in found]), expected)
    for part, targets in zip(parts, found, strict=True):
        # the critic learns returns as they are
        assert torch.equal(targets.returns, part.returns)
        assert torch.equal(targets.log_policy, part.experience.log_policy)
        assert torch.equal(targets.values, part.experience.values)


def test_statistics_are_sums_over_sequences_and_measures_of_the_whole_step():
    parts = [Judged.of(*random_part(lengths, seed), RTOOptions()) for seed, lengths in enumerate(([3, 5], [2]))]
    moments = torch.stack([part.moments for part in parts]).sum(0)
    found = [part.targets(moments).statistics for part in parts]
    totals = {
        name: [sum(pair).item() for pair in zip(*(one[name] for one in found), strict=True)] for name in found[0]
    }
    means = {name: total / count for name, (total, count) in totals.items()}
    dense, ratio, values, advantages, returns = (
        torch.cat(list(columns))
        for columns in zip(
            *(
                (
                    p.dense,
                    p.experience.log_policy - p.experience.log_reference,
                    p.experience.values,
                    p.advantages,
                    p.returns,
                )
                for p in parts
            ),
            strict=True,
        )
    )
    assert means["rto_reward"] == pytest.approx(dense.sum().item() / 3)
    assert means["kl_reference"] == pytest.approx(ratio.sum().item() / 3)
    assert means["value"] == pytest.approx(values.mean().item())
    assert means["advantage_std"] == pytest.approx(advantages.std(unbiased=False).item())
    explained = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    assert means["explained_variance"] == pytest.approx(explained.item())


def test_a_perfect_critic_explains_all_variance_and_a_constant_one_none():
    experience, labels = random_part([6], seed=0)
    rewards = Judged.of(experience, labels, RTOOptions(gae_lambda=0.0, gamma=1e-9)).advantages + experience.values
    perfect = rewards.flip(0).cumsum(0).flip(0)
    for values, expected in ((perfect, 1.0), (torch.zeros_like(perfect), 0.0)):
        seen = Experience(experience.log_policy, experience.log_dpo, experience.log_reference, values)
        judged = Judged.of(seen, labels, RTOOptions())
        total, count = judged.targets(judged.moments).statistics["explained_variance"]
        assert (total / count).item() == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_responses_has_no_targets_and_no_sequences():
    judged = Judged.of(Experience(*(torch.zeros(0) for _ in range(4))), torch.full((2, 4), IGNORED), RTOOptions())
    targets = judged.targets(judged.moments)
    assert len(targets.advantages) == len(targets.returns) == 0
    assert targets.statistics["rto_reward"][1] == 0
