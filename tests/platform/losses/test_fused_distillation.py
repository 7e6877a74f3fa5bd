"""Divergence and cross entropies of the same logits in one pass."""

import pytest
import torch
from tenfold.platform.losses.divergence import DIVERGENCES, DivergenceOptions, divergence_rows
from tenfold.platform.losses.fused_linear import fused_linear_distillation
from torch.nn.functional import cross_entropy

ROWS, VOCABULARY, SIZE = 11, 19, 5
CHUNKS = [1, 4, ROWS, 512]


class Problem:
    """A student, a projected teacher that is trained too, targets for both, and weights with zeros in places."""

    def __init__(self, rows: int = ROWS):
        generator = torch.Generator().manual_seed(11)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.student_hidden, self.teacher_hidden = draw(rows, SIZE), draw(rows, SIZE)
        self.student_head, self.teacher_head = draw(VOCABULARY, SIZE), draw(VOCABULARY, SIZE)
        self.student_bias, self.teacher_bias = draw(VOCABULARY), draw(VOCABULARY)
        weights = torch.rand(3, rows, generator=generator, dtype=torch.float64)
        weights[0, ::2] = 0.0
        weights[:, 1:2] = 0.0
        self.divergence_weight, self.target_weight, self.teacher_target_weight = weights
        self.targets, self.teacher_targets = torch.randint(0, VOCABULARY, (2, rows), generator=generator)
        self.targets[3:4] = -100
        self.teacher_targets[3:5] = -100

    def fused(self, **changes):
        options = {
            "divergence": "forward_kl",
            "divergence_weight": self.divergence_weight,
            "targets": self.targets,
            "target_weight": self.target_weight,
            "teacher_targets": self.teacher_targets,
            "teacher_target_weight": self.teacher_target_weight,
            "student_bias": self.student_bias,
            "teacher_bias": self.teacher_bias,
        }
        return fused_linear_distillation(
            self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head, **(options | changes)
        )

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        student = self.student_hidden @ self.student_head.t() + self.student_bias
        teacher = self.teacher_hidden @ self.teacher_head.detach().t() + self.teacher_bias.detach()
        return student, teacher

    def plain(self, divergence: str, columns: int = VOCABULARY, **options) -> tuple[torch.Tensor, ...]:
        student, teacher = self.logits()
        rows = divergence_rows(student[:, :columns], teacher[:, :columns], divergence=divergence, **options)
        return (
            (rows * self.divergence_weight).sum(),
            (cross_entropy(student, self.targets, reduction="none") * self.target_weight).sum(),
            (cross_entropy(teacher, self.teacher_targets, reduction="none") * self.teacher_target_weight).sum(),
        )

    @property
    def trained(self) -> list[torch.Tensor]:
        return [self.student_hidden, self.student_head, self.student_bias, self.teacher_hidden]


def assert_same_gradients(value, expected, tensors):
    gradients = torch.autograd.grad(value, tensors)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, tensors), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
@pytest.mark.parametrize("chunk", CHUNKS)
def test_one_pass_equals_three_losses_of_full_logits(divergence, chunk):
    problem = Problem()
    sums = problem.fused(divergence=divergence, options=DivergenceOptions(temperature=2.0), chunk=chunk)
    parts = problem.plain(divergence, temperature=2.0)
    found = (sums.divergence, sums.cross_entropy, sums.teacher_cross_entropy)
    for part, wanted in zip(found, parts, strict=True):
        torch.testing.assert_close(part, wanted.detach())
        assert not part.requires_grad
    torch.testing.assert_close(sums.total, sum(parts))
    assert_same_gradients(sums.total, sum(parts), problem.trained)


@pytest.mark.parametrize("split", [1, 4, 10])
def test_sums_of_two_parts_of_a_batch_add_up_to_the_whole(split):
    problem = Problem()
    whole = problem.fused(divergence="adaptive_kl")
    gradients = torch.autograd.grad(whole.total, problem.trained)
    total, summed = 0.0, [torch.zeros_like(gradient) for gradient in gradients]
    for part in (slice(0, split), slice(split, ROWS)):
        piece = Problem()
        for name in ("student_hidden", "teacher_hidden"):
            setattr(piece, name, getattr(problem, name)[part])
        for name in ("student_head", "student_bias", "teacher_head", "teacher_bias"):
            setattr(piece, name, getattr(problem, name))
        for name in ("divergence_weight", "target_weight", "teacher_target_weight", "targets", "teacher_targets"):
            setattr(piece, name, getattr(problem, name)[part])
        loss = piece.fused(divergence="adaptive_kl").total
        total += loss.item()
        for sum_, gradient in zip(summed, torch.autograd.grad(loss, problem.trained), strict=True):
            sum_ += gradient
    assert total == pytest.approx(whole.total.item(), rel=1e-12)
    for sum_, gradient in zip(summed, gradients, strict=True):
        torch.testing.assert_close(sum_, gradient)


def test_the_divergence_gives_no_gradient_to_the_teacher_side():
    problem = Problem()
    everything = torch.autograd.grad(problem.fused().total, problem.teacher_hidden)[0]
    only_cross_entropy = torch.autograd.grad(
        problem.fused(divergence_weight=torch.zeros(ROWS), target_weight=torch.zeros(ROWS)).total,
        problem.teacher_hidden,
    )[0]
    torch.testing.assert_close(everything, only_cross_entropy)
    problem.fused().total.backward()
    assert problem.teacher_head.grad is None
    assert problem.teacher_bias.grad is None


def test_without_teacher_targets_the_teacher_side_is_a_constant():
    problem = Problem()
    sums = problem.fused(teacher_targets=None, teacher_target_weight=None)
    parts = problem.plain("forward_kl")
    assert sums.teacher_cross_entropy.item() == 0.0
    assert_same_gradients(sums.total, parts[0] + parts[1], problem.trained[:3])
    problem.fused(teacher_targets=None, teacher_target_weight=None).total.backward()
    assert problem.teacher_hidden.grad is None


def test_a_shared_head_learns_from_the_student_side_alone():
    problem = Problem()
    problem.teacher_head, problem.teacher_bias = problem.student_head, problem.student_bias
    sums = problem.fused(teacher_targets=problem.teacher_targets)
    assert_same_gradients(sums.total, sum(problem.plain("forward_kl")), problem.trained)


def test_num_columns_cuts_the_divergence_and_leaves_the_cross_entropies_whole():
    problem = Problem()
    sums = problem.fused(num_columns=13, chunk=4)
    parts = problem.plain("forward_kl", columns=13)
    torch.testing.assert_close(sums.total, sum(parts))
    assert_same_gradients(sums.total, sum(parts), problem.trained)


def test_a_frozen_student_still_trains_the_projected_teacher():
    problem = Problem()
    for tensor in problem.trained[:3]:
        tensor.requires_grad_(False)
    sums = problem.fused()
    assert_same_gradients(sums.total, sum(problem.plain("forward_kl")), [problem.teacher_hidden])


def test_predictions_are_the_teachers_and_ignored_where_a_row_has_no_weight():
    problem = Problem()
    sums = problem.fused(predict=True, chunk=3)
    expected = problem.logits()[1].argmax(-1)
    expected[1] = -100
    assert sums.teacher_prediction.tolist() == expected.tolist()
    assert problem.fused().teacher_prediction is None


def test_predictions_stay_within_the_compared_columns():
    problem = Problem()
    sums = problem.fused(predict=True, num_columns=3, divergence_weight=None)
    assert torch.equal(sums.teacher_prediction, problem.logits()[1][:, :3].argmax(-1))


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_no_counted_row_gives_zero_with_zero_gradients(rows):
    problem = Problem(rows)
    nothing = torch.zeros(rows)
    weights = {"divergence_weight": nothing, "target_weight": nothing, "teacher_target_weight": nothing}
    sums = problem.fused(predict=True, **weights)
    assert sums.total.item() == sums.divergence.item() == sums.cross_entropy.item() == 0.0
    assert sums.teacher_prediction.tolist() == [-100] * rows
    for tensor, gradient in zip(problem.trained, torch.autograd.grad(sums.total, problem.trained), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_without_gradient_mode_the_sums_are_the_same_and_have_no_graph():
    problem = Problem()
    expected = problem.fused(predict=True)
    with torch.no_grad():
        sums = problem.fused(predict=True)
    assert not sums.total.requires_grad
    torch.testing.assert_close(sums.total, expected.total.detach())
    assert torch.equal(sums.teacher_prediction, expected.teacher_prediction)


def test_dual_space_example_gives_the_worked_numbers():
    # One token, W_s = [[1,0],[0,1],[1,1]], W_t = I, h_t = (3,0,0), h_s = (1,0), gold 0, tau 2, forward KL.
    student_head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    teacher_head = torch.eye(3)
    projector = torch.tensor([[2.0, -1.0], [-1.0, 2.0], [1.0, 1.0]]) / 3
    student_to_teacher = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    teacher_hidden = torch.tensor([[3.0, 0.0, 0.0]])
    student_hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    options = DivergenceOptions(temperature=2.0)

    teacher_space = fused_linear_distillation(
        student_hidden @ student_to_teacher,
        teacher_head,
        teacher_hidden,
        teacher_head,
        divergence="forward_kl",
        options=options,
        predict=True,
    )
    student_space = fused_linear_distillation(
        student_hidden,
        student_head,
        teacher_hidden @ projector,
        student_head,
        divergence="forward_kl",
        options=options,
        targets=torch.tensor([0]),
        teacher_targets=teacher_space.teacher_prediction,
    )
    assert teacher_space.teacher_prediction.tolist() == [0]
    assert teacher_space.divergence.item() == pytest.approx(0.203337, abs=1e-6)
    assert student_space.divergence.item() == pytest.approx(0.066188, abs=1e-6)
    assert student_space.cross_entropy.item() == pytest.approx(0.861995, abs=1e-6)
    assert student_space.teacher_cross_entropy.item() == pytest.approx(0.349012, abs=1e-6)
    distillation = student_space.divergence + student_space.teacher_cross_entropy + teacher_space.divergence
    assert (0.5 * student_space.cross_entropy + 0.5 * distillation).item() == pytest.approx(0.740266, abs=1e-6)


def test_equal_models_give_the_plain_divergence_in_both_spaces():
    # d = D, identity projectors, W_s = W_t: student space = teacher space = plain distillation.
    problem = Problem()
    head = problem.teacher_head.detach()
    student, teacher = problem.student_hidden @ head.t(), problem.teacher_hidden @ head.t()
    expected = divergence_rows(student, teacher, divergence="forward_kl", temperature=2.0).sum()
    sums = fused_linear_distillation(
        problem.student_hidden,
        head,
        problem.teacher_hidden,
        head,
        divergence="forward_kl",
        options=DivergenceOptions(temperature=2.0),
    )
    torch.testing.assert_close(sums.total, expected)
    assert sums.total.item() == sums.divergence.item()


def test_targets_outside_the_vocabulary_are_refused_by_name():
    problem = Problem()
    with pytest.raises(ValueError, match=r"^targets: 19 is outside"):
        problem.fused(targets=torch.full((ROWS,), VOCABULARY))
    with pytest.raises(ValueError, match=r"^teacher_targets: -5 is outside"):
        problem.fused(teacher_targets=torch.full((ROWS,), -5))


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("divergence_weight", "the divergence"),
        ("target_weight", "targets"),
        ("teacher_target_weight", "teacher_targets"),
    ],
)
def test_weights_of_another_length_are_refused(name, term):
    with pytest.raises(ValueError, match=rf"weights of {term} have shape \(4,\).*11 weights"):
        Problem().fused(**{name: torch.ones(4)})
