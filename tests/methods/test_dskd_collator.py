"""Batches of two tokenizers: pairs count the label positions of the batch, whatever the rows' lengths."""

import pytest
import torch
from tenfold.methods.dskd.collator import TeachingCollator

IGNORED = -100


def row(prompt, response, their_prompt, their_response, **more):
    return {
        "input_ids": prompt + response,
        "labels": [IGNORED] * len(prompt) + response,
        "teacher_input_ids": their_prompt + their_response,
        "teacher_labels": [IGNORED] * len(their_prompt) + their_response,
        **more,
    }


@pytest.fixture
def rows():
    first = row([1, 2], [3, 4, 5], [11], [12, 13])
    second = row([1], [6, 7], [11, 11, 11], [14, 15, 16])
    pairs = [([0, 2], [0, 1]), ([1], [2])]
    for each, (own, theirs) in zip((first, second), pairs, strict=True):
        each |= {"student_pairs": torch.tensor(own), "teacher_pairs": torch.tensor(theirs)}
        each["teacher_hidden"] = torch.tensor([[float(token)] for token in each["teacher_labels"] if token > 0])
    return [first, second]


def test_pairs_point_to_the_same_tokens_as_before(rows):
    batch = TeachingCollator(0, 9)(rows)
    labels = batch["labels"][:, 1:]
    theirs = batch["teacher_labels"][:, 1:]
    assert labels[labels != IGNORED][batch["student_pairs"]].tolist() == [3, 5, 7]
    assert theirs[theirs != IGNORED][batch["teacher_pairs"]].tolist() == [12, 13, 16]
    assert batch["teacher_hidden"].flatten()[batch["teacher_pairs"]].tolist() == [12.0, 13.0, 16.0]


def test_each_side_is_padded_with_its_own_token(rows):
    batch = TeachingCollator(0, 9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 6, 7, 0, 0]]
    assert batch["teacher_input_ids"].tolist() == [[11, 12, 13, 9, 9, 9], [11, 11, 11, 14, 15, 16]]
    assert batch["teacher_attention_mask"].sum(1).tolist() == [3, 6]


def test_positions_without_a_counterpart_stay_marked(rows):
    for each, positions in zip(rows, ([0, -1, 1], [-1, 0]), strict=True):
        del each["student_pairs"], each["teacher_pairs"]
        each["teacher_position"] = torch.tensor(positions)
    assert TeachingCollator(0, 9)(rows)["teacher_position"].tolist() == [0, -1, 1, -1, 2]


def test_a_row_that_the_teacher_has_no_label_for_teaches_nothing(rows):
    rows[0] |= {"teacher_labels": [IGNORED] * 3, "teacher_hidden": torch.zeros(0, 1)}
    rows[0] |= {"student_pairs": torch.zeros(0, dtype=torch.int64), "teacher_pairs": torch.zeros(0, dtype=torch.int64)}
    batch = TeachingCollator(0, 9)(rows)
    assert batch["teacher_hidden"].flatten().tolist() == [14.0, 15.0, 16.0]
    assert batch["teacher_pairs"].tolist() == [2]
    assert batch["student_pairs"].tolist() == [4]
