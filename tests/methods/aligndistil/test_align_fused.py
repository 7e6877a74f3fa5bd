"""The fused loss of AlignDistil against the same sum with full logits and autograd, and what it must not allocate."""

import math

import pytest
import torch
from tenfold.methods.aligndistil.extrapolation import Contrast, sequence_mean, teacher, token_loss
from tenfold.methods.aligndistil.fused import _write_logits, fused_alignment_loss
from tenfold.platform.losses import chunked_rows
from tenfold.platform.losses.chunked_rows import Side
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OBJECTIVES = ["aligndistil", "contrast_const", "theorem1_const", "theorem1_adaptive", "gkd"]
ROWS, VOCABULARY = 10, 23
SIZES = {"student": 4, "dpo": 6, "other": 5}


def sides(dtype=torch.float64, *, rows=ROWS, padding=(0, 0, 0), bias=True, frozen_dtype=None):
    """Random sides of student, DPO model and second model; only the student's tensors require a gradient."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for (name, size), more in zip(SIZES.items(), padding, strict=True):
        own = dtype if name == "student" else frozen_dtype or dtype

        def draw(*shape, own=own):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(own)

        head = torch.cat([draw(VOCABULARY, size), 50 * draw(more, size)])
        side = Side(draw(rows, size), head, draw(VOCABULARY + more) if bias else None)
        if name == "student":
            side.hidden.requires_grad_()
            side.head.requires_grad_()
            if side.bias is not None:
                side.bias.requires_grad_()
        found.append(side)
    return found


def weights(rows=ROWS, dtype=torch.float64):
    return torch.rand(rows, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def logits(side, dtype=torch.float64):
    found = side.hidden.to(dtype) @ side.head.to(dtype).T
    found = found if side.bias is None else found + side.bias.to(dtype)
    return found[:, :VOCABULARY]


def trained(side):
    return [tensor for tensor in (side.hidden, side.head, side.bias) if tensor is not None]


def fused(student, dpo, other, contrast=Contrast(), row_weight=None, **options):
    return fused_alignment_loss(student, dpo, other, contrast, row_weight, **({"num_columns": VOCABULARY} | options))


def assert_same_with_gradients(value, expected, tensors, rtol=1e-11, atol=1e-12):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, check_dtype=False)
    gradients = torch.autograd.grad(value, tensors, retain_graph=True)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, tensors, retain_graph=True), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=atol, check_dtype=False)


class Seen(TorchDispatchMode):
    """Records the elements of the largest tensor and the dtypes of the matrix products."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.products.append(str(func))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
        return out


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [1, 7, ROWS, 256])
def test_fused_equals_full_logits_with_autograd(objective, chunk):
    student, dpo, other = sides()
    contrast, weight = Contrast(objective, temperature=1.5, constant=2.0, scale=6.0), weights()
    found = fused(student, dpo, None if objective == "gkd" else other, contrast, weight, chunk=chunk)
    losses = token_loss(logits(student), logits(dpo), logits(other), contrast)
    assert_same_with_gradients(found.total, (losses * weight).sum(), trained(student))
    target = teacher(logits(dpo), logits(other), contrast)
    expected = {"loss": losses, "alpha": target.alpha, "weight": target.weight, "tvd": target.tvd}
    for name, values in (expected | {"kl": losses / target.weight}).items():
        torch.testing.assert_close(found.rows[name], values.detach(), rtol=1e-11, atol=1e-12)


def test_row_weights_of_a_batch_give_the_mean_over_tokens_then_sequences():
    student, dpo, other = sides(rows=6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    values = torch.zeros(2, 4, dtype=torch.float64)
    values[mask.bool()] = token_loss(logits(student), logits(dpo), logits(other), Contrast()).detach()
    lengths = torch.tensor([2, 2, 4, 4, 4, 4], dtype=torch.float64)
    found = fused(student, dpo, other, row_weight=1 / (lengths * 2)).total
    torch.testing.assert_close(found, sequence_mean(values, mask), rtol=1e-12, atol=0)
    summed = fused(student, dpo, other, row_weight=torch.full((6,), 0.5, dtype=torch.float64)).total
    torch.testing.assert_close(summed, sequence_mean(values, mask, length_norm=False), rtol=1e-12, atol=0)


def test_two_parts_of_the_rows_add_up_to_the_whole():
    student, dpo, other = sides()
    weight = weights()
    whole = fused(student, dpo, other, row_weight=weight).total
    halves = [
        fused(*(Side(s.hidden[rows], s.head, s.bias) for s in (student, dpo, other)), row_weight=weight[rows]).total
        for rows in (slice(0, 3), slice(3, None))
    ]
    assert_same_with_gradients(halves[0] + halves[1], whole, trained(student))


def test_float32_chunks_agree_to_1e_5():
    student, dpo, other = sides(torch.float32)
    whole = fused(student, dpo, other, chunk=ROWS).total
    assert whole.dtype == torch.float32
    for chunk in (1, 7):
        value = fused(student, dpo, other, chunk=chunk).total
        assert_same_with_gradients(value, whole, trained(student), rtol=1e-5, atol=1e-5)


def test_small_blocks_give_the_same_as_one_block(monkeypatch):
    student, dpo, other = sides()
    whole = fused(student, dpo, other, chunk=7, want_metrics=True)
    monkeypatch.setattr(chunked_rows, "_BLOCK_ELEMENTS_CPU", 2 * VOCABULARY)
    blocked = fused(student, dpo, other, chunk=7, want_metrics=True)
    assert_same_with_gradients(blocked.total, whole.total, trained(student))
    for name, values in whole.rows.items():
        torch.testing.assert_close(blocked.rows[name], values, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    student, dpo, other = sides(rows=3)

    def loss(hidden, head, bias):
        return fused(Side(hidden, head, bias), dpo, other, Contrast(temperature=0.7), weights(3), chunk=2).total

    assert torch.autograd.gradcheck(loss, trained(student))


def test_heads_without_bias():
    student, dpo, other = sides(bias=False)
    expected = token_loss(logits(student), logits(dpo), logits(other), Contrast()).sum()
    assert_same_with_gradients(fused(student, dpo, other).total, expected, trained(student))


def test_padded_rows_of_the_heads_are_never_compared():
    student, dpo, other = sides(padding=(3, 0, 5))
    expected = token_loss(logits(student), logits(dpo), logits(other), Contrast()).sum()
    found = fused(student, dpo, other, chunk=4, want_metrics=True)
    assert_same_with_gradients(found.total, expected, trained(student))
    (gradient,) = torch.autograd.grad(found.total, student.head)
    assert gradient[VOCABULARY:].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_metrics_are_divergences_and_rewards_without_temperature(temperature):
    student, dpo, other = sides()
    contrast = Contrast(beta=0.3, temperature=temperature)
    rows = fused(student, dpo, other, contrast, want_metrics=True, chunk=4).rows
    log_q, log_d, log_o = (logits(side).detach().log_softmax(-1) for side in (student, dpo, other))
    expected = {
        "kl_dpo": (log_q.exp() * (log_q - log_d)).sum(-1),
        "kl_other": (log_q.exp() * (log_q - log_o)).sum(-1),
        "reward": 0.3 * (log_q.exp() * (log_d - log_o)).sum(-1),
        "dpo_reward": 0.3 * (log_d.exp() * (log_d - log_o)).sum(-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(rows[name], values, rtol=1e-10, atol=1e-12)


def test_metrics_change_neither_loss_nor_gradient_and_are_there_only_if_wanted():
    student, dpo, other = sides()
    plain, full = fused(student, dpo, other), fused(student, dpo, other, want_metrics=True)
    assert_same_with_gradients(full.total, plain.total, trained(student), rtol=0, atol=0)
    assert set(plain.rows) == {"kl", "weight", "alpha", "tvd", "loss"}
    assert set(full.rows) - set(plain.rows) == {"kl_dpo", "kl_other", "reward", "dpo_reward"}


def test_gkd_without_a_second_model_has_the_divergence_from_the_dpo_model_alone():
    student, dpo, other = sides()
    alone = fused(student, dpo, None, Contrast("gkd"), want_metrics=True).rows
    torch.testing.assert_close(alone["kl_dpo"], alone["kl"])
    assert not {"kl_other", "reward", "dpo_reward"} & set(alone)
    assert alone["alpha"].tolist() == [1.0] * ROWS
    beside = fused(student, dpo, other, Contrast("gkd"), want_metrics=True).rows
    assert torch.equal(beside["loss"], alone["loss"])
    assert beside["reward"].abs().min() > 0


def test_rewards_stay_finite_where_a_model_bans_a_token():
    student, dpo, other = sides()
    banned = torch.zeros(VOCABULARY, dtype=torch.float64)
    banned[5] = -math.inf
    dpo, other = (Side(side.hidden, side.head, side.bias + banned) for side in (dpo, other))
    student = Side(student.hidden, student.head, (student.bias + banned).detach().requires_grad_())
    found = fused(student, dpo, other, want_metrics=True)
    assert all(values.isfinite().all() for values in found.rows.values())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.total, trained(student)))


def test_rows_of_weight_zero_change_neither_loss_nor_gradient_even_if_not_a_number():
    student, dpo, other = sides()
    weight = weights()
    weight[2::3] = 0.0
    live = weight != 0
    parts = (Side(side.hidden[live], side.head, side.bias) for side in (student, dpo, other))
    expected = fused(*parts, row_weight=weight[live])
    dpo.hidden[~live] = math.nan
    found = fused(student, dpo, other, row_weight=weight, chunk=4)
    assert_same_with_gradients(found.total, expected.total, trained(student))
    (gradient,) = torch.autograd.grad(found.total, student.hidden)
    assert gradient[~live].abs().max() == 0
    assert found.rows["kl"][~live].tolist() == [0.0] * int((~live).sum())
    torch.testing.assert_close(found.rows["kl"][live], expected.rows["kl"])


@pytest.mark.parametrize("rows", [0, 4])
def test_no_counted_row_gives_zero_with_zero_gradients(rows):
    student, dpo, other = sides(rows=rows)
    weight = torch.zeros(rows, dtype=torch.float64)
    found = fused(student, dpo, other, row_weight=weight, want_metrics=True)
    assert found.total.item() == 0.0
    assert all(len(values) == rows for values in found.rows.values())
    for tensor, gradient in zip(trained(student), torch.autograd.grad(found.total, trained(student)), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_the_incoming_gradient_scales_the_gradients():
    student, dpo, other = sides()
    single = torch.autograd.grad(fused(student, dpo, other).total, trained(student))
    tripled = torch.autograd.grad(3 * fused(student, dpo, other).total, trained(student))
    torch.testing.assert_close(tripled, tuple(3 * gradient for gradient in single))


def test_heads_may_be_gone_between_forward_and_backward():
    student, dpo, other = sides()
    expected = torch.autograd.grad(fused(student, dpo, other).total, student.hidden)[0]
    total = fused(student, dpo, other).total
    for side in (student, dpo, other):
        side.head.data = torch.empty(0, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(total, student.hidden)[0], expected)


@pytest.mark.parametrize("only", ["hidden", "head", "bias"])
def test_only_tensors_that_require_a_gradient_get_one(only):
    student, dpo, other = sides()
    expected = torch.autograd.grad(fused(student, dpo, other).total, getattr(student, only))[0]
    alone = {name: getattr(student, name).detach() for name in ("hidden", "head", "bias")}
    alone[only] = alone[only].requires_grad_()
    side = Side(**alone)
    fused(side, dpo, other).total.backward()
    torch.testing.assert_close(alone[only].grad, expected)
    assert [name for name, tensor in alone.items() if tensor.grad is not None] == [only]


def test_frozen_models_get_no_gradient_even_if_they_ask_for_one():
    student, dpo, other = sides()
    asked = [tensor for side in (dpo, other) for tensor in trained(side)]
    for tensor in asked:
        tensor.requires_grad_()
    fused(student, dpo, other).total.backward()
    assert student.head.grad.abs().max() > 0
    assert all(tensor.grad is None for tensor in asked)


def test_without_gradient_mode_the_values_are_the_same_and_only_logits_are_multiplied():
    student, dpo, other = sides()
    expected = fused(student, dpo, other, chunk=ROWS)
    with torch.no_grad(), Seen() as seen:
        found = fused(student, dpo, other, chunk=ROWS)
    torch.testing.assert_close(found.total, expected.total.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.rows["loss"], expected.rows["loss"], rtol=1e-12, atol=0)
    assert found.total.grad_fn is None
    assert len(seen.products) == 3


def test_values_of_rows_are_detached():
    student, dpo, other = sides()
    assert not any(values.requires_grad for values in fused(student, dpo, other, want_metrics=True).rows.values())


def test_bfloat16_heads_give_logits_that_are_not_rounded_again():
    """bf16 inputs: values as of exact products of the same inputs, gradients in bfloat16 within its rounding."""
    student, dpo, other = sides(torch.bfloat16)
    found = fused(student, dpo, other, chunk=4)
    exact = [Side(*(tensor.detach().double() for tensor in trained(side))) for side in (student, dpo, other)]
    for tensor in trained(exact[0]):
        tensor.requires_grad_()
    expected = fused(*exact)
    assert found.rows["kl"].dtype == torch.float32
    torch.testing.assert_close(found.rows["kl"].double(), expected.rows["kl"], rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.total, trained(student))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.total, trained(exact[0])), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - wanted).norm() < 0.01 * wanted.norm()


def test_logits_rounded_to_bfloat16_would_be_off_by_more_than_a_nat():
    dpo, other = (tensor * 8 for tensor in (logits(side).detach() for side in sides()[1:]))
    exact = teacher(dpo, other, Contrast(scale=30.0)).logits
    rounded = teacher(dpo.bfloat16(), other.bfloat16(), Contrast(scale=30.0)).logits
    assert (exact - rounded).abs().max() > 1.0


def test_autocast_casts_the_student_and_leaves_the_frozen_models_as_they_are():
    student, dpo, other = sides(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(student, dpo, other, want_metrics=True, chunk=4)
    cast = Side(*(tensor.bfloat16() for tensor in trained(student)))
    expected = fused(cast, dpo, other, want_metrics=True, chunk=4)
    for name, values in expected.rows.items():
        torch.testing.assert_close(found.rows[name], values, rtol=1e-6, atol=1e-6)
    for gradient, wanted in zip(
        torch.autograd.grad(found.total, trained(student)),
        torch.autograd.grad(expected.total, trained(student)),
        strict=True,
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted)


def test_frozen_models_may_be_narrower_than_the_student():
    student, dpo, other = sides(torch.float32, frozen_dtype=torch.bfloat16)
    expected = token_loss(*(logits(side, torch.float32) for side in (student, dpo, other)), Contrast()).sum()
    assert_same_with_gradients(fused(student, dpo, other).total, expected, trained(student), rtol=1e-4, atol=1e-5)


def test_on_a_gpu_narrow_heads_are_multiplied_into_float32_by_one_product():
    narrow = {"dtype": torch.bfloat16, "device": "cuda"}
    with FakeTensorMode(), Seen() as seen:
        hidden, head = torch.empty(8, 4, **narrow), torch.empty(VOCABULARY, 4, **narrow)
        _write_logits(hidden, head, None, torch.empty(8, VOCABULARY, device="cuda"))
    assert seen.products == ["aten.mm.dtype_out"]


def test_no_tensor_of_all_rows_times_the_vocabulary_is_ever_made():
    student, dpo, other = sides(torch.float32, rows=64)
    with Seen() as seen:
        fused(student, dpo, other, want_metrics=True, chunk=8).total.backward()
    assert seen.elements <= max(8 * VOCABULARY, 64 * max(SIZES.values()))
    with Seen() as seen:
        token_loss(*(logits(side, torch.float32) for side in (student, dpo, other)), Contrast()).sum().backward()
    assert seen.elements == 64 * VOCABULARY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, d, o: {"dpo": Side(d.hidden[:3], d.head, d.bias)},
            r"dpo: hidden states .* \(3, 6\), the student's",
        ),
        (lambda s, d, o: {"other": None}, "reads two frozen models"),
        (lambda s, d, o: {"other": Side(o.hidden, o.head[:9], o.bias[:9])}, r"num_columns is 23; a head of shape \(9"),
        (lambda s, d, o: {"student": Side(s.hidden, s.head[:9], s.bias[:9])}, "num_columns is 23"),
        (lambda s, d, o: {"other": Side(o.hidden.float(), o.head, o.bias)}, "other: .*One dtype is needed"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_given(change, message):
    student, dpo, other = sides()
    given = {"student": student, "dpo": dpo, "other": other} | change(student, dpo, other)
    with pytest.raises(ValueError, match=message):
        fused(*given.values())


def test_weights_of_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="row weights of the loss"):
        fused(*sides(), row_weight=torch.ones(3))
