import pytest
import torch
from tenfold.platform.data.positions import label_positions, next_labels


def slow(labels):
    """List (row, position, label) one by one, in row-major order."""
    return [
        (row, position, labels[row][position + 1])
        for row in range(len(labels))
        for position in range(len(labels[row]) - 1)
        if labels[row][position + 1] != -100
    ]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_positions_and_labels_are_those_of_a_slow_loop_in_row_major_order(share):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 50, (4, 9), generator=generator)
    labels[torch.rand(4, 9, generator=generator) >= share] = -100
    expected = slow(labels.tolist())
    mask = label_positions(labels)
    assert mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[row, position] for row, position, _ in expected]
    assert next_labels(labels).tolist() == [label for _, _, label in expected]
    hidden = torch.arange(36).view(4, 9, 1)
    assert hidden[mask].flatten().tolist() == [9 * row + position for row, position, _ in expected]


def test_a_label_at_the_first_position_is_predicted_by_none():
    labels = torch.tensor([[7, -100, 8]])
    assert label_positions(labels).tolist() == [[False, True, False]]
    assert next_labels(labels).tolist() == [8]


def test_single_tokens_have_no_positions():
    labels = torch.tensor([[7], [8]])
    assert not label_positions(labels).any()
    assert next_labels(labels).shape == (0,)


def test_the_selected_rows_give_the_models_own_loss(tiny_llama):
    model = tiny_llama()
    ids = torch.arange(24).view(2, 12) * 5
    labels = ids.clone()
    labels[0, :6], labels[1, 9:] = -100, -100
    output = model(input_ids=ids, labels=labels)
    rows = output.logits[label_positions(labels)]
    assert torch.nn.functional.cross_entropy(rows, next_labels(labels)).item() == pytest.approx(output.loss.item())
