"""DSKD's objectives against worked numbers and invariants (arXiv 2406.17328, 2504.11426)."""

import pytest
import torch
from tenfold.methods.dskd.objective import LossSettings, dual_space_v1, dual_space_v2, vanilla_kd
from tenfold.methods.dskd.projectors import student_to_teacher, teacher_to_student
from tenfold.platform.losses.divergence import DivergenceOptions

ONE = torch.tensor(1.0)


def settings(columns, divergence="forward_kl", tau=2.0, alpha=0.5):
    return LossSettings(divergence, DivergenceOptions(temperature=tau), alpha, columns, 512)


def test_v2_tiny_worked_example():
    student_head = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    teacher_head = torch.eye(3)
    P, S = teacher_to_student(student_head, teacher_head), student_to_teacher(student_head, teacher_head)
    torch.testing.assert_close(P, torch.tensor([[2.0, -1], [-1, 2], [1, 1]]).double() / 3)
    torch.testing.assert_close(S, torch.tensor([[1.0, 0, 1], [0, 1, 1]]).double())
    hidden, teacher = torch.tensor([[1.0, 0]]), torch.tensor([[3.0, 0, 0]])
    loss = dual_space_v2(
        hidden, student_head, teacher, teacher_head, teacher @ P.float(), hidden @ S.float(),
        torch.tensor([0]), torch.tensor([0]), ONE, settings(3),
    )  # fmt: skip
    parts = {name: (total / count).item() for name, (total, count) in loss.parts.items()}
    assert parts["ce"] == pytest.approx(0.861995, abs=1e-5)
    assert parts["t2s_ce"] == pytest.approx(0.349012, abs=1e-5)
    assert parts["student_space"] == pytest.approx(0.066188, abs=1e-5)
    assert parts["teacher_space"] == pytest.approx(0.203337, abs=1e-5)
    assert loss.total.item() == pytest.approx(0.740266, abs=1e-5)


def test_pseudo_inverse_projectors_solve_the_normal_equations():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(60, 6, generator=generator), torch.randn(60, 9, generator=generator)
    A_s, A_t = student.double().T, teacher.double().T
    P, S = teacher_to_student(student, teacher), student_to_teacher(student, teacher)
    torch.testing.assert_close(P, A_t @ torch.linalg.pinv(A_s))
    torch.testing.assert_close(S, A_s @ torch.linalg.pinv(A_t))
    assert ((P @ A_s - A_t) @ A_s.T).abs().max() < 1e-8
    assert ((S @ A_t - A_s) @ A_t.T).abs().max() < 1e-8


def test_rank_deficient_head_falls_back_to_the_pseudo_inverse():
    head = torch.ones(5, 3)
    other = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = other.double().T @ torch.linalg.pinv(head.double().T)
    torch.testing.assert_close(teacher_to_student(head, other), expected)


def test_the_same_model_twice_gives_identity_projectors():
    head = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher_to_student(head, head), torch.eye(7).double())
    torch.testing.assert_close(student_to_teacher(head, head), torch.eye(7).double())


def test_v1_with_identity_projectors_and_one_head_is_vanilla_kd():
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(11, 5, generator=generator)
    student, teacher = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    labels = torch.tensor([1, 2, 3, 4])
    v1 = dual_space_v1(student, head, teacher, head, teacher, student, labels, ONE, settings(11)).parts
    kd = vanilla_kd(student, head, teacher, head, labels, ONE, settings(11)).parts["kd"][0]
    torch.testing.assert_close(v1["student_space"][0], kd)
    torch.testing.assert_close(v1["teacher_space"][0], kd)


def test_the_teachers_projection_gets_gradient_from_its_cross_entropy_alone():
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(11, 5, generator=generator, requires_grad=True)
    student = torch.randn(4, 5, generator=generator, requires_grad=True)
    teacher = torch.randn(4, 8, generator=generator, requires_grad=True)
    teacher_head = torch.randn(11, 8, generator=generator, requires_grad=True)
    projected = torch.randn(4, 5, generator=generator, requires_grad=True)
    lifted = torch.randn(4, 8, generator=generator, requires_grad=True)
    labels = torch.tensor([1, 2, 3, 4])
    loss = dual_space_v1(student, head, teacher, teacher_head, projected, lifted, labels, ONE, settings(11))
    loss.total.backward()
    q = torch.softmax(projected.detach() @ head.detach().T, -1) - torch.nn.functional.one_hot(labels, 11)
    torch.testing.assert_close(projected.grad, 0.5 * q @ head.detach(), rtol=1e-4, atol=1e-5)
    assert teacher.grad is None or not teacher.grad.any()
    assert teacher_head.grad is None or not teacher_head.grad.any()
    assert lifted.grad.abs().sum() > 0


def test_v2_counts_only_agreeing_tokens():
    generator = torch.Generator().manual_seed(5)
    head, teacher_head = torch.randn(9, 4, generator=generator), torch.randn(9, 6, generator=generator)
    student, teacher = torch.randn(8, 4, generator=generator), torch.randn(8, 6, generator=generator)
    projected = teacher @ teacher_to_student(head, teacher_head).float()
    lifted = student @ student_to_teacher(head, teacher_head).float()
    predicted, labels = (teacher @ teacher_head.T).argmax(-1), torch.arange(8)
    loss = dual_space_v2(student, head, teacher, teacher_head, projected, lifted, predicted, labels, ONE, settings(9))
    own = torch.log_softmax(student @ head.T / 2, -1)
    target = torch.log_softmax(projected @ head.T / 2, -1)
    agree = (projected @ head.T).argmax(-1) == predicted
    assert 0 < agree.sum() < 8
    expected = (target.exp() * (target - own)).sum(-1)[agree].mean()
    total, count = loss.parts["student_space"]
    torch.testing.assert_close(total / count, expected, rtol=1e-4, atol=1e-5)


def test_no_agreeing_token_gives_zero_in_the_student_space_and_a_graph():
    head = torch.eye(3)
    student = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.tensor([[3.0, 0, 0], [3.0, 0, 0]])
    loss = dual_space_v2(
        student, head, teacher, head, teacher, student, torch.tensor([1, 1]), torch.tensor([0, 0]), ONE, settings(3)
    )
    assert loss.parts["student_space"][0].item() == 0
    loss.total.backward()
    assert torch.isfinite(student.grad).all()
