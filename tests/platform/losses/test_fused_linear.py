"""The fused losses against the same sums written with full logits and autograd."""

import pytest
import torch
from tenfold.platform.losses import chunked_rows
from tenfold.platform.losses.divergence import DIVERGENCES, divergence_rows
from tenfold.platform.losses.fused_linear import (
    fused_linear_cross_entropy,
    fused_linear_divergence,
    linear_argmax,
    linear_cross_entropy_rows,
)
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = list(DIVERGENCES)
ROWS, VOCABULARY, STUDENT_SIZE, TEACHER_SIZE = 10, 23, 4, 6
CHUNKS = [1, 3, ROWS, 512]


class Problem:
    """Random hidden states, heads, biases, weights and targets; the student's tensors require a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float64, rows: int = ROWS):
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.student_hidden = draw(rows, STUDENT_SIZE).requires_grad_()
        self.student_head = draw(VOCABULARY, STUDENT_SIZE).requires_grad_()
        self.student_bias = draw(VOCABULARY).requires_grad_()
        self.teacher_hidden = draw(rows, TEACHER_SIZE).requires_grad_()
        self.teacher_head = draw(VOCABULARY, TEACHER_SIZE).requires_grad_()
        self.teacher_bias = draw(VOCABULARY).requires_grad_()
        self.weight = torch.rand(rows, generator=generator, dtype=torch.float64)
        self.weight[1::4] = 0.0
        self.targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
        self.targets[::3] = -100

    @property
    def student(self) -> list[torch.Tensor]:
        return [self.student_hidden, self.student_head, self.student_bias]

    @property
    def teacher(self) -> list[torch.Tensor]:
        return [self.teacher_hidden, self.teacher_head, self.teacher_bias]

    def student_logits(self) -> torch.Tensor:
        return self.student_hidden @ self.student_head.t() + self.student_bias

    def teacher_logits(self) -> torch.Tensor:
        return self.teacher_hidden @ self.teacher_head.t() + self.teacher_bias

    def divergence(self, **options) -> torch.Tensor:
        biases = {"student_bias": self.student_bias, "teacher_bias": self.teacher_bias}
        return fused_linear_divergence(
            self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head, **(biases | options)
        )

    def cross_entropy(self, **options) -> torch.Tensor:
        return fused_linear_cross_entropy(
            self.student_hidden, self.student_head, self.targets, **({"bias": self.student_bias} | options)
        )


def assert_same_value_and_gradients(value, expected, tensors, rtol=1e-11, atol=1e-12):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)
    gradients = torch.autograd.grad(value, tensors)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, tensors), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=atol)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, forward or backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_fused_divergence_equals_full_logits_with_autograd(divergence, chunk):
    problem = Problem()
    options = {"temperature": 2.0, "teacher_temperature": 1.5, "skew_lambda": 0.2, "js_beta": 0.3}
    rows = divergence_rows(problem.student_logits(), problem.teacher_logits(), divergence=divergence, **options)
    value = problem.divergence(divergence=divergence, row_weight=problem.weight, chunk=chunk, **options)
    assert_same_value_and_gradients(value, (rows * problem.weight).sum(), problem.student)


@pytest.mark.parametrize("divergence", NAMES)
def test_float32_chunks_agree_to_1e_5(divergence):
    problem = Problem(torch.float32)
    whole = problem.divergence(divergence=divergence, temperature=2.0, chunk=ROWS)
    for chunk in (1, 3, 7):
        value = problem.divergence(divergence=divergence, temperature=2.0, chunk=chunk)
        assert value.dtype == torch.float32
        assert_same_value_and_gradients(value, whole, problem.student, rtol=1e-5, atol=1e-5)
        whole = problem.divergence(divergence=divergence, temperature=2.0, chunk=ROWS)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_fused_cross_entropy_equals_full_logits_with_autograd(chunk):
    problem = Problem()
    rows = cross_entropy(problem.student_logits(), problem.targets, reduction="none", ignore_index=-100)
    value = problem.cross_entropy(row_weight=problem.weight, chunk=chunk)
    assert_same_value_and_gradients(value, (rows * problem.weight).sum(), problem.student)


def test_gradcheck_of_the_fused_divergence():
    problem = Problem(rows=3)
    inputs = [tensor.detach().requires_grad_() for tensor in problem.student]

    def loss(hidden, head, bias):
        return fused_linear_divergence(
            hidden,
            head,
            problem.teacher_hidden,
            problem.teacher_head,
            divergence="js_divergence",
            student_bias=bias,
            chunk=2,
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_small_blocks_give_the_same_as_one_block(monkeypatch):
    problem = Problem()
    whole = problem.divergence(divergence="forward_kl", chunk=7)
    monkeypatch.setattr(chunked_rows, "_BLOCK_ELEMENTS_CPU", 2 * VOCABULARY)
    blocked = problem.divergence(divergence="forward_kl", chunk=7)
    assert_same_value_and_gradients(blocked, whole, problem.student)


def test_heads_without_bias():
    problem = Problem()
    value = problem.divergence(divergence="reverse_kl", student_bias=None, teacher_bias=None)
    student_logits = problem.student_hidden @ problem.student_head.t()
    teacher_logits = problem.teacher_hidden @ problem.teacher_head.t()
    expected = divergence_rows(student_logits, teacher_logits, divergence="reverse_kl").sum()
    assert_same_value_and_gradients(value, expected, problem.student[:2])


def test_nothing_on_the_teacher_side_gets_a_gradient():
    problem = Problem()
    problem.divergence(divergence="forward_kl").backward()
    assert [tensor.grad for tensor in problem.teacher] == [None, None, None]
    assert all(tensor.grad.abs().max() > 0 for tensor in problem.student)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_tensors_that_require_a_gradient_get_one(trained):
    problem = Problem()
    for index, tensor in enumerate(problem.student):
        tensor.requires_grad_(index == trained)
    rows = divergence_rows(problem.student_logits(), problem.teacher_logits(), divergence="forward_kl")
    value = problem.divergence(divergence="forward_kl")
    assert_same_value_and_gradients(value, rows.sum(), [problem.student[trained]])
    assert [tensor.requires_grad for tensor in problem.student].count(True) == 1


def test_rows_of_weight_zero_change_neither_value_nor_gradient():
    problem = Problem()
    value = problem.divergence(divergence="forward_kl", row_weight=problem.weight)
    gradients = torch.autograd.grad(value, problem.student)
    with torch.no_grad():
        problem.student_hidden[problem.weight == 0] = torch.nan
        problem.teacher_hidden[problem.weight == 0] = torch.inf
    changed = problem.divergence(divergence="forward_kl", row_weight=problem.weight)
    assert torch.equal(changed, value)
    for before, after in zip(gradients, torch.autograd.grad(changed, problem.student), strict=True):
        assert torch.equal(before, after)


def test_ignored_targets_change_neither_value_nor_gradient():
    problem = Problem()
    value = problem.cross_entropy()
    gradients = torch.autograd.grad(value, problem.student)
    with torch.no_grad():
        problem.student_hidden[problem.targets == -100] = torch.nan
    changed = problem.cross_entropy()
    assert torch.equal(changed, value)
    for before, after in zip(gradients, torch.autograd.grad(changed, problem.student), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_no_counted_row_gives_zero_with_zero_gradients(rows):
    problem = Problem(rows=rows)
    divergence = problem.divergence(divergence="adaptive_kl", row_weight=torch.zeros(rows))
    problem.targets.fill_(-100)
    for loss in (divergence, problem.cross_entropy()):
        assert loss.item() == 0.0
        for tensor, gradient in zip(problem.student, torch.autograd.grad(loss, problem.student), strict=True):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


def test_the_incoming_gradient_scales_the_gradients():
    problem = Problem()
    once = torch.autograd.grad(problem.divergence(divergence="forward_kl"), problem.student)
    scaled = torch.autograd.grad(-3.0 * problem.divergence(divergence="forward_kl"), problem.student)
    for left, right in zip(once, scaled, strict=True):
        torch.testing.assert_close(-3.0 * left, right)


def test_backward_twice_over_a_kept_graph_gives_the_same_gradient():
    problem = Problem()
    value = problem.divergence(divergence="forward_kl")
    first = torch.autograd.grad(value, problem.student, retain_graph=True)
    second = torch.autograd.grad(value, problem.student)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_heads_may_change_between_forward_and_backward():
    # Partitioned parameters are released after the forward pass.
    problem = Problem()
    expected = torch.autograd.grad(problem.divergence(divergence="forward_kl"), problem.student)
    value = problem.divergence(divergence="forward_kl")
    problem.student_head.data = torch.empty(0, dtype=torch.float64)
    hidden_gradient, bias_gradient = torch.autograd.grad(value, [problem.student_hidden, problem.student_bias])
    assert torch.equal(hidden_gradient, expected[0])
    assert torch.equal(bias_gradient, expected[2])


def test_without_gradient_mode_the_value_is_the_same_and_has_no_graph():
    problem = Problem()
    expected = problem.divergence(divergence="skewed_reverse_kl", row_weight=problem.weight)
    with torch.no_grad():
        value = problem.divergence(divergence="skewed_reverse_kl", row_weight=problem.weight)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())


def test_without_gradients_no_product_but_the_logits_is_computed():
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(func)
            return func(*args, **(kwargs or {}))

    problem = Problem()
    with torch.no_grad(), Products():
        problem.divergence(divergence="forward_kl", chunk=ROWS)
    assert len(products) == 2


@pytest.mark.parametrize("divergence", NAMES)
def test_bfloat16_is_close_to_float64_and_returns_bfloat16_gradients(divergence):
    exact, coarse = Problem(), Problem(torch.bfloat16)
    expected = torch.autograd.grad(exact.divergence(divergence=divergence, temperature=2.0), exact.student)
    value = coarse.divergence(divergence=divergence, temperature=2.0, chunk=4)
    gradients = torch.autograd.grad(value, coarse.student)
    assert value.dtype == torch.float32
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        similarity = torch.nn.functional.cosine_similarity(gradient.double().flatten(), wanted.flatten(), dim=0)
        assert similarity > 0.995


def test_bfloat16_head_gradient_of_many_chunks_is_accumulated_in_float32():
    # 600 equal contributions: summed in bfloat16 they would stop growing at 256 times the first.
    rows = 600
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    fused_linear_cross_entropy(hidden, head, torch.zeros(rows, dtype=torch.int64), chunk=1).backward()
    assert head.grad.flatten().tolist() == [-300.0, 300.0]


def test_student_and_teacher_may_differ_in_dtype():
    problem, coarse = Problem(torch.float32), Problem(torch.bfloat16)
    value = fused_linear_divergence(
        problem.student_hidden,
        problem.student_head,
        coarse.teacher_hidden,
        coarse.teacher_head,
        divergence="forward_kl",
    )
    logits = coarse.teacher_hidden @ coarse.teacher_head.t()
    expected = divergence_rows(problem.student_hidden @ problem.student_head.t(), logits, divergence="forward_kl")
    assert_same_value_and_gradients(value, expected.sum(), problem.student[:2], rtol=1e-5, atol=1e-5)


def test_autocast_takes_the_products_in_its_dtype():
    problem = Problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = problem.cross_entropy()
    rounded = [tensor.detach().bfloat16() for tensor in problem.student]
    expected = fused_linear_cross_entropy(rounded[0], rounded[1], problem.targets, bias=rounded[2])
    assert value.item() == expected.item()
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(value, problem.student))


def test_hidden_states_need_not_be_contiguous():
    problem = Problem()
    expected = torch.autograd.grad(problem.cross_entropy(chunk=3), problem.student)
    problem.student_hidden = problem.student_hidden.detach().t().contiguous().t().requires_grad_()
    gradients = torch.autograd.grad(problem.cross_entropy(chunk=3), problem.student)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("divergence", NAMES)
def test_num_columns_compares_the_common_prefix_of_heads_padded_to_different_widths(divergence):
    problem = Problem()
    student_logits, teacher_logits = problem.student_logits()[:, :17], problem.teacher_logits()[:, :17]
    expected = divergence_rows(student_logits, teacher_logits, divergence=divergence).sum()
    value = fused_linear_divergence(
        problem.student_hidden,
        problem.student_head,
        problem.teacher_hidden,
        problem.teacher_head[:20],
        divergence=divergence,
        student_bias=problem.student_bias,
        teacher_bias=problem.teacher_bias[:20],
        num_columns=17,
        chunk=4,
    )
    assert_same_value_and_gradients(value, expected, problem.student)


def test_no_tensor_of_all_rows_times_the_vocabulary_is_ever_made():
    rows, vocabulary, chunk = 64, 500, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 4, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, 4, generator=generator, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    with LargestTensor() as largest:
        for name in NAMES:
            fused_linear_divergence(hidden, head, hidden, head, divergence=name, chunk=chunk).backward()
        fused_linear_cross_entropy(hidden, head, targets, chunk=chunk).backward()
        linear_argmax(hidden, head, chunk=chunk)
        linear_cross_entropy_rows(hidden, head, targets, chunk=chunk)
    assert largest.elements == chunk * vocabulary


def test_full_logits_would_be_noticed_by_the_memory_check():
    with LargestTensor() as largest:
        (torch.zeros(64, 4) @ torch.zeros(500, 4).t()).softmax(-1)
    assert largest.elements == 64 * 500


def test_cross_entropy_normalises_over_the_first_columns_only():
    problem = Problem()
    problem.targets.clamp_(max=18)
    logits = problem.student_logits()[:, :19]
    expected = cross_entropy(logits, problem.targets, reduction="sum", ignore_index=-100)
    assert_same_value_and_gradients(problem.cross_entropy(num_columns=19), expected, problem.student)
