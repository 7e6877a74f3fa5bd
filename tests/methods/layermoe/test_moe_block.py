"""The block in place of an FFN: against a slow mixture, its limits, its precision, its calls."""

import copy

import pytest
import torch
from tenfold.methods.layermoe.block import ExpertBlock, mixture
from tenfold.methods.layermoe.routing import top_k_routing
from tenfold.methods.layermoe.state import RoutingState
from torch import nn

H = 16


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.calls = nn.Linear(H, 24), nn.Linear(24, H), []

    def forward(self, rows):
        self.calls.append(len(rows))
        return self.down(torch.tanh(self.up(rows)))


@pytest.fixture
def block():
    torch.manual_seed(0)

    def make(sizes=(2, 1), **options):
        made = ExpertBlock(FFN(), FFN, hidden_size=H, sizes=sizes, layer=4, **{"top_k": 2, **options})
        with torch.no_grad():
            made.router.weight.mul_(6)  # clear preferences
        return made

    return make


def slow(block, hidden, classes=None):
    """Token by token, in float64."""
    twin = copy.deepcopy(block).double()
    out = torch.zeros_like(hidden, dtype=torch.float64)
    limits = [1, 1 + sum(block.sizes)]
    for b in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            x = hidden[b, t].double()
            usable = len(twin.experts) if classes is None else limits[classes[b]]
            p = (block.router.weight.double() @ x)[:usable].softmax(0)
            best = p.argsort(descending=True)[: min(block.top_k, usable)]
            for e in best:
                out[b, t] += p[e] / p[best].sum() * twin.experts[e](x[None])[0]
    return out


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_the_mixture_is_that_of_a_loop_over_tokens(block, k):
    made, hidden = block(top_k=k), torch.randn(3, 7, H)
    torch.testing.assert_close(made(hidden), slow(made, hidden).float(), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_a_loop_over_tokens(block):
    made = block()
    hidden = torch.randn(2, 5, H, requires_grad=True)
    made(hidden).square().sum().backward()
    weights = {name: weight.grad.clone() for name, weight in made.named_parameters()}
    flow = hidden.grad.clone()
    made.zero_grad()
    hidden.grad = None
    total = torch.zeros(())
    for row in hidden.reshape(-1, H):
        w, e = top_k_routing((made.router.weight @ row)[None], 2)
        y = sum(w[0, slot] * made.experts[e[0, slot]](row[None])[0] for slot in range(2))
        total = total + y.square().sum()
    total.backward()
    torch.testing.assert_close(hidden.grad, flow, rtol=1e-4, atol=1e-6)
    for name, weight in made.named_parameters():
        torch.testing.assert_close(weights[name], torch.zeros_like(weight) if weight.grad is None else weight.grad)


def test_equal_experts_compute_what_the_ffn_did_whatever_the_router_says(block):
    made = block(sizes=(3,))
    for expert in made.experts[1:]:
        expert.load_state_dict(made.base.state_dict())
    hidden = torch.randn(2, 9, H)
    torch.testing.assert_close(made(hidden), made.base(hidden.reshape(-1, H)).view(2, 9, H), rtol=0, atol=1e-6)


def test_permuting_experts_with_their_router_rows_changes_nothing(block):
    made, hidden = block(sizes=(3,)), torch.randn(2, 9, H)
    before = made(hidden)
    order = [2, 0, 1]
    made.groups[0] = nn.ModuleList(made.groups[0][place] for place in order)
    with torch.no_grad():
        made.router.weight.copy_(made.router.weight[[0] + [place + 1 for place in order]].clone())
    torch.testing.assert_close(made(hidden), before)


def test_every_expert_is_called_once_in_every_pass_also_without_a_row(block):
    made = block(sizes=(2, 0, 1))
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[:2] = torch.tensor([[0.5], [0.4]])
    made(torch.rand(2, 3, H) + 0.1)
    assert [expert.calls for expert in made.experts] == [[6], [6], [0], [0]]


def test_an_expert_without_a_row_has_a_gradient_of_zero(block):
    made = block(sizes=(2,))
    with torch.no_grad():
        made.router.weight.copy_(torch.tensor([[0.5], [0.4], [0.0]]).expand(3, H))
    made(torch.rand(1, 3, H) + 0.1).sum().backward()
    assert made.experts[2].up.weight.grad.eq(0).all()
    assert made.experts[1].up.weight.grad.ne(0).any()


def with_classes(block, classes):
    block.state = RoutingState(groups=torch.tensor(classes), route_with="gold")
    return block


def test_sequences_of_class_0_get_the_ffn_and_the_others_the_mixture(block):
    made, hidden = block(classes=2), torch.randn(4, 6, H)
    out = with_classes(made, [0, 1, 1, 0])(hidden)
    torch.testing.assert_close(out, slow(made, hidden, [0, 1, 1, 0]).float(), rtol=1e-5, atol=1e-6)


def test_a_batch_of_class_0_gets_the_very_bits_of_the_ffn(block):
    made, hidden = block(classes=2), torch.randn(3, 6, H)
    assert torch.equal(with_classes(made, [0, 0, 0])(hidden), made.base(hidden))
    assert [expert.calls[-1] for expert in made.experts[1:]] == [0, 0, 0]


def test_rows_of_class_0_go_to_the_ffn_in_one_call_with_the_others(block):
    made = block(classes=2)
    with_classes(made, [0, 1])(torch.randn(2, 6, H))
    assert len(made.base.calls) == 1
    assert made.base.calls[0] >= 6


def test_the_second_class_of_three_may_not_use_the_second_expansion(block):
    made = block(sizes=(1, 3), classes=3)
    with_classes(made, [1])(torch.randn(1, 8, H))
    assert [expert.calls[-1] for expert in made.experts] == [8, 8, 0, 0, 0]


def test_a_class_may_be_allowed_fewer_experts_than_a_row_uses(block):
    made = block(sizes=(1, 3), classes=3, top_k=4)
    hidden = torch.randn(1, 5, H)
    out = with_classes(made, [1])(hidden)
    alone = ExpertBlock(made.base, FFN, hidden_size=H, sizes=[1], layer=0, top_k=4)
    alone.groups[0][0] = made.experts[1]
    alone.router.weight = nn.Parameter(made.router.weight[:2].detach())
    torch.testing.assert_close(out, alone(hidden))


def test_router_logits_are_collected_for_all_rows_in_float32(block):
    made, hidden = block(classes=2), torch.randn(2, 3, H)
    state = RoutingState(groups=torch.tensor([0, 1]), route_with="gold", collects=True)
    made.state = state
    made(hidden)
    torch.testing.assert_close(state.router_logits[4], hidden @ made.router.weight.T)
    torch.testing.assert_close(state.classifier_logits[4], hidden.mean(1) @ made.classifier.weight.T)
    assert state.router_logits[4].dtype == torch.float32


def test_under_bfloat16_routers_and_classifiers_compute_in_float32(block):
    made = block(classes=2).bfloat16()
    hidden = torch.randn(2, 3, H).bfloat16()
    state = RoutingState(collects=True)
    made.state = state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(hidden)
    assert out.dtype == torch.bfloat16
    expected = hidden.float() @ made.router.weight.float().T
    assert torch.equal(state.router_logits[4], expected)
    assert state.classifier_logits[4].dtype == torch.float32


def test_under_autocast_the_output_has_the_dtype_of_the_experts(block):
    made, hidden = block(), torch.randn(2, 3, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(hidden)
        assert out.dtype == made.base(hidden).dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), made(hidden), rtol=0.05, atol=0.05)


def test_a_batch_without_a_row_is_a_batch_without_a_row(block):
    assert block(classes=2)(torch.zeros(0, 5, H)).shape == (0, 5, H)
    assert block()(torch.zeros(2, 0, H)).shape == (2, 0, H)


def test_the_state_of_a_pass_is_used_once(block):
    made = with_classes(block(classes=2), [0])
    made(torch.randn(1, 3, H))
    assert made.state is None


def test_a_slot_of_weight_zero_goes_to_no_expert():
    calls = []

    def expert(rows):
        calls.append(rows.shape)
        return rows

    out = mixture(
        torch.ones(2, 3), torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0, 1], [1, 0]]), [expert] * 2
    )
    assert torch.equal(out, torch.ones(2, 3))
    assert calls == [(2, 3), (1, 3)]
