"""Which experts a row uses, which it may use, and how a classifier's scores are pooled."""

import pytest
import torch
from tenfold.methods.layermoe.routing import allowed_experts, pooled_scores, running_scores, top_k_routing


def reference(logits, k, allowed=None):
    """The same row by row, with exponentials of numbers."""
    rows = []
    for place, row in enumerate(logits.double()):
        usable = [e for e in range(len(row)) if allowed is None or bool(allowed[place, e])]
        total = sum(row[e].exp() for e in usable)
        chosen = sorted(usable, key=lambda e: -row[e])[:k]
        mass = {e: row[e].exp() / total for e in chosen}
        rows.append({e: float(mass[e] / sum(mass.values())) for e in chosen})
    return rows


def found(weights, experts):
    return [
        {int(e): float(w) for w, e in zip(*row, strict=True) if w > 0} for row in zip(weights, experts, strict=True)
    ]


def test_the_worked_example_of_three_experts():
    weights, experts = top_k_routing(torch.tensor([[1.0, 0.5, -1.0], [-2.0, 0.3, 0.4]]), 2)
    assert experts.tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(weights[0], torch.tensor([0.6225, 0.3775]), atol=5e-5, rtol=0)
    torch.testing.assert_close(weights[1], torch.tensor([0.5250, 0.4750]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_weights_are_the_softmax_renormalised_over_the_chosen(k):
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(found(*top_k_routing(logits, k)), reference(logits, k), strict=True):
        assert got == pytest.approx(expected, abs=1e-6)


def test_one_expert_a_row_has_weight_one():
    weights, _ = top_k_routing(torch.tensor([[3.0, 1.0]]), 1)
    assert weights.tolist() == [[1.0]]


def test_more_experts_are_asked_for_than_there_are():
    weights, experts = top_k_routing(torch.tensor([[1.0, 2.0]]), 6)
    assert experts.tolist() == [[1, 0]]
    assert float(weights.sum()) == pytest.approx(1)


def test_rows_use_only_what_they_may():
    logits = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(60) % 3
    allowed = allowed_experts(classes, [2, 3], 3)
    got = found(*top_k_routing(logits, 2, allowed))
    for place, (mine, expected) in enumerate(zip(got, reference(logits, 2, allowed), strict=True)):
        assert mine == pytest.approx(expected, abs=1e-6)
        assert len(mine) == (1 if classes[place] == 0 else 2)


def test_what_a_row_may_not_use_gets_no_gradient():
    logits = torch.tensor([[0.1, 3.0, 0.2, 0.4]], requires_grad=True)
    allowed = torch.tensor([[True, False, True, True]])
    weights, _ = top_k_routing(logits, 2, allowed)
    weights[0, 0].backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0
    assert logits.grad[0, 3] > 0


def test_half_precision_logits_are_routed_in_float32():
    logits = torch.tensor([[1.0, 0.5, -1.0]])
    weights, _ = top_k_routing(logits.bfloat16(), 2)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, top_k_routing(logits, 2)[0])


def test_two_classes_mean_the_original_ffn_or_all():
    assert allowed_experts(torch.tensor([0, 1]), [2, 1], 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("limits", [[1, 3, 6], [1, 3, 3, 6], [1, 3, 3, 6, 6]])
def test_class_g_may_use_expansions_up_to_g_and_the_last_class_all(limits):
    allowed = allowed_experts(torch.arange(len(limits)), [2, 0, 3], len(limits))
    assert allowed.sum(1).tolist() == limits
    assert allowed[:, 0].all()


def test_pooling_leaves_padding_out_on_either_side():
    scores = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [99.0, -99.0]], [[float("inf"), 7.0], [1.0, 1.0], [2.0, 4.0]]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert pooled_scores(scores, mask).tolist() == [[2.0, 1.0], [1.5, 2.5]]


def test_a_sequence_of_padding_alone_has_score_zero():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert pooled_scores(torch.ones(1, 3, 2), mask).tolist() == [[0.0, 0.0]]
    assert running_scores(torch.ones(1, 3, 2), mask)[0].eq(0).all()


def test_running_means_are_means_of_what_came_so_far():
    scores = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    means, _ = running_scores(scores, mask)
    for row in range(2):
        for end in range(6):
            real = scores[row, : end + 1][mask[row, : end + 1]]
            expected = real.double().mean(0) if len(real) else torch.zeros(3).double()
            torch.testing.assert_close(means[row, end], expected)


@pytest.mark.parametrize("cuts", [[6], [1, 5], [4, 1, 1], [1] * 6])
def test_a_text_in_pieces_has_the_running_means_of_the_whole(cuts):
    scores = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    before, parts = None, []
    for piece, real in zip(scores.split(cuts, 1), mask.split(cuts, 1), strict=True):
        part, before = running_scores(piece, real, before)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), running_scores(scores, mask)[0], rtol=0, atol=1e-15)


def test_the_last_running_mean_is_the_pooled_score():
    scores = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(running_scores(scores, None)[0][:, -1].float(), pooled_scores(scores, None))
