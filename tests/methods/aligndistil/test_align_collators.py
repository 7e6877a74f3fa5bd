import torch
from tenfold.methods.aligndistil.collators import PairCollator, SingleCollator, mismatched_row
from tenfold.platform.data.positions import label_positions

PAD = 9
FIRST = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "desirable": True, "length": 4, "index": 0}
SECOND = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "desirable": False, "length": 3, "index": 1}
THIRD = {"input_ids": [8, 8, 8, 4], "labels": [-100, -100, -100, 4], "desirable": True, "length": 4, "index": 2}


def pair(chosen, rejected):
    return {
        "input_ids": chosen["input_ids"],
        "labels": chosen["labels"],
        "rejected_input_ids": rejected["input_ids"],
        "rejected_labels": rejected["labels"],
        "length": 4,
        "index": 0,
    }


def test_chosen_rows_come_before_the_rejected_rows_of_the_same_pairs():
    batch = PairCollator(PAD)([pair(FIRST, SECOND), pair(SECOND, THIRD)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, PAD], [5, 6, 7, PAD], [8, 8, 8, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [
        [-100, -100, 3, 4],
        [-100, 6, 7, -100],
        [-100, 6, 7, -100],
        [-100, -100, -100, 4],
    ]


def test_a_pair_is_padded_to_the_longer_of_all_answers():
    batch = PairCollator(PAD)([pair(SECOND, FIRST)])
    assert batch["input_ids"].shape == (2, 4)


def test_a_padding_token_inside_a_row_stays_visible():
    row = {"input_ids": [1, PAD, PAD], "labels": [-100, PAD, PAD]}
    batch = PairCollator(PAD)([pair(row, FIRST)])
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0]
    assert batch["labels"][0].tolist() == [-100, PAD, PAD, -100]


def test_scored_positions_are_those_of_the_papers_example():
    """ids = [p p p y1 y2 EOS pad]: the positions 2, 3, 4 predict the response, none other."""
    row = {"input_ids": [1, 1, 1, 2, 3, 4], "labels": [-100, -100, -100, 2, 3, 4]}
    longer = {"input_ids": [1] * 7, "labels": [-100] * 6 + [1]}
    batch = PairCollator(PAD)([pair(row, longer)])
    assert label_positions(batch["labels"])[0].nonzero().flatten().tolist() == [2, 3, 4]


def test_single_answers_carry_whether_they_are_good():
    batch = SingleCollator(PAD, mismatched=False)([FIRST, SECOND])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "desirable"}
    assert batch["desirable"].dtype == torch.bool
    assert batch["desirable"].tolist() == [True, False]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, PAD]]


def test_mismatched_rows_are_prompts_with_the_next_rows_answer():
    batch = SingleCollator(PAD, mismatched=True)([FIRST, SECOND, THIRD])
    assert batch["mismatched_input_ids"].tolist() == [[1, 2, 6, 7, PAD], [5, 4, PAD, PAD, PAD], [8, 8, 8, 3, 4]]
    assert batch["mismatched_attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["mismatched_labels"].tolist() == [
        [-100, -100, 6, 7, -100],
        [-100, 4, -100, -100, -100],
        [-100, -100, -100, 3, 4],
    ]
    assert (
        batch["input_ids"].tolist()
        == SingleCollator(PAD, mismatched=False)([FIRST, SECOND, THIRD])["input_ids"].tolist()
    )


def test_mismatched_rows_are_cut_at_the_longest_length():
    batch = SingleCollator(PAD, mismatched=True, max_length=4)([FIRST, SECOND, THIRD])
    assert batch["mismatched_input_ids"].tolist() == [[1, 2, 6, 7], [5, 4, PAD, PAD], [8, 8, 8, 3]]


def test_one_row_alone_keeps_its_own_answer():
    assert mismatched_row(FIRST, FIRST) == {"input_ids": FIRST["input_ids"], "labels": FIRST["labels"]}
    batch = SingleCollator(PAD, mismatched=True)([FIRST])
    assert torch.equal(batch["mismatched_input_ids"], batch["input_ids"])
