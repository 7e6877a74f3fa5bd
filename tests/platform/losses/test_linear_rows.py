"""Argmax and per-row cross entropy without gradient, against full logits."""

import pytest
import torch
from tenfold.platform.losses.fused_linear import (
    fused_linear_cross_entropy,
    linear_argmax,
    linear_cross_entropy_rows,
)
from torch.nn.functional import cross_entropy

ROWS, VOCABULARY, SIZE = 10, 23, 4
CHUNKS = [1, 3, ROWS, 512]


class Problem:
    """Random hidden states, head, bias and targets, some of them ignored; and all of it would take a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.hidden, self.head, self.bias = draw(ROWS, SIZE), draw(VOCABULARY, SIZE), draw(VOCABULARY)
        self.targets = torch.randint(0, 19, (ROWS,), generator=generator)
        self.targets[::3] = -100

    def logits(self) -> torch.Tensor:
        return self.hidden @ self.head.t() + self.bias


@pytest.mark.parametrize("chunk", CHUNKS)
def test_linear_argmax_equals_the_argmax_of_full_logits(chunk):
    problem = Problem()
    found = linear_argmax(problem.hidden, problem.head, bias=problem.bias, chunk=chunk)
    assert torch.equal(found, problem.logits().argmax(-1))
    assert not found.requires_grad


def test_linear_argmax_looks_at_the_first_columns_only():
    problem = Problem()
    found = linear_argmax(problem.hidden, problem.head, num_columns=5)
    logits = problem.hidden @ problem.head.t()
    assert torch.equal(found, logits[:, :5].argmax(-1))
    assert not torch.equal(found, logits.argmax(-1))


def test_linear_argmax_takes_the_lowest_index_among_equals():
    assert linear_argmax(torch.ones(2, 1), torch.tensor([[0.0], [1.0], [1.0]])).tolist() == [1, 1]


def test_linear_argmax_of_no_rows_is_empty():
    assert linear_argmax(torch.zeros(0, 3), torch.zeros(7, 3)).shape == (0,)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("num_columns", [None, VOCABULARY, 19])
def test_cross_entropy_rows_equal_full_logits(chunk, num_columns):
    problem = Problem()
    rows = linear_cross_entropy_rows(
        problem.hidden,
        problem.head,
        problem.targets,
        bias=problem.bias,
        num_columns=num_columns,
        chunk=chunk,
    )
    logits = problem.logits()[:, :num_columns]
    expected = cross_entropy(logits, problem.targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(rows, expected.detach())
    assert not rows.requires_grad
    assert not rows[problem.targets == -100].any()


def test_cross_entropy_rows_are_float32_for_bfloat16_inputs():
    problem = Problem(torch.bfloat16)
    rows = linear_cross_entropy_rows(problem.hidden, problem.head, problem.targets)
    summed = fused_linear_cross_entropy(problem.hidden, problem.head, problem.targets)
    assert rows.dtype == torch.float32
    assert rows.sum().item() == pytest.approx(summed.item(), rel=1e-5)
