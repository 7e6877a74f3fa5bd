"""The preference objectives' module on tiny models, beside plain autograd through whole logits."""

import math

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.kto_module import KTOModule
from tenfold.methods.aligndistil.preference_module import PreferenceModule
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

PAIRED = ["dpo", "cdpo", "ipo", "simpo", "tdpo1", "tdpo2"]
VOCABULARY = 320
HIDDEN = 32
COLUMNS = 317  # entries of the tokenizer: the last rows of the head stand for nothing
BETA, ALPHA = 0.3, 0.7


def config(objective, **more):
    return AlignDistilConfig(
        model={"model": "a"},
        data={"train": [{"path": "c.json"}]},
        objective=objective,
        **{"beta": BETA, "tdpo_alpha": ALPHA, "loss_chunk_rows": 4, **more},
    )


def rows(prompts, answers, width, seed=0):
    """Draw a padded batch with these lengths of prompts and answers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, COLUMNS, (len(prompts), width), generator=generator)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (start, size) in enumerate(zip(prompts, answers, strict=True)):
        labels[row, start : start + size] = ids[row, start : start + size]
        mask[row, : start + size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def pairs():
    """Return three pairs: chosen, then rejected."""
    return rows([4, 2, 3, 4, 2, 3], [5, 7, 1, 3, 6, 4], 10)


@pytest.fixture
def singles():
    batch = rows([4, 2, 3, 5], [5, 7, 1, 3], 10)
    other = rows([4, 2, 3, 5], [7, 1, 3, 5], 11, seed=1)
    return (
        batch
        | {f"mismatched_{name}": value for name, value in other.items()}
        | {"desirable": torch.tensor([True, False, True, True])}
    )


@pytest.fixture
def make(tiny_llama):
    """Return a factory of modules in float64; the policy has left its reference."""

    def build(objective, *, seeds=(0, 1), bias=False, tied=True, dtype=torch.float64, **more):
        policy, reference = (tiny_llama(VOCABULARY, seed=seed, tied=tied) for seed in seeds)
        if bias:
            for model in (policy, reference):
                head = nn.Linear(HIDDEN, VOCABULARY)
                head.weight = model.lm_head.weight
                model.lm_head = head
        with torch.no_grad():
            for weight in (*policy.parameters(), *reference.parameters()):
                weight.mul_(3)  # far from uniform
        frozen = {} if objective == "simpo" else {"reference": reference.to(dtype).eval().requires_grad_(False)}
        kind = KTOModule if objective == "kto" else PreferenceModule
        return kind(policy.to(dtype), config(objective, **more), frozen, num_columns=COLUMNS).train()

    return build


def log_probs(model, batch, prefix=""):
    """Return log pi [N, T - 1, V] and the mask [N, T - 1] of what predicts a label, from whole logits."""
    inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
    return torch.log_softmax(model(**inputs).logits[:, :-1], -1), batch[f"{prefix}labels"][:, 1:] != -100


def summed(model, batch, prefix=""):
    """Return l(y) of each sequence."""
    values, mask = log_probs(model, batch, prefix)
    picked = values.gather(-1, batch[f"{prefix}input_ids"][:, 1:, None]).squeeze(-1)
    return (picked * mask).sum(1)


def divergences(module, batch):
    """Return K of each sequence over the tokenizer's columns."""
    (policy, mask), (reference, _) = (
        log_probs(model, batch) for model in (module.exported, module.frozen["reference"])
    )
    policy, reference = (torch.log_softmax(values[..., :COLUMNS], -1) for values in (policy, reference))
    return ((reference.exp() * (reference - policy)).sum(-1) * mask).sum(1)


def expected_loss(module, batch, nll_weight=0.0):
    """Return the mean loss over the pairs with autograd through everything."""
    objective, size = module.options.objective, len(batch["labels"]) // 2
    policy = summed(module.exported, batch)
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    nll = -(policy / lengths)[:size]
    if objective == "simpo":
        means = policy / lengths
        return -logsigmoid(2.5 * (means[:size] - means[size:]) - 1.25).mean()
    with torch.no_grad():
        reference = summed(module.frozen["reference"], batch)
    ratio = policy - reference
    h = ratio[:size] - ratio[size:]
    if objective in ("tdpo1", "tdpo2"):
        kl = divergences(module, batch)
        chosen, rejected = kl[:size], kl[size:]
        h = h - (rejected - chosen if objective == "tdpo1" else ALPHA * (rejected - chosen.detach()))
    if objective == "ipo":
        loss = (h - 1 / (2 * BETA)) ** 2
    elif objective == "cdpo":
        loss = -0.9 * logsigmoid(BETA * h) - 0.1 * logsigmoid(-BETA * h)
    else:
        loss = -logsigmoid(BETA * h)
    return (loss + nll_weight * nll).mean()


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters()}


def assert_same(module, found, expected):
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    mine, plain = gradients(module, found), gradients(module, expected)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 1e-6, name
        # the norms below the last one round to float32 whatever the weights are
        tolerance = 1e-12 if name.startswith(("exported.model.norm", "exported.lm_head")) else 1e-6
        torch.testing.assert_close(mine[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("objective", PAIRED)
def test_loss_and_gradients_are_those_of_whole_logits(make, pairs, objective, chunk):
    module = make(objective, loss_chunk_rows=chunk)
    assert_same(module, module(**pairs)["loss"], expected_loss(module, pairs))


@pytest.mark.parametrize("objective", ["dpo", "tdpo1"])
def test_a_head_with_a_bias_and_weights_of_its_own_is_trained_exactly(make, pairs, objective):
    module = make(objective, bias=True, tied=False)
    assert "exported.lm_head.bias" in dict(module.named_parameters())
    assert_same(module, module(**pairs)["loss"], expected_loss(module, pairs))


@pytest.mark.parametrize("objective", ["dpo", "ipo", "tdpo2"])
def test_nll_weight_adds_the_mean_cross_entropy_of_chosen_responses(make, pairs, objective):
    module = make(objective, nll_weight=0.25)
    assert_same(module, module(**pairs)["loss"], expected_loss(module, pairs, nll_weight=0.25))


class Widest(TorchDispatchMode):
    """Keeps the largest number of rows of logits that any tensor has."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if (
                not isinstance(tensor, torch.Tensor)
                or tensor.ndim < 2
                or tensor.shape[-1] not in (VOCABULARY, COLUMNS)
            ):
                continue
            if tensor.shape[:-1] != (HIDDEN,):  # the head, transposed
                self.rows = max(self.rows, tensor.numel() // tensor.shape[-1])
        return found


@pytest.mark.parametrize("objective", PAIRED)
def test_no_pass_holds_more_than_a_chunk_of_logits(make, pairs, objective):
    module = make(objective, loss_chunk_rows=3)
    with Widest() as widest:
        module(**pairs)["loss"].backward()
    assert widest.rows == 3
    with Widest() as widest:
        expected_loss(module, pairs)
    assert widest.rows == pairs["labels"].shape[0] * pairs["labels"].shape[1]


@pytest.mark.parametrize(("objective", "smoothing"), [("dpo", 0.1), ("cdpo", 0.0), ("cdpo", 0.1)])
def test_dpo_with_the_smoothing_of_cdpo_is_cdpo(make, pairs, objective, smoothing):
    expected = expected_loss(make("cdpo"), pairs)
    assert make(objective, label_smoothing=smoothing)(**pairs)["loss"].item() == pytest.approx(expected.item())


def part_of(batch, chosen):
    size = len(batch["labels"]) // 2
    return {name: value[[*chosen, *(row + size for row in chosen)]] for name, value in batch.items()}


@pytest.mark.parametrize("objective", PAIRED)
def test_micro_batches_with_the_number_of_all_pairs_add_up_to_the_whole(make, pairs, objective):
    module = make(objective)
    whole = module(**pairs)["loss"]
    expected, parts = gradients(module, whole), []
    module.zero_grad()
    for chosen in ([2], [0, 1]):
        loss = module(**part_of(pairs, chosen), num_examples=torch.tensor(3.0), num_items_in_batch=99)["loss"]
        loss.backward()
        parts.append(loss.item())
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-10)
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("objective", PAIRED)
def test_padding_changes_nothing(make, pairs, objective):
    module = make(objective)
    wide = {name: nn.functional.pad(value, (0, 4), value=7) for name, value in pairs.items()}
    wide["attention_mask"][:, 10:], wide["labels"][:, 10:] = 0, -100
    wide["input_ids"][wide["attention_mask"] == 0] = 11
    one, other = gradients(module, module(**pairs)["loss"]), gradients(module, module(**wide)["loss"])
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_an_untrained_policy_has_the_loss_ln_2_no_divergence_and_only_ties(make, pairs):
    for objective in ("dpo", "tdpo1", "tdpo2"):
        module = make(objective, seeds=(0, 0))
        out = module(**pairs)
        assert out["loss"].item() == pytest.approx(math.log(2), abs=1e-12)
        assert out["statistics"]["reward_accuracy"][0].item() == 0
        assert out["statistics"]["reward_margin"][0].item() == pytest.approx(0, abs=1e-12)
        if objective != "dpo":
            assert out["statistics"]["kl_chosen"][0].item() == pytest.approx(0, abs=1e-10)


def test_exchanged_responses_give_the_reverse_loss(make, pairs):
    module = make("dpo")
    swapped = {name: torch.cat([value[3:4], value[:1]]) for name, value in pairs.items()}
    losses = [module(**batch)["loss"].item() for batch in (part_of(pairs, [0]), swapped)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)


def test_a_small_step_moves_the_rewards_apart(make, pairs):
    module = make("dpo", seeds=(0, 0))
    before = module(**pairs)
    before["loss"].backward()
    with torch.no_grad():
        for weight in module.parameters():
            weight -= 1e-4 * weight.grad
    after = module(**pairs)
    assert after["loss"] < before["loss"]
    assert after["statistics"]["reward_margin"][0] > before["statistics"]["reward_margin"][0]


def test_the_reference_stays_as_it_is_and_outside_the_modules_weights(make, pairs):
    module = make("tdpo2")
    reference = module.frozen["reference"]
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    module(**pairs)["loss"].backward()
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert all(weight.grad is None for weight in reference.parameters())
    assert not any("reference" in name or "frozen" in name for name in module.state_dict())
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"exported"}


@pytest.mark.parametrize("objective", PAIRED)
def test_statistics_are_sums_over_pairs(make, pairs, objective):
    module = make(objective)
    found = module(**pairs)["statistics"]
    assert all(count.item() == 3 for _, count in found.values())
    assert all(not value.requires_grad for statistic in found.values() for value in statistic)
    with torch.no_grad():
        policy, lengths = summed(module.exported, pairs), (pairs["labels"][:, 1:] != -100).sum(1)
        if objective == "simpo":
            reward = 2.5 * policy / lengths
        else:
            reward = BETA * (policy - summed(module.frozen["reference"], pairs))
        if objective in ("tdpo1", "tdpo2"):
            kl = divergences(module, pairs)
            reward = reward + BETA * kl
            assert found["kl_rejected"][0].item() == pytest.approx(kl[3:].sum().item(), rel=1e-5)
    expected = {
        "reward_chosen": reward[:3].sum(),
        "reward_rejected": reward[3:].sum(),
        "reward_margin": (reward[:3] - reward[3:]).sum(),
        "reward_accuracy": 100 * (reward[:3] > reward[3:]).sum(),
        "logp_chosen": policy[:3].sum(),
        "logp_rejected": policy[3:].sum(),
    }
    for name, value in expected.items():
        assert found[name][0].item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("objective", PAIRED)
def test_evaluation_gives_a_row_for_each_pair_and_no_gradient(make, pairs, objective):
    module = make(objective, nll_weight=0.0 if objective == "simpo" else 0.5).eval()
    with torch.no_grad():
        out = module(**pairs)
        each = [expected_loss(module, part_of(pairs, [row])).item() for row in range(3)]
        nll = -summed(module.exported, pairs)[:3]
    assert out["preference_nll"].tolist() == pytest.approx(each, rel=1e-8)
    torch.testing.assert_close(out["nll"], nll)
    assert out["num_labels"].tolist() == [5, 7, 1]
    assert not any(value.requires_grad for value in out.values() if isinstance(value, torch.Tensor))
    statistics = module.train()(**pairs)["statistics"]
    for name in ("reward_chosen", "reward_rejected"):
        assert out[name].sum().item() == pytest.approx(statistics[name][0].item(), rel=1e-5)


def test_half_precision_products_give_nearly_the_same_loss(make, pairs):
    module = make("tdpo2", dtype=torch.float32)
    exact = module(**pairs)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(**pairs)["loss"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05, abs=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(module, rough).values())


def kto_point(module, batch, point):
    if point == "mismatched":
        ratio = summed(module.exported, batch, "mismatched_") - summed(
            module.frozen["reference"], batch, "mismatched_"
        )
        return ratio.mean().clamp(min=0)
    ratio = summed(module.exported, batch) - summed(module.frozen["reference"], batch)
    good = batch["desirable"]
    return torch.where(good, ratio[~good].mean().clamp(min=0), ratio[good].mean().clamp(min=0))


def expected_kto(module, batch, point):
    beta = module.options.beta
    with torch.no_grad():
        z = kto_point(module, batch, point)
        reference = summed(module.frozen["reference"], batch)
    ratio = summed(module.exported, batch) - reference
    good = 1.5 * (1 - torch.sigmoid(beta * (ratio - z)))
    bad = 0.5 * (1 - torch.sigmoid(beta * (z - ratio)))
    return torch.where(batch["desirable"], good, bad).mean()


@pytest.mark.parametrize(
    ("point", "seeds", "is_positive"),
    [("mismatched", (0, 1), True), ("mismatched", (1, 0), False), ("paired", (0, 1), False), ("paired", (1, 0), True)],
)
def test_kto_has_loss_and_gradients_of_whole_logits_and_a_constant_point(make, singles, point, seeds, is_positive):
    options = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "reference_point": point}
    module = make("kto", kto=options, beta=0.02, seeds=seeds)
    assert_same(module, module(**singles)["loss"], expected_kto(module, singles, point))
    with torch.no_grad():
        z = kto_point(module, singles, point)
    assert bool((z > 0).all()) == is_positive
    total, count = module(**singles)["statistics"]["reference_point"]
    assert (total / count).item() == pytest.approx(z.mean().item(), rel=1e-5)


def test_kto_of_an_untrained_policy_is_one_half_and_its_point_zero(make, singles):
    out = make("kto", seeds=(0, 0))(**singles)
    assert out["loss"].item() == pytest.approx(0.5, abs=1e-12)
    assert out["statistics"]["reference_point"][0].item() == pytest.approx(0, abs=1e-10)


def test_a_lone_row_has_no_mismatched_answer(make, singles):
    lone = {name: value[:1] for name, value in singles.items()}
    out = make("kto")(**lone)
    assert out["statistics"]["reference_point"][0].item() == 0
    assert torch.isfinite(out["loss"])


def test_kto_evaluation_gives_a_row_for_each_answer(make, singles):
    module = make("kto", kto={"reference_point": "paired"})
    statistics = module(**singles)["statistics"]
    with torch.no_grad():
        out = module.eval()(**singles)
    good = singles["desirable"]
    assert torch.equal(out["desirable"], good)
    assert out["preference_nll"].mean().item() == pytest.approx(out["loss"].item())
    assert out["num_labels"].tolist() == [5, 7, 1, 3]
    assert out["reward"][good].sum().item() == pytest.approx(statistics["reward_desirable"][0].item(), rel=1e-5)
    assert statistics["reward_undesirable"][1].item() == 1
    torch.testing.assert_close(out["nll"], -summed(module.exported, singles).detach())
