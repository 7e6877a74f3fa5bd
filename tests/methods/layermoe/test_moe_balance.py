"""Load balance: worked numbers of the specification, its bounds, and a slow reference."""

import pytest
import torch
from tenfold.methods.layermoe.balance import balance_loss, expert_load, layer_balance

FOUR = torch.tensor([[[2.0, 1, 0], [0, 2, 1], [1, 0, 2], [2, 1, 0]]])
ALL = torch.ones(1, 4, dtype=torch.int64)


def slow(logits, mask, top_k):
    """Layer balance by loops over tokens and experts, in float64."""
    num_experts, real = logits.shape[-1], 0
    load, mean = [0.0] * num_experts, [0.0] * num_experts
    for row, row_mask in zip(logits.double(), mask, strict=True):
        for scores, is_real in zip(row, row_mask, strict=True):
            if not is_real:
                continue
            real += 1
            exponentials = [float(score.exp()) for score in scores]
            order = sorted(range(num_experts), key=lambda e: -exponentials[e])
            for expert in range(num_experts):
                load[expert] += expert in order[:top_k]
                mean[expert] += exponentials[expert] / sum(exponentials)
    return num_experts * sum(f / real * p / real for f, p in zip(load, mean, strict=True))


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_four_tokens_of_the_specification():
    term, load = layer_balance(FOUR, ALL, 2)
    assert load.tolist() == [0.75, 0.75, 0.5]
    assert FOUR.softmax(-1).mean(1)[0].tolist() == pytest.approx([0.4163, 0.3112, 0.2725], abs=1e-4)
    assert term.item() == pytest.approx(2.045619, abs=1e-6)


def test_with_the_fourth_token_masked_the_choices_are_balanced():
    term, load = layer_balance(FOUR, torch.tensor([[1, 1, 1, 0]]), 2)
    assert load.tolist() == pytest.approx([2 / 3] * 3)
    assert term.item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(("num_experts", "top_k"), [(3, 2), (5, 2), (4, 1), (6, 3)])
def test_random_logits_with_padding_agree_with_loops(num_experts, top_k):
    logits = drawn(3, 7, num_experts, seed=num_experts, scale=2.0)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    term, load = layer_balance(logits, mask, top_k)
    assert term.item() == pytest.approx(slow(logits, mask, top_k), rel=1e-5)
    assert load.sum().item() == pytest.approx(top_k)


def test_padded_tokens_do_not_count_whatever_their_logits_are():
    logits, mask = drawn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    other = torch.where(mask.bool()[..., None], logits, 50 * drawn(2, 5, 4, seed=1)).requires_grad_()
    term, _ = layer_balance(other, mask, 2)
    assert torch.equal(term, layer_balance(logits, mask, 2)[0])
    term.backward()
    assert other.grad[~mask.bool()].abs().max() == 0
    assert other.grad[mask.bool()].abs().max() > 0


def test_uniform_probabilities_give_k_whatever_is_chosen():
    term, load = layer_balance(torch.zeros(2, 3, 5), torch.ones(2, 3), 2)
    assert load.sum() == 2
    assert term.item() == pytest.approx(2.0)


def test_collapse_on_two_of_four_experts_gives_four():
    logits = torch.tensor([30.0, 30.1, -30, -30]).expand(1, 6, 4)
    assert layer_balance(logits, torch.ones(1, 6), 2)[0].item() == pytest.approx(4.0)


def test_k_is_no_lower_bound():
    # the most chosen experts have the smaller mean probability
    logits = torch.tensor([[[0.1, 0.1, 0.0], [0.1, 0.1, 0.0], [-9.0, 0.0, 6.0]]])
    assert layer_balance(logits, torch.ones(1, 3), 2)[0].item() < 1.97


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 2), (2, 3), (3, 4)])
def test_no_more_experts_than_are_taken_give_a_constant_without_gradient(num_experts, top_k):
    logits = drawn(2, 4, num_experts).requires_grad_()
    term, load = layer_balance(logits, torch.ones(2, 4), top_k)
    assert term.item() == num_experts
    assert load.tolist() == [1.0] * num_experts
    assert not term.requires_grad


def test_the_gradient_is_that_of_the_mean_probabilities_alone():
    logits, mask = drawn(2, 6, 4, seed=3).double().requires_grad_(), torch.ones(2, 6)
    layer_balance(logits, mask, 2)[0].backward()
    load = layer_balance(logits, mask, 2)[1].double()
    again = logits.detach().clone().requires_grad_()
    (4 * (load * again.softmax(-1).mean((0, 1))).sum()).backward()
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-5, atol=1e-9)


def test_a_step_against_the_gradient_takes_tokens_from_the_busy_expert():
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(1, 8, 1).requires_grad_()
    layer_balance(logits, torch.ones(1, 8), 1)[0].backward()
    assert (logits.grad[..., 0] > 0).all()
    assert (logits.grad[..., 1:] < 0).all()


def test_layers_with_different_numbers_of_experts_count_alike():
    logits = {0: drawn(2, 5, 5), 3: drawn(2, 5, 3, seed=1), 4: drawn(2, 5, 2, seed=2)}
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    found, loads = balance_loss(logits, mask, 2)
    expected = sum(slow(one, mask, 2) for one in logits.values()) / 3
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert {layer: len(load) for layer, load in loads.items()} == {0: 5, 3: 3, 4: 2}


def test_no_real_token_gives_zero_with_a_gradient_of_zero():
    logits = drawn(2, 3, 4).requires_grad_()
    found, loads = balance_loss({0: logits}, torch.zeros(2, 3), 2)
    assert found.item() == 0
    assert loads[0].sum() == 0
    found.backward()
    assert logits.grad.abs().max() == 0


def test_bfloat16_logits_are_summed_in_float32():
    # five different values a token: rounded draws would have ties, which any choice breaks rightly
    logits = (drawn(4, 300, 5).argsort(-1) / 4).bfloat16()
    found, loads = balance_loss({0: logits}, torch.ones(4, 300), 2)
    assert found.dtype == loads[0].dtype == torch.float32
    assert found.item() == pytest.approx(slow(logits, torch.ones(4, 300), 2), rel=1e-5)


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="no layer has a router"):
        balance_loss({}, torch.ones(1, 2), 2)


def test_the_load_has_no_gradient():
    probabilities = drawn(1, 4, 3).requires_grad_().softmax(-1)
    assert not expert_load(probabilities, torch.ones(1, 4, dtype=torch.bool), 2).requires_grad
