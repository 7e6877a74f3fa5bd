import warnings

import numpy as np
import pytest
import torch
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.positions import label_positions, next_labels

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "index": 4, "length": 3},
    {"input_ids": [8, 9], "labels": [-100, 9], "index": 2, "length": 2},
]


def test_rows_are_padded_on_the_right_to_the_longest():
    batch = CausalCollator(pad_token_id=1)(ROWS)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 1]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_real_token_equal_to_the_pad_token_stays_attended_and_labelled():
    batch = CausalCollator(pad_token_id=9)(ROWS)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][1].tolist() == [-100, 9, -100]


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (3, 3), (8, 8)])
def test_the_width_is_rounded_up_to_a_multiple(multiple, width):
    batch = CausalCollator(pad_token_id=0, pad_to_multiple_of=multiple)(ROWS)
    assert {tuple(value.shape) for value in batch.values()} == {(2, width)}


@pytest.mark.parametrize("convert", [list, np.asarray, lambda ids: np.asarray(ids, dtype=np.int32), torch.tensor])
def test_lists_arrays_and_tensors_give_the_same_batch(convert):
    rows = [{name: convert(row[name]) for name in ("input_ids", "labels")} for row in ROWS]
    found, expected = CausalCollator(pad_token_id=0)(rows), CausalCollator(pad_token_id=0)(ROWS)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_rows_of_a_data_set_are_collated():
    from datasets import Dataset

    batch = CausalCollator(pad_token_id=0, scalar=("index",))(list(Dataset.from_list(ROWS)))
    assert batch["index"].tolist() == [4, 2]


def test_ragged_columns_line_up_with_the_label_positions():
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "state": np.array([[2.0, 20.0], [4.0, 40.0]])},
        {
            "input_ids": [5, 6, 7, 8, 9],
            "labels": [-100, -100, 7, 8, 9],
            "state": np.array([[n, 10.0 * n] for n in (7.0, 8, 9)]),
        },
        {"input_ids": [3, 5], "labels": [-100, 5], "state": np.array([[5.0, 50.0]])},
    ]
    batch = CausalCollator(pad_token_id=0, ragged=("state",))(rows)
    labels = next_labels(batch["labels"])
    assert batch["state"].dtype == torch.float64
    assert batch["state"][:, 0].tolist() == labels.tolist() == [2, 4, 7, 8, 9, 5]
    assert len(batch["state"]) == label_positions(batch["labels"]).sum()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([[1.0], [2.0]], torch.float32),
        ([3, 4], torch.int64),
        (np.array([3, 4], dtype=np.int32), torch.int32),
        (torch.ones(2, 3, dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_ragged_columns_keep_their_dtype(value, dtype):
    assert CausalCollator(0, ragged=("x",))([{**ROWS[0], "x": value}])["x"].dtype == dtype


def test_read_only_arrays_are_taken_without_a_warning():
    states = np.ones((2, 3), dtype=np.float32)
    states.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CausalCollator(0, ragged=("x",))([{**ROWS[0], "x": states}])["x"].shape == (2, 3)


def test_a_ragged_column_of_the_wrong_length_is_refused():
    rows = [{**ROWS[0], "x": [1.0, 2.0]}, {**ROWS[1], "x": [1.0, 2.0]}]
    with pytest.raises(ValueError, match=r"x of row 1 of the batch has shape \[2\]; needs 1 entries"):
        CausalCollator(0, ragged=("x",))(rows)
    with pytest.raises(ValueError, match=r"x of row 0 of the batch has shape \[\]"):
        CausalCollator(0, ragged=("x",))([{**ROWS[0], "x": 1.0}])


def test_scalar_columns_become_vectors():
    rows = [{**ROWS[0], "weight": 0.5, "teacher": np.int64(3)}, {**ROWS[1], "weight": 2.0, "teacher": torch.tensor(4)}]
    batch = CausalCollator(0, scalar=("index", "weight", "teacher"))(rows)
    assert (batch["index"].tolist(), batch["index"].dtype) == ([4, 2], torch.int64)
    assert (batch["weight"].tolist(), batch["weight"].dtype) == ([0.5, 2.0], torch.float32)
    assert batch["teacher"].tolist() == [3, 4]


def test_a_scalar_column_with_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \[2\]; needs one number per row"):
        CausalCollator(0, scalar=("x",))([{**ROWS[0], "x": [1, 2]}])


def test_columns_that_are_not_named_are_left_out():
    assert set(CausalCollator(0)(ROWS)) == {"input_ids", "attention_mask", "labels"}


def test_padding_changes_neither_hidden_states_nor_their_order(tiny_llama):
    model = tiny_llama().eval()
    rows = [
        {"input_ids": list(range(3, 3 + size)), "labels": [-100, -100, *range(5, 3 + size)]} for size in (11, 4, 7)
    ]
    with torch.no_grad():
        batch = CausalCollator(pad_token_id=2, pad_to_multiple_of=16)(rows)
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        together = hidden[label_positions(batch["labels"])]
        alone = [CausalCollator(pad_token_id=0)([row]) for row in rows]
        apart = torch.cat(
            [model.base_model(one["input_ids"]).last_hidden_state[label_positions(one["labels"])] for one in alone]
        )
    assert torch.equal(next_labels(batch["labels"]), torch.cat([next_labels(one["labels"]) for one in alone]))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
