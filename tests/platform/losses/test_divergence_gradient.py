"""Closed-form gradients against autograd and against the textbook forms."""

import pytest
import torch
from tenfold.platform.losses.divergence import DIVERGENCES, DivergenceOptions, divergence_rows
from tenfold.platform.losses.divergence_gradient import (
    cross_entropy_value_and_gradient,
    divergence_value_and_gradient,
)

NAMES = list(DIVERGENCES)


def random_logits(rows: int = 5, vocabulary: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = 2.5 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return student, teacher


def autograd(student: torch.Tensor, teacher: torch.Tensor, name: str, options: DivergenceOptions):
    student = student.clone().requires_grad_()
    value = divergence_rows(
        student,
        teacher,
        divergence=name,
        temperature=options.temperature,
        teacher_temperature=options.teacher_temperature,
        skew_lambda=options.skew_lambda,
        adaptive_alpha=options.adaptive_alpha,
        js_beta=options.js_beta,
    )
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize(
    "options", [DivergenceOptions(), DivergenceOptions(2.0, 1.5, 0.0, 0.9, 0.2), DivergenceOptions(0.5, 1.0, 0.8)]
)
def test_value_and_gradient_equal_autograd_in_float64(divergence, options):
    student, teacher = random_logits()
    value, gradient = divergence_value_and_gradient(student, teacher, divergence=divergence, options=options)
    expected_value, expected_gradient = autograd(student, teacher, divergence, options)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("divergence", NAMES)
def test_value_and_gradient_in_float32_are_close_to_float64(divergence):
    student, teacher = random_logits()
    options = DivergenceOptions(temperature=2.0)
    value, gradient = divergence_value_and_gradient(
        student.float(), teacher.float(), divergence=divergence, options=options
    )
    expected_value, expected_gradient = autograd(student, teacher, divergence, options)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", [name for name in NAMES if name != "tvd"])
def test_value_agrees_with_finite_differences(divergence):
    # The adaptive weight is a constant by definition, so it is held at 1 here by an alpha that leaves the tail empty.
    student, teacher = random_logits(rows=1, vocabulary=6)
    options = DivergenceOptions(temperature=1.3, adaptive_alpha=0.0 if divergence == "adaptive_kl" else 0.5)
    _, gradient = divergence_value_and_gradient(student, teacher, divergence=divergence, options=options)
    step = 1e-6
    for column in range(6):
        shift = torch.zeros_like(student)
        shift[0, column] = step
        above, _ = divergence_value_and_gradient(student + shift, teacher, divergence=divergence, options=options)
        below, _ = divergence_value_and_gradient(student - shift, teacher, divergence=divergence, options=options)
        assert ((above - below) / (2 * step)).item() == pytest.approx(gradient[0, column].item(), abs=1e-8)


def test_gradient_of_forward_kl_is_the_difference_of_the_distributions_over_tau():
    student, teacher = random_logits()
    _, gradient = divergence_value_and_gradient(
        student, teacher, divergence="forward_kl", options=DivergenceOptions(temperature=2.0)
    )
    expected = (torch.softmax(student / 2.0, -1) - torch.softmax(teacher / 2.0, -1)) / 2.0
    torch.testing.assert_close(gradient, expected)


def test_gradient_of_cross_entropy_is_the_distribution_minus_one_hot():
    logits, _ = random_logits()
    targets = torch.tensor([0, 12, 3, 3, 7])
    value, gradient = cross_entropy_value_and_gradient(logits, targets)
    probabilities = torch.softmax(logits, -1)
    torch.testing.assert_close(value, -probabilities[range(5), targets].log())
    torch.testing.assert_close(gradient, probabilities - torch.nn.functional.one_hot(targets, 13))


@pytest.mark.parametrize("divergence", NAMES)
def test_gradient_of_every_row_sums_to_zero(divergence):
    student, teacher = random_logits()
    _, gradient = divergence_value_and_gradient(
        student, teacher, divergence=divergence, options=DivergenceOptions(temperature=2.0)
    )
    assert gradient.abs().max() > 1e-3
    assert gradient.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("divergence", NAMES)
def test_inputs_are_not_changed(divergence):
    student, teacher = random_logits()
    before = student.clone(), teacher.clone()
    divergence_value_and_gradient(student, teacher, divergence=divergence, options=DivergenceOptions())
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("skew_lambda", [0.0, 0.1])
def test_masked_columns_and_extreme_logits_give_finite_gradients(divergence, skew_lambda):
    student = torch.tensor([[1e4, -1e4, 0.0, -torch.inf], [0.0, 0.0, 0.0, -torch.inf]])
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -torch.inf], [1e4, 0.0, -1e4, -torch.inf]])
    value, gradient = divergence_value_and_gradient(
        student, teacher, divergence=divergence, options=DivergenceOptions(skew_lambda=skew_lambda)
    )
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[:, 3] == 0).all()
