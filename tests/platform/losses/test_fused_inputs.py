"""What the fused losses refuse, and what they say then."""

import pytest
import torch
from tenfold.platform.losses.fused_linear import (
    fused_linear_cross_entropy,
    fused_linear_divergence,
    linear_argmax,
    linear_cross_entropy_rows,
)

ROWS, VOCABULARY, STUDENT_SIZE, TEACHER_SIZE = 10, 23, 4, 6


def divergence_of_zeros(**changes):
    """Call the fused divergence with arguments that fit, except for the changes."""
    arguments = {
        "student_hidden": torch.zeros(ROWS, STUDENT_SIZE),
        "student_head": torch.zeros(VOCABULARY, STUDENT_SIZE),
        "teacher_hidden": torch.zeros(ROWS, TEACHER_SIZE),
        "teacher_head": torch.zeros(VOCABULARY, TEACHER_SIZE),
        "divergence": "forward_kl",
    }
    return fused_linear_divergence(**(arguments | changes))


def test_arguments_that_fit_are_accepted():
    assert divergence_of_zeros().item() == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, r"'kl'.*forward_kl"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"chunk": 0}, r"chunk is 0"),
        ({"num_columns": VOCABULARY + 1}, r"num_columns is 24.*\(23, 4\).*1\.\.23"),
        ({"num_columns": 0}, r"num_columns is 0"),
        ({"row_weight": torch.ones(3)}, r"row weights of the divergence.*\(3,\).*\(10, 4\).*10 weights"),
        ({"student_bias": torch.ones(3)}, r"student: the bias has shape \(3,\).*23 entries"),
        ({"teacher_bias": torch.ones(3)}, r"teacher: the bias has shape \(3,\)"),
        ({"teacher_head": torch.zeros(5, TEACHER_SIZE)}, r"\(23, 4\).*\(5, 6\).*vocabularies differ"),
        ({"teacher_head": torch.zeros(VOCABULARY, 9)}, r"teacher: hidden states.*\(10, 6\).*\(23, 9\)"),
        ({"teacher_hidden": torch.zeros(4, TEACHER_SIZE)}, r"\(10, 4\).*\(4, 6\).*same rows"),
        ({"student_hidden": torch.zeros(2, 5, STUDENT_SIZE)}, r"student: hidden states.*\(2, 5, 4\)"),
        ({"student_hidden": torch.zeros(ROWS, STUDENT_SIZE).double()}, r"torch\.float64, torch\.float32.*One dtype"),
        ({"student_head": torch.zeros(VOCABULARY)}, r"\(23,\).*\[vocabulary, hidden size\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_what_is_needed(changes, message):
    with pytest.raises(ValueError, match=message):
        divergence_of_zeros(**changes)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        linear_argmax(torch.zeros(2, 3).half(), torch.zeros(5, 3).half())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((ROWS,), VOCABULARY), r"23 is outside the vocabulary of 23"),
        (torch.full((ROWS,), -1), r"-1 is outside"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\).*\(10,\)"),
        (torch.zeros(ROWS), r"torch\.float32.*torch\.int64"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, message):
    hidden, head = torch.zeros(ROWS, STUDENT_SIZE), torch.zeros(VOCABULARY, STUDENT_SIZE)
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(hidden, head, targets)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_rows(hidden, head, targets)
