"""Teachers and token loss of AlignDistil: worked numbers, a slow reference in plain Python, invariants, edge cases."""

import itertools
import math

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.extrapolation import (
    Contrast,
    contrast_of,
    sequence_mean,
    teacher,
    token_loss,
    total_variation,
)

OBJECTIVES = ["aligndistil", "contrast_const", "theorem1_const", "theorem1_adaptive", "gkd"]
Z_D, Z_R, Z_S = [2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]


def tensor(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def softmax(logits):
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return [power / sum(powers) for power in powers]


def slow_loss(student, dpo, other, contrast):
    """Loss of one position from lists of numbers: the pseudo-code of the paper and the table of its ablations."""
    pairs = list(zip(dpo, other, strict=True))
    distance = 0.5 * sum(abs(one - two) for one, two in zip(softmax(dpo), softmax(other), strict=True))
    adaptive = contrast.scale * distance + contrast.epsilon
    constant = contrast.constant
    logits, weight = {
        "aligndistil": ([d + adaptive * (d - o) for d, o in pairs], contrast.beta / adaptive),
        "contrast_const": ([d + constant * (d - o) for d, o in pairs], contrast.beta / constant),
        "theorem1_const": ([constant * d + (1 - constant) * o for d, o in pairs], contrast.beta / constant),
        "theorem1_adaptive": ([adaptive * d + (1 - adaptive) * o for d, o in pairs], contrast.beta / adaptive),
        "gkd": (dpo, 1.0),
    }[contrast.objective]
    weight = weight if contrast.max_weight is None else min(weight, contrast.max_weight)
    q = softmax([logit / contrast.temperature for logit in student])
    p = softmax([logit / contrast.temperature for logit in logits])
    return weight * sum(one * math.log(one / two) for one, two in zip(q, p, strict=True))


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64) * 2).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("scale", "alpha", "target", "probabilities", "kl", "weight", "loss", "gradient"),
    [
        (
            2.0,
            0.66481524,
            [2.66481524, 1.0, -0.66481524],
            [0.81630524, 0.15446586, 0.02922890],
            0.28616970,
            0.15041773,
            0.04304500,
            [-0.05499741, 0.00096174, 0.05403566],
        ),
        (
            20.0,
            6.63915245,
            [8.63915245, 1.0, -6.63915245],
            [0.99951876, 0.00048100, 0.00000023],
            3.88231513,
            0.01506216,
            0.05847607,
            [-0.03847007, 0.00704181, 0.03142826],
        ),
    ],
)
def test_worked_example_of_one_position(scale, alpha, target, probabilities, kl, weight, loss, gradient):
    contrast = Contrast(scale=scale)
    student = tensor(*Z_S).requires_grad_()
    found = teacher(tensor(*Z_D), tensor(*Z_R), contrast)
    value = token_loss(student, tensor(*Z_D), tensor(*Z_R), contrast)
    value.backward()
    assert found.tvd.item() == pytest.approx(0.33190762, abs=5e-9)
    assert found.alpha.item() == pytest.approx(alpha, abs=5e-9)
    assert found.logits.tolist() == pytest.approx(target, abs=2e-8)
    assert softmax(found.logits.tolist()) == pytest.approx(probabilities, abs=5e-9)
    assert found.weight.item() == pytest.approx(weight, abs=5e-9)
    assert value.item() / found.weight.item() == pytest.approx(kl, abs=5e-9)
    assert value.item() == pytest.approx(loss, abs=5e-9)
    assert student.grad.tolist() == pytest.approx(gradient, abs=5e-9)


def test_worked_example_of_a_sequence_of_two_positions():
    dpo, other = tensor(Z_D, [0.5, -0.5, 0.0]), tensor(Z_R, [0.5, -0.5, 0.0])
    losses = token_loss(tensor(Z_S, [0.2, 0.1, 0.0]), dpo, other, Contrast(scale=20.0))
    assert losses[1].item() == pytest.approx(6.75121982, abs=5e-9)
    assert losses[1].item() / 100 == pytest.approx(0.06751220, abs=5e-9)
    mask = torch.ones(1, 2)
    assert sequence_mean(losses[None], mask).item() == pytest.approx(3.40484794, abs=5e-9)
    assert sequence_mean(losses[None], mask, length_norm=False).item() == pytest.approx(6.80969589, abs=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("changes", [{}, {"temperature": 1.7}, {"constant": 2.5, "scale": 5.0}, {"max_weight": 0.05}])
def test_every_objective_equals_the_definition_in_plain_numbers(objective, changes):
    contrast = Contrast(objective, **changes)
    student, dpo, other = drawn(4, 7)
    expected = [slow_loss(*rows, contrast) for rows in zip(*(x.tolist() for x in (student, dpo, other)), strict=True)]
    found = token_loss(student, dpo, None if objective == "gkd" else other, contrast)
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_the_closed_form_and_sums_to_zero(objective, temperature):
    contrast = Contrast(objective, temperature=temperature)
    student, dpo, other = drawn(5, 11)
    target = teacher(dpo, other, contrast)
    (gradient,) = torch.autograd.grad(token_loss(student.requires_grad_(), dpo, other, contrast).sum(), student)
    log_q = torch.log_softmax(student.detach() / temperature, -1)
    log_ratio = log_q - torch.log_softmax(target.logits / temperature, -1)
    kl = (log_q.exp() * log_ratio).sum(-1, keepdim=True)
    expected = target.weight[:, None] * log_q.exp() * (log_ratio - kl) / temperature
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-13)


def test_gradient_agrees_with_finite_differences():
    student, dpo, other = drawn(2, 5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: token_loss(logits, dpo, other, Contrast()), [student], atol=1e-6)


def test_total_variation_is_half_the_sum_symmetric_and_at_most_one():
    dpo, other, _ = drawn(50, 9)
    found = total_variation(dpo, other)
    expected = [
        0.5 * sum(abs(a - b) for a, b in zip(softmax(one), softmax(two), strict=True))
        for one, two in zip(dpo.tolist(), other.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(found, total_variation(other, dpo))
    assert ((found > 0) & (found <= 1)).all()
    assert total_variation(tensor(100.0, 0.0), tensor(0.0, 100.0)).item() == pytest.approx(1.0)
    assert total_variation(dpo, dpo + 3.0).max() < 1e-15


def test_alpha_lies_between_epsilon_and_the_scale():
    disjoint = teacher(tensor(100.0, 0.0), tensor(0.0, 100.0), Contrast(scale=30.0))
    same = teacher(tensor(1.0, 0.0), tensor(1.0, 0.0), Contrast(scale=30.0))
    assert disjoint.alpha.item() == pytest.approx(30.001)
    assert same.alpha.item() == pytest.approx(0.001)


def test_equal_models_give_the_dpo_model_with_the_largest_weight():
    dpo = tensor(*Z_D)
    found = teacher(dpo, dpo.clone(), Contrast(beta=0.1, epsilon=1e-3))
    assert torch.equal(found.logits, dpo)
    assert found.weight.item() == pytest.approx(100.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_constants_added_to_the_logits_of_a_position_change_nothing(objective):
    contrast = Contrast(objective)
    student, dpo, other = drawn(4, 6)
    student.requires_grad_()
    shifts = torch.tensor([[3.0], [-2.0], [50.0], [0.1]], dtype=torch.float64)
    losses = token_loss(student, dpo, other, contrast)
    shifted = token_loss(student + shifts, dpo - 2 * shifts, other + 0.5 * shifts, contrast)
    torch.testing.assert_close(shifted, losses, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(one.sum(), student)[0] for one in (losses, shifted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_that_is_the_teacher_has_neither_loss_nor_gradient(objective):
    contrast = Contrast(objective)
    _, dpo, other = drawn(4, 6)
    student = teacher(dpo, other, contrast).logits.clone().requires_grad_()
    losses = token_loss(student, dpo, other, contrast)
    assert losses.abs().max() < 1e-12
    assert torch.autograd.grad(losses.sum(), student)[0].abs().max() < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_never_negative(objective):
    student, dpo, other = drawn(200, 8, seed=3)
    assert token_loss(student, dpo, other, Contrast(objective)).min() > 0


def test_no_gradient_reaches_the_frozen_models():
    student, dpo, other = (logits.requires_grad_() for logits in drawn(3, 5))
    token_loss(student, dpo, other, Contrast()).sum().backward()
    assert student.grad.abs().max() > 0
    assert dpo.grad is None
    assert other.grad is None


def test_the_constant_contrast_with_alpha_t_is_the_adaptive_teacher():
    _, dpo, other = drawn(1, 6)
    adaptive = teacher(dpo, other, Contrast("aligndistil"))
    constant = teacher(dpo, other, Contrast("contrast_const", constant=adaptive.alpha.item()))
    torch.testing.assert_close(constant.logits, adaptive.logits, rtol=1e-14, atol=0)


def test_theorem_1_with_beta_equal_to_beta_0_is_exactly_the_dpo_model():
    _, dpo, other = drawn(6, 6, dtype=torch.float32)
    assert torch.equal(teacher(dpo, other, Contrast("theorem1_const", constant=1.0)).logits, dpo)


def test_the_largest_weight_caps_only_heavier_tokens():
    dpo, other = tensor(Z_D, Z_D), tensor(Z_R, Z_D)
    free = teacher(dpo, other, Contrast()).weight
    capped = teacher(dpo, other, Contrast(max_weight=5.0)).weight
    assert free[0] < 5.0 < free[1]
    assert capped.tolist() == [free[0].item(), 5.0]


@pytest.mark.parametrize("k", [0.5, 1.0, 2.5])
def test_the_objective_of_rlhf_is_the_distillation_loss_plus_the_normalisers(k):
    """J = -beta E sum_t KL(pi || pi*) + beta E sum_t C(s_t), by enumeration of all sequences of length 2."""
    beta_0, size = 0.1, 3
    beta = beta_0 / k
    prefixes = [(), *((token,) for token in range(size))]
    pi, pi_d, pi_ref = (
        {prefix: drawn(size, seed=10 * model + number)[0].tolist() for number, prefix in enumerate(prefixes)}
        for model in range(3)
    )
    objective = identity = 0.0
    for sequence in itertools.product(range(size), repeat=2):
        steps = [((), sequence[0]), ((sequence[0],), sequence[1])]
        log_ratio = {
            name: sum(math.log(softmax(model[prefix])[token]) for prefix, token in steps)
            for name, model in (("pi", pi), ("d", pi_d), ("ref", pi_ref))
        }
        reward = beta_0 * (log_ratio["d"] - log_ratio["ref"])
        share = math.exp(log_ratio["pi"])
        objective += share * (reward - beta * (log_ratio["pi"] - log_ratio["ref"]))
        for prefix, _ in steps:
            weighted = token_loss(
                tensor(*pi[prefix]),
                tensor(*pi_d[prefix]),
                tensor(*pi_ref[prefix]),
                Contrast("theorem1_const", beta=beta_0, constant=k),
            ).item()
            both = zip(softmax(pi_d[prefix]), softmax(pi_ref[prefix]), strict=True)
            normaliser = math.log(sum(d**k * ref ** (1 - k) for d, ref in both))
            identity += share * (-weighted + beta * normaliser)
    assert objective == pytest.approx(identity, abs=1e-12)


def test_a_token_that_all_models_ban_contributes_nothing():
    student, dpo, other = drawn(3, 6)
    expected = token_loss(student, dpo, other, Contrast())
    banned = torch.full((3, 2), -math.inf, dtype=torch.float64)
    student, dpo, other = (torch.cat([logits, banned], -1) for logits in (student, dpo, other))
    student.requires_grad_()
    losses = token_loss(student, dpo, other, Contrast())
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(losses.sum(), student)[0]
    assert gradient.isfinite().all()
    assert gradient[:, 6:].abs().max() == 0


def test_a_token_that_one_frozen_model_bans_keeps_the_other_models_logit():
    dpo, other = tensor(1.0, 0.5, 0.0), tensor(0.0, -math.inf, 1.0)
    assert teacher(dpo, other, Contrast("contrast_const")).logits.tolist() == [2.0, 0.5, -1.0]
    logits = teacher(other, dpo, Contrast("contrast_const")).logits
    assert logits.tolist() == [-1.0, -math.inf, 2.0]
    assert token_loss(tensor(1.0, -math.inf, 0.0), other, dpo, Contrast("contrast_const")).isfinite()


def test_bfloat16_logits_are_widened_before_they_are_subtracted():
    student, dpo, other = (logits.bfloat16() for logits in drawn(5, 9))
    found = teacher(dpo * 8, other * 8, Contrast())
    exact = teacher((dpo * 8).double(), (other * 8).double(), Contrast())
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits.double(), exact.logits, rtol=1e-5, atol=1e-4)
    assert token_loss(student, dpo, other, Contrast()).dtype == torch.float32


def test_gkd_needs_no_second_model_and_weighs_all_tokens_alike():
    student, dpo, other = drawn(4, 5)
    found = teacher(dpo, None, Contrast("gkd", beta=0.3))
    assert torch.equal(found.logits, dpo)
    assert found.weight.tolist() == [1.0] * 4
    losses = token_loss(student, dpo, None, Contrast("gkd"))
    assert torch.equal(losses, token_loss(student, dpo, other, Contrast("gkd")))


def test_the_official_scale_is_twice_as_large_because_their_distance_lacks_the_half():
    _, dpo, other = drawn(3, 5)
    config = {"model": {"model": "m"}, "data": {"train": [{"path": "p"}]}, "official_beta2": 10}
    contrast = contrast_of(AlignDistilConfig.model_validate(config))
    l1 = (dpo.softmax(-1) - other.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(teacher(dpo, other, contrast).alpha, 10 * l1 + 1e-3)


def test_a_configuration_gives_all_its_numbers():
    config = AlignDistilConfig.model_validate(
        {
            "model": {"model": "m"},
            "data": {"train": [{"path": "p"}]},
            "objective": "theorem1_adaptive",
            "beta": 0.2,
            "extrapolation": 7.0,
            "epsilon": 0.01,
            "constant": 2.0,
            "temperature": 1.5,
            "max_token_weight": 9.0,
        }
    )
    assert contrast_of(config) == Contrast("theorem1_adaptive", 0.2, 7.0, 0.01, 2.0, 1.5, 9.0)
    with pytest.raises(ValueError, match=r"'kto' has no teacher; choose one of aligndistil"):
        contrast_of(config.model_copy(update={"objective": "kto"}))


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.0}, {"scale": -1.0}, {"epsilon": 0.0}, {"temperature": math.inf}, {"max_weight": 0.0}],
)
def test_numbers_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Contrast(**changes)


def test_a_missing_or_misshapen_second_model_is_refused():
    _, dpo, other = drawn(3, 5)
    with pytest.raises(ValueError, match=r"shape \(3, 5\), those of the second model None"):
        teacher(dpo, None, Contrast())
    with pytest.raises(ValueError, match=r"those of the second model \(3, 4\)"):
        teacher(dpo, other[:, :4], Contrast())


def test_every_sequence_counts_the_same_whatever_its_length():
    values, mask = tensor([1.0, 3.0, 99.0], [5.0, 7.0, 9.0]), tensor([1, 1, 0], [1, 1, 1])
    assert sequence_mean(values, mask).item() == pytest.approx((2.0 + 7.0) / 2)
    assert sequence_mean(values, mask, length_norm=False).item() == pytest.approx((4.0 + 21.0) / 2)


def test_a_sequence_without_tokens_counts_neither_as_loss_nor_as_sequence():
    values, mask = tensor([2.0, 4.0], [math.nan, math.inf]), tensor([1, 1], [0, 0])
    assert sequence_mean(values, mask).item() == pytest.approx(3.0)


def test_a_batch_without_tokens_gives_zero_with_gradient():
    values = torch.ones(2, 3, requires_grad=True)
    total = sequence_mean(values, torch.zeros(2, 3))
    total.backward()
    assert total.item() == 0.0
    assert values.grad.tolist() == [[0.0] * 3] * 2
