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


def drawn(seed=6, rows=8, entries=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"student": (rows, 4), "head": (entries, 4), "teacher": (rows, 6), "teacher_head": (entries, 6)}
    shapes |= {"t2s": (rows, 4), "s2t": (rows, 6), "bias": (entries,), "teacher_bias": (entries,)}
    made = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made = {name: value.to(dtype).requires_grad_() for name, value in made.items()}
    return made | {"labels": torch.randint(0, entries, (rows,), generator=generator)}


def run_objective(name, t, *, with_biases=True, **more):
    models = [t[key] for key in ("student", "head", "teacher", "teacher_head")]
    biases = {"student_bias_V": t["bias"], "teacher_bias_V": t["teacher_bias"]} if with_biases else {}
    rest = (t["labels"], ONE, settings(len(t["head"]), alpha=0.3))
    if name == "vanilla":
        return vanilla_kd(*models, *rest, **biases)
    if name == "v1":
        return dual_space_v1(*models, t["t2s"], t["s2t"], *rest, **biases, **more)
    return dual_space_v2(*models, t["t2s"], t["s2t"], None, *rest, **biases, **more)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vanilla", {}),
        ("v1", {}),
        ("v1", {"mask": "gold"}),
        ("v1", {"mask": "agreement"}),
        ("v2", {}),
        ("v2", {"mask": "gold"}),
        ("v2", {"spaces": "student"}),
        ("v2", {"spaces": "teacher"}),
    ],
)
def test_a_bias_is_a_column_of_the_head_that_reads_a_one(name, more):
    """Of the student's and the projected states with the student's bias, of the teacher's and lifted with its own."""
    t = drawn()
    wide = {key: torch.cat([t[key], torch.ones(len(t[key]), 1)], 1) for key in ("student", "t2s", "teacher", "s2t")}
    wide["head"] = torch.cat([t["head"], t["bias"][:, None]], 1)
    wide["teacher_head"] = torch.cat([t["teacher_head"], t["teacher_bias"][:, None]], 1)
    found = run_objective(name, t, **more)
    expected = run_objective(name, wide | {"labels": t["labels"]}, with_biases=False, **more)
    torch.testing.assert_close(found.total, expected.total)
    for key in ("student", "head", "t2s", "s2t", "bias", "teacher", "teacher_bias"):
        own, other = (
            torch.autograd.grad(loss.total, t[key], retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for loss in (found, expected)
        )
        torch.testing.assert_close(own, other)
        assert (own.abs().sum() > 0) == (key in ("student", "head", "bias") or (key in own_graph(name, more)))


def own_graph(name, more):
    if name == "vanilla":
        return ()
    spaces = more.get("spaces", "both")
    return {"both": ("t2s", "s2t"), "student": ("t2s",), "teacher": ("s2t",)}[spaces]


@pytest.mark.parametrize("mask", ["none", "gold", "agreement"])
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_mask_picks_the_rows_of_the_student_space(name, mask):
    t = drawn(5)
    t["t2s"] = t["teacher"] @ teacher_to_student(t["head"].detach(), t["teacher_head"].detach())
    read = t["t2s"] @ t["head"].T
    gold, teacher = read.argmax(-1).clone(), (t["teacher"] @ t["teacher_head"].T).argmax(-1)
    gold[::3] = (gold[::3] + 1) % 9
    t["labels"] = gold
    q, p = (torch.log_softmax(logits / 2, -1) for logits in (t["student"] @ t["head"].T, read))
    rows = (p.exp() * (p - q)).sum(-1)
    kept = {"none": torch.ones(8).bool(), "gold": read.argmax(-1) == gold, "agreement": read.argmax(-1) == teacher}
    kept = kept[mask]
    assert (kept.sum() < 8) == (mask != "none")
    assert kept.sum() > 0
    loss = run_objective(name, t, with_biases=False, mask=mask)
    total, count = loss.parts["student_space"]
    # v1 keeps the divisor Z, v2 divides by the number of rows that count
    divisor = 1 if name == "v1" else kept.sum() if mask != "none" else 8
    torch.testing.assert_close(total / (1 if name == "v1" else count), rows[kept].sum() / divisor)
    if mask != "none":
        shown = loss.parts["t2s_accuracy" if mask == "gold" else "t2s_agreement"]
        assert [part.item() for part in shown] == [kept.sum().item(), 8]


@pytest.mark.parametrize("name", ["vanilla", "v1", "v2"])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
def test_a_bfloat16_teacher_gives_the_float32_loss_within_its_rounding(name, student):
    t = drawn(8)
    narrow = {
        key: value.detach().to(student if key in ("student", "head", "t2s", "bias") else torch.bfloat16)
        if value.is_floating_point()
        else value
        for key, value in t.items()
    }
    wide = {key: value.float() if value.is_floating_point() else value for key, value in narrow.items()}
    found, expected = run_objective(name, narrow).total, run_objective(name, wide).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
