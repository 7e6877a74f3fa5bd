"""Values of the divergences against worked numbers, slow loops and their mathematical properties."""

import math

import pytest
import torch
from tenfold.platform.losses.divergence import DIVERGENCES, DivergenceOptions, adaptive_weight, divergence_rows

NAMES = list(DIVERGENCES)


def logits_of(*probabilities: float, temperature: float = 2.0) -> torch.Tensor:
    """One row of logits whose softmax at this temperature is the given distribution."""
    return temperature * torch.tensor([probabilities], dtype=torch.float64).log()


def random_logits(rows: int = 6, vocabulary: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2.5 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return student, teacher


def slow_softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in logits]
    return [weight / sum(weights) for weight in weights]


def slow_kl(left: list[float], right: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(left, right, strict=True) if a > 0)


def slow_mixture(left: list[float], right: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(left, right, strict=True)]


def slow_adaptive_weight(q: list[float], p: list[float], alpha: float) -> float:
    seen = tail = head = 0.0
    for index in sorted(range(len(p)), key=lambda i: p[i]):
        seen += p[index]
        if seen <= alpha:
            tail += abs(p[index] - q[index])
        else:
            head += abs(p[index] - q[index])
    return head / (head + tail)


def slow_divergence(name: str, q: list[float], p: list[float], lam: float, alpha: float, beta: float) -> float:
    """The definitions, one row at a time in plain Python."""
    half = slow_mixture(p, q, 0.5)
    weight = slow_adaptive_weight(q, p, alpha)
    mixed = slow_mixture(q, p, beta)
    top = max(range(len(p)), key=lambda i: p[i])
    return {
        "forward_kl": slow_kl(p, q),
        "reverse_kl": slow_kl(q, p),
        "js_divergence": 0.5 * slow_kl(p, half) + 0.5 * slow_kl(q, half),
        "skewed_forward_kl": slow_kl(p, slow_mixture(p, q, lam)),
        "skewed_reverse_kl": slow_kl(q, slow_mixture(q, p, lam)),
        "adaptive_kl": weight * slow_kl(p, q) + (1 - weight) * slow_kl(q, p),
        "tvd": 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
        "jsd": beta * slow_kl(q, mixed) + (1 - beta) * slow_kl(p, mixed),
        "top1_ce": -p[top] * math.log(q[top]),
    }[name]


@pytest.mark.parametrize(
    ("divergence", "options", "expected"),
    [
        ("forward_kl", {}, 0.130812),
        ("reverse_kl", {}, 0.143841),
        ("js_divergence", {}, 0.033822),
        ("tvd", {}, 0.25),
        ("skewed_forward_kl", {"skew_lambda": 0.1}, 0.107043),
        ("skewed_reverse_kl", {"skew_lambda": 0.1}, 0.113137),
        ("adaptive_kl", {"adaptive_alpha": 0.5}, 0.137327),
        ("jsd", {"js_beta": 0.3}, 0.029002),
        ("top1_ce", {}, -0.75 * math.log(0.5)),
    ],
)
def test_two_token_example_gives_the_worked_number(divergence, options, expected):
    student, teacher = logits_of(0.5, 0.5), logits_of(0.75, 0.25)
    value = divergence_rows(student, teacher, divergence=divergence, temperature=2.0, **options)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "expected"), [("forward_kl", 0.277259), ("reverse_kl", 0.346574), ("adaptive_kl", 0.311916)]
)
def test_three_token_example_gives_the_worked_number(divergence, expected):
    student, teacher = logits_of(0.3, 0.3, 0.4), logits_of(0.6, 0.3, 0.1)
    value = divergence_rows(student, teacher, divergence=divergence, temperature=2.0)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("divergence", NAMES)
def test_values_equal_a_plain_python_loop(divergence):
    student, teacher = random_logits()
    options = {"skew_lambda": 0.3, "adaptive_alpha": 0.4, "js_beta": 0.7}
    values = divergence_rows(
        student, teacher, divergence=divergence, temperature=1.5, teacher_temperature=2.0, **options
    )
    for row in range(len(student)):
        q = slow_softmax(student[row].tolist(), 1.5)
        p = slow_softmax(teacher[row].tolist(), 3.0)
        assert values[row].item() == pytest.approx(slow_divergence(divergence, q, p, 0.3, 0.4, 0.7), abs=1e-12)


@pytest.mark.parametrize("divergence", [name for name in NAMES if name != "top1_ce"])
def test_divergence_is_positive_and_zero_only_for_logits_that_differ_by_a_constant_per_row(divergence):
    student, teacher = random_logits()
    shift = torch.arange(len(teacher), dtype=torch.float64).unsqueeze(-1)
    assert (divergence_rows(student, teacher, divergence=divergence) > 1e-3).all()
    same = divergence_rows(teacher + shift, teacher, divergence=divergence)
    assert same.abs().max() < 1e-12


@pytest.mark.parametrize("divergence", NAMES)
def test_a_constant_added_to_a_row_changes_nothing(divergence):
    student, teacher = random_logits()
    moved = divergence_rows(student + 3.0, teacher - 7.0, divergence=divergence)
    torch.testing.assert_close(moved, divergence_rows(student, teacher, divergence=divergence))


@pytest.mark.parametrize("divergence", NAMES)
def test_scaling_logits_and_temperature_alike_changes_nothing(divergence):
    student, teacher = random_logits()
    scaled = divergence_rows(3 * student, 3 * teacher, divergence=divergence, temperature=6.0)
    torch.testing.assert_close(scaled, divergence_rows(student, teacher, divergence=divergence, temperature=2.0))


def test_js_is_at_most_ln_2_and_tvd_at_most_1_for_disjoint_distributions():
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert divergence_rows(student, teacher, divergence="js_divergence").item() == pytest.approx(math.log(2))
    assert divergence_rows(student, teacher, divergence="tvd").item() == pytest.approx(1.0)


@pytest.mark.parametrize("divergence", ["js_divergence", "tvd"])
def test_js_and_tvd_are_symmetric(divergence):
    student, teacher = random_logits()
    forth = divergence_rows(student, teacher, divergence=divergence)
    torch.testing.assert_close(forth, divergence_rows(teacher, student, divergence=divergence))


@pytest.mark.parametrize(
    ("skewed", "plain"), [("skewed_forward_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")]
)
def test_skewed_kl_without_skew_is_the_plain_kl(skewed, plain):
    student, teacher = random_logits()
    value = divergence_rows(student, teacher, divergence=skewed, skew_lambda=0.0)
    torch.testing.assert_close(value, divergence_rows(student, teacher, divergence=plain))


def test_generalised_js_with_half_is_the_js_divergence():
    student, teacher = random_logits()
    value = divergence_rows(student, teacher, divergence="jsd", js_beta=0.5)
    torch.testing.assert_close(value, divergence_rows(student, teacher, divergence="js_divergence"))


def test_adaptive_kl_lies_between_forward_and_reverse_kl():
    student, teacher = random_logits(rows=50)
    forward = divergence_rows(student, teacher, divergence="forward_kl")
    reverse = divergence_rows(student, teacher, divergence="reverse_kl")
    adaptive = divergence_rows(student, teacher, divergence="adaptive_kl")
    assert (torch.minimum(forward, reverse) <= adaptive + 1e-12).all()
    assert (adaptive <= torch.maximum(forward, reverse) + 1e-12).all()


def test_adaptive_weight_of_equal_distributions_is_one_half():
    log_p = torch.log_softmax(torch.randn(3, 7, generator=torch.Generator().manual_seed(1)), -1)
    assert adaptive_weight(log_p, log_p, 0.5).tolist() == [0.5, 0.5, 0.5]


def test_adaptive_kl_of_equal_distributions_is_zero_with_a_finite_gradient():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    value = divergence_rows(logits, logits, divergence="adaptive_kl").sum()
    value.backward()
    assert value.item() == 0.0
    assert logits.grad.isfinite().all()


def test_no_gradient_reaches_the_teacher():
    student, teacher = (logits.requires_grad_() for logits in random_logits())
    for name in NAMES:
        divergence_rows(student, teacher, divergence=name).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", NAMES)
def test_columns_masked_in_both_logits_change_neither_value_nor_gradient(divergence):
    student, teacher = (logits.float() for logits in random_logits())
    kept = [0, 1, 2, 4, 5, 6, 7, 9, 10]
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, [3, 8]] = masked_teacher[:, [3, 8]] = -torch.inf
    masked_student.requires_grad_()
    cut_student = student[:, kept].clone().requires_grad_()

    value = divergence_rows(masked_student, masked_teacher, divergence=divergence)
    expected = divergence_rows(cut_student, teacher[:, kept], divergence=divergence)
    value.sum().backward()
    expected.sum().backward()

    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(masked_student.grad[:, kept], cut_student.grad)
    assert (masked_student.grad[:, [3, 8]] == 0).all()


@pytest.mark.parametrize("divergence", NAMES)
def test_extreme_logits_stay_finite(divergence):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]])
    value = divergence_rows(student, teacher, divergence=divergence)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("divergence", NAMES)
def test_bfloat16_logits_are_compared_in_float32(divergence):
    student, teacher = (logits.bfloat16() for logits in random_logits())
    value = divergence_rows(student, teacher, divergence=divergence)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence_rows(student.float(), teacher.float(), divergence=divergence))


@pytest.mark.parametrize(
    ("divergence", "changed"),
    [
        ("forward_kl", {"temperature": 3.0}),
        ("forward_kl", {"teacher_temperature": 3.0}),
        ("skewed_forward_kl", {"skew_lambda": 0.6}),
        ("skewed_reverse_kl", {"skew_lambda": 0.6}),
        ("adaptive_kl", {"adaptive_alpha": 0.1}),
        ("jsd", {"js_beta": 0.1}),
    ],
)
def test_every_option_changes_the_outcome(divergence, changed):
    student, teacher = random_logits()
    default = divergence_rows(student, teacher, divergence=divergence)
    assert not torch.allclose(default, divergence_rows(student, teacher, divergence=divergence, **changed), rtol=1e-3)


def test_leading_axes_are_kept():
    student, teacher = random_logits(rows=6)
    value = divergence_rows(student.view(2, 3, -1), teacher.view(2, 3, -1), divergence="forward_kl")
    assert value.shape == (2, 3)
    torch.testing.assert_close(value.flatten(), divergence_rows(student, teacher, divergence="forward_kl"))


@pytest.mark.parametrize("divergence", NAMES)
def test_no_rows_give_no_values(divergence):
    assert divergence_rows(torch.zeros(0, 5), torch.zeros(0, 5), divergence=divergence).shape == (0,)


@pytest.mark.parametrize("divergence", [name for name in NAMES if name != "top1_ce"])
def test_one_vocabulary_entry_gives_zero(divergence):
    value = divergence_rows(torch.ones(2, 1), torch.zeros(2, 1), divergence=divergence)
    assert value.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_unknown_divergence_is_refused_with_the_list_of_names():
    with pytest.raises(ValueError, match=r"'kl'.*forward_kl.*top1_ce"):
        divergence_rows(torch.zeros(1, 2), torch.zeros(1, 2), divergence="kl")


def test_different_vocabularies_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        divergence_rows(torch.zeros(1, 2), torch.zeros(1, 3), divergence="forward_kl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("teacher_temperature", -1.0),
        ("skew_lambda", 1.0),
        ("adaptive_alpha", 1.5),
        ("js_beta", 0.0),
    ],
)
def test_option_outside_its_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        DivergenceOptions(**{name: value})
