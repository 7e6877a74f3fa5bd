"""The module of an expansion against a slow forward pass, its exactness over pieces, and what gets a gradient."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tenfold.methods.layermoe.expansion import attach_classifiers, expand, trainable
from tenfold.methods.layermoe.modeling import blocks_of
from tenfold.methods.layermoe.module import ExpansionModule, Objective, old_tokens
from tenfold.methods.layermoe.state import collecting
from torch import nn

NEW = [3, 0, 1, 2]  # new experts of each layer; layer 1 stays dense
CLASSIFIED = [0, 3]
PAD, NO = 0, -100
BALANCED = Objective(balance_weight=0.01)
REVIEW = Objective(prior_weight=0.1, classifier_weight=0.2)


def noisy(model, scale=0.05):
    """Make experts and routers differ, as they do after some training."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if ".groups." in name:
                weight.add_(noise, alpha=scale)
            elif ".router." in name or ".classifier." in name:
                weight.add_(noise, alpha=10 * scale)
    return model


@pytest.fixture(scope="module")
def expanded(tiny_llama):
    model = expand(
        tiny_llama(vocab=96, hidden=16, layers=len(NEW)),
        NEW,
        languages=["el"],
        old_languages=["en"],
        seed=1,
        record={},
    )
    return noisy(model)


@pytest.fixture(scope="module")
def classified(expanded):
    model = copy.deepcopy(expanded)
    attach_classifiers(model, CLASSIFIED, seed=2)
    return noisy(model)


@pytest.fixture(scope="module")
def batch():
    """Six sequences of unequal length, three of group 0, and a label that is left out."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 4, 7, 9, 5, 8])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(1, 96, (6, 9), generator=draw) * mask + PAD * (1 - mask)
    labels = torch.where(mask.bool(), ids, NO)
    labels[2, 3] = NO
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "group": torch.tensor([0, 1, 1, 0, 0, 1]),
    }


def part(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def module_of(model, objective, **options):
    return ExpansionModule(copy.deepcopy(model), objective, **options).train()


class SlowBlock(nn.Module):
    """Sections 3.4 and 3.6 by loops over sequences and tokens; keeps its logits."""

    def __init__(self, block, top_k, mask):
        super().__init__()
        experts = [block.base] + [expert for group in block.groups for expert in group]
        self.experts, self.router = nn.ModuleList(experts), block.router
        self.classifier = getattr(block, "classifier", None)
        self.top_k, self.mask = top_k, mask
        self.router_logits, self.classifier_logits = [], None

    def forward(self, hidden):
        self.router_logits = [[row @ self.router.weight.T for row in rows] for rows in hidden]
        if self.classifier is None:
            bypassed = [False] * len(hidden)
        else:
            pooled = [rows[mask.bool()].mean(0) for rows, mask in zip(hidden, self.mask, strict=True)]
            self.classifier_logits = [self.classifier.weight @ vector for vector in pooled]
            bypassed = [bool(logits.argmax() == 0) for logits in self.classifier_logits]
        out = []
        for rows, logits, is_old in zip(hidden, self.router_logits, bypassed, strict=True):
            out.append(torch.stack([self.token(*pair, is_old) for pair in zip(rows, logits, strict=True)]))
        return torch.stack(out)

    def token(self, vector, logits, is_old):
        if is_old:
            return self.experts[0](vector)
        chances = logits.exp() / logits.exp().sum()
        chosen = sorted(range(len(chances)), key=lambda e: -chances[e].item())[: self.top_k]
        total = sum(chances[e] for e in chosen)
        return sum(chances[e] / total * self.experts[e](vector) for e in chosen)


def slow_terms(model, batch):
    """Next-token, prior and classifier loss of a whole batch, from logits, one token at a time."""
    slow = {}
    for layer, block in blocks_of(model).items():
        slow[layer] = SlowBlock(block, 2, batch["attention_mask"])
        model.model.layers[layer].mlp = slow[layer]
    logits = model.lm_head(
        model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
    )
    ntp, prior, classifier = [], [], []
    for b, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        for t in range(len(ids) - 1):
            if labels[t + 1] != NO:
                ntp.append(F.cross_entropy(logits[b, t], labels[t + 1]))
        for t in range(int(batch["attention_mask"][b].sum())):
            if batch["group"][b] == 0:
                prior.append(sum(-block.router_logits[b][t].log_softmax(0)[0] for block in slow.values()) / len(slow))
        found = [block.classifier_logits[b] for block in slow.values() if block.classifier_logits is not None]
        if found:
            label = int(batch["group"][b] > 0)
            classifier.append(sum(-one.log_softmax(0)[label] for one in found) / len(found))
    means = [torch.stack(one).mean() if one else torch.zeros(()) for one in (ntp, prior, classifier)]
    return means, slow


def gradients(module):
    return {name: p.grad for name, p in module.exported.named_parameters() if p.grad is not None}


def test_loss_and_gradients_of_the_review_are_those_of_a_slow_forward_pass(classified, batch):
    module = module_of(classified, REVIEW)
    found = module(**batch)
    trained = trainable(module.exported, 2)
    found["loss"].backward()

    slow_model = copy.deepcopy(classified)
    parameters = dict(slow_model.named_parameters())
    (ntp, prior, classifier), blocks = slow_terms(slow_model, batch)
    expected = ntp + 0.1 * prior + 0.2 * classifier
    expected.backward()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    sent = [float(block.classifier_logits[b].argmax()) for block in (blocks[0], blocks[3]) for b in range(6)]
    assert 0 < sum(sent) < len(sent)  # both routes are taken
    for name in trained:
        torch.testing.assert_close(
            dict(module.exported.named_parameters())[name].grad, parameters[name].grad, rtol=1e-4, atol=1e-6, msg=name
        )
    statistics = {name: (total / count).item() for name, (total, count) in found["statistics"].items()}
    assert statistics["ntp"] == pytest.approx(ntp.item(), rel=1e-5)
    assert statistics["prior"] == pytest.approx(prior.item(), rel=1e-5)
    assert statistics["classifier"] == pytest.approx(classifier.item(), rel=1e-5)
    for name, is_old in (("old", True), ("new", False)):
        rows = [b for b in range(6) if (batch["group"][b] == 0) == is_old]
        right = [float(blocks[i].classifier_logits[b].argmax() == batch["group"][b]) for i in CLASSIFIED for b in rows]
        assert statistics[f"classifier_accuracy_{name}"] == pytest.approx(sum(right) / len(right))
        chances = [
            block.router_logits[b][t].softmax(0)[0].item()
            for block in blocks.values()
            for b in rows
            for t in range(int(batch["attention_mask"][b].sum()))
        ]
        assert statistics[f"p0_{name}"] == pytest.approx(sum(chances) / len(chances), rel=1e-5)


def test_the_loss_of_stage_1_adds_the_balance_of_a_slow_forward_pass(expanded, batch):
    found = module_of(expanded, BALANCED)(**batch)
    (ntp, _, _), blocks = slow_terms(copy.deepcopy(expanded), batch)
    mask, terms, base = batch["attention_mask"], [], []
    for block in blocks.values():
        num_experts = len(block.experts)
        load, mean, tokens = torch.zeros(num_experts), torch.zeros(num_experts), int(mask.sum())
        for b, t in mask.nonzero().tolist():
            chances = block.router_logits[b][t].softmax(0)
            load[chances.topk(2).indices] += 1 / tokens
            mean += chances.detach() / tokens
        terms.append(float(num_experts * (load * mean).sum()))
        base.append(float(load[0]))
    assert terms[1] == pytest.approx(2.0)  # of two experts both are always taken
    balance = sum(terms) / len(terms)
    assert found["loss"].item() == pytest.approx(ntp.item() + 0.01 * balance, rel=1e-5)
    statistics = {name: (total / count).item() for name, (total, count) in found["statistics"].items()}
    assert statistics["balance"] == pytest.approx(balance, rel=1e-5)
    assert statistics["load_base"] == pytest.approx(sum(base) / len(base), rel=1e-5)
    assert 2 / 3 <= statistics["load_largest"] <= 1
    assert "p0_new" in statistics


def test_without_routing_terms_the_loss_is_next_token_loss_alone(expanded, classified, batch, tiny_llama):
    for model in (expanded, classified, tiny_llama(vocab=96, hidden=16)):
        found = module_of(model, Objective())(**batch)
        hidden = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        expected = F.cross_entropy(hidden[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert set(found["statistics"]) == {"ntp"}


def test_the_review_differs_from_next_token_loss_by_both_of_its_terms(classified, batch):
    values = [
        module_of(classified, objective)(**batch)["loss"].item()
        for objective in (
            Objective(),
            Objective(prior_weight=0.1),
            Objective(classifier_weight=0.1),
            Objective(prior_weight=0.1, classifier_weight=0.1),
            Objective(prior_weight=0.1, prior_form="official"),
        )
    ]
    plain, prior, classifier, both, official = values
    assert min(prior, classifier, official) > plain + 1e-3
    assert both - plain == pytest.approx(prior + classifier - 2 * plain, rel=1e-4)
    assert abs(prior - official) > 1e-3


def test_by_groups_the_prior_is_about_every_real_token(expanded, batch):
    module = module_of(expanded, Objective(prior_weight=0.1, prior_form="group"))
    found = module(**batch)
    with collecting(module.exported) as state:
        module.exported(batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = []
    for logits in state.router_logits.values():
        costs = -logits.log_softmax(-1)
        # one expansion: all but the original FFN are its
        own = torch.where(batch["group"][:, None] == 0, costs[..., 0], costs[..., 1:].sum(-1))
        expected.append((own * batch["attention_mask"]).sum())
    value, count = found["statistics"]["prior"]
    assert count == batch["attention_mask"].sum()
    assert value.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    ntp = found["statistics"]["ntp"][0] / found["statistics"]["ntp"][1]
    assert found["loss"].item() == pytest.approx((ntp + 0.1 * value / count).item(), rel=1e-5)
    marked = module(**batch, old_mask=torch.ones_like(batch["attention_mask"]).bool())
    assert marked["statistics"]["prior"][0] != value  # tokens of an old language inside a new one's block


def test_no_old_token_means_no_prior_but_a_gradient(classified, batch):
    new = part(batch, batch["group"] > 0)
    module = module_of(classified, Objective(prior_weight=0.1))
    found = module(**new)
    plain = module_of(classified, Objective())(**new)
    assert found["loss"].item() == plain["loss"].item()
    assert [value.item() for value in found["statistics"]["prior"]] == [0, 0]
    found["loss"].backward()
    assert all(torch.isfinite(value).all() for value in gradients(module).values())


def test_the_gradient_of_the_prior_does_not_depend_on_new_tokens(classified, batch):
    found = []
    for rows in (batch["group"] == 0, batch["group"] >= 0):
        module = module_of(classified, Objective(prior_weight=1.0))
        own = part(batch, rows)
        own["labels"] = torch.full_like(own["labels"], NO)
        module(**own)["loss"].backward()
        found.append(gradients(module))
    routers = [name for name in found[0] if "router" in name]
    assert routers
    for name in routers:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("sizes", "form"), [((1,) * 6, "nll"), ((2, 2, 2), "nll"), ((1, 5), "nll"), ((4, 2), "nll"), ((4, 2), "group")]
)
def test_pieces_with_the_counts_of_the_step_add_up_to_one_big_batch(classified, batch, sizes, form):
    review = replace(REVIEW, prior_form=form)
    whole = module_of(classified, review)
    loss = whole(**batch)["loss"]
    loss.backward()
    counts = {
        "num_items_in_batch": (batch["labels"][:, 1:] != NO).sum(),
        "num_old_tokens": old_tokens(batch["attention_mask"], batch["group"]).sum(),
        "num_real_tokens": batch["attention_mask"].sum(),
        "num_sequences": torch.tensor(6),
    }
    split, total, sums = module_of(classified, review), 0.0, {}
    for rows in torch.arange(6).split(list(sizes)):
        found = split(**part(batch, rows), **counts)
        found["loss"].backward()
        total += found["loss"].item()
        for name, pair in found["statistics"].items():
            sums.setdefault(name, []).append(torch.stack([value.float() for value in pair]))
    assert total == pytest.approx(loss.item(), rel=1e-5)
    expected = gradients(whole)
    for name, gradient in gradients(split).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, pair in whole(**batch)["statistics"].items():
        own = torch.stack(sums[name]).sum(0)
        assert (own[0] / own[1]).item() == pytest.approx((pair[0] / pair[1]).item(), rel=1e-5), name


def test_the_balance_of_a_step_is_the_mean_over_its_passes(expanded, batch):
    pieces = [part(batch, slice(0, 2)), part(batch, slice(2, 6))]
    module = module_of(expanded, BALANCED)
    alone = [module(**piece)["statistics"]["balance"][0].item() for piece in pieces]
    count = (batch["labels"][:, 1:] != NO).sum()
    module.micro_batches = 2
    losses = [module(**piece, num_items_in_batch=count) for piece in pieces]
    ntp = sum(found["statistics"]["ntp"][0].item() for found in losses) / count.item()
    total = sum(found["loss"].item() for found in losses)
    assert total == pytest.approx(ntp + 0.01 * sum(alone) / 2, rel=1e-5)


def test_padding_changes_neither_loss_nor_gradients(classified, batch):
    longer = {
        "input_ids": F.pad(batch["input_ids"], (0, 4), value=17),
        "attention_mask": F.pad(batch["attention_mask"], (0, 4)),
        "labels": F.pad(batch["labels"], (0, 4), value=NO),
        "group": batch["group"],
    }
    objective = Objective(balance_weight=0.3, prior_weight=0.1, classifier_weight=0.2)
    short, long = module_of(classified, objective), module_of(classified, objective)
    first, second = short(**batch)["loss"], long(**longer)["loss"]
    assert second.item() == pytest.approx(first.item(), rel=1e-5)
    first.backward()
    second.backward()
    expected = gradients(short)
    for name, gradient in gradients(long).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("stage", "objective"), [(1, BALANCED), (2, REVIEW)])
def test_gradient_checkpointing_changes_no_gradient(expanded, classified, batch, stage, objective):
    found = []
    for recompute in (False, True):
        module = module_of(classified if stage == 2 else expanded, objective)
        trainable(module.exported, stage)
        if recompute:
            module.gradient_checkpointing_enable()
            assert any(getattr(layer, "gradient_checkpointing", False) for layer in module.modules())
        module(**batch)["loss"].backward()
        found.append(gradients(module))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("stage", "parts"), [(1, (".groups.0.", ".router.")), (2, (".router.", ".classifier."))])
def test_gradients_exist_exactly_where_the_stage_trains(expanded, classified, batch, stage, parts):
    module = module_of(classified if stage == 2 else expanded, REVIEW if stage == 2 else BALANCED)
    expected = {name for name, _ in module.exported.named_parameters() if any(one in name for one in parts)}
    assert set(trainable(module.exported, stage)) == expected
    module(**batch)["loss"].backward()
    assert set(gradients(module)) == expected
    assert len(expected) == (6 * 3 + 3 if stage == 1 else 3 + 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_after_steps_what_is_frozen_is_the_same_bit_for_bit(expanded, classified, batch, stage):
    module = module_of(classified if stage == 2 else expanded, REVIEW if stage == 2 else BALANCED)
    trained = set(trainable(module.exported, stage))
    before = {name: weight.detach().clone() for name, weight in module.exported.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        found = module(**batch)["loss"]
        losses.append(found.item())
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for name, weight in module.exported.named_parameters():
        assert torch.equal(weight, before[name]) == (name not in trained), name


def test_experts_of_an_earlier_expansion_stay_as_they_are(expanded, batch):
    model = expand(copy.deepcopy(expanded), [1, 1, 0, 1], languages=["bn"], seed=4, record={})
    module = module_of(noisy(model), BALANCED)
    trained = trainable(module.exported, 1)
    module(**batch)["loss"].backward()
    assert set(gradients(module)) == set(trained)
    assert not [name for name in trained if ".groups.0." in name or ".base." in name]
    assert {name.split(".mlp.")[0] for name in trained if ".groups.1." in name} == {
        f"model.layers.{layer}" for layer in (0, 1, 3)
    }


def test_the_true_classes_route_in_training_where_that_is_asked(classified, batch):
    gold = module_of(classified, Objective(prior_weight=0.0, classifier_weight=0.0, route_with="gold"))
    predicted = module_of(classified, Objective(prior_weight=0.0, classifier_weight=0.0))
    losses = [module(**batch)["loss"].item() for module in (gold, predicted)]
    assert abs(losses[0] - losses[1]) > 1e-4
    # a classifier of zeros says class 0 of every sequence: both ways agree where that is true
    for module in (gold, predicted):
        for layer in CLASSIFIED:
            nn.init.zeros_(blocks_of(module.exported)[layer].classifier.weight)
    all_old = {**batch, "group": torch.zeros(6, dtype=torch.int64)}
    assert gold(**all_old)["loss"].item() == predicted(**batch)["loss"].item()


def test_later_expansions_are_new_to_two_classes(classified, batch):
    module = module_of(classified, REVIEW)
    second = {**batch, "group": batch["group"] * 2}
    assert module(**second)["loss"].item() == module(**batch)["loss"].item()


def test_three_classes_tell_the_expansions_apart(expanded, batch):
    twice = expand(copy.deepcopy(expanded), [1, 1, 0, 1], languages=["bn"], seed=4, record={})
    module = module_of(noisy(attach_classifiers(twice, [0, 3], classes=3, seed=2)), REVIEW)
    groups = [batch["group"], batch["group"] * 2, torch.tensor([0, 1, 2, 0, 0, 2])]
    found = [module(**{**batch, "group": group}) for group in groups]
    assert len({one["loss"].item() for one in found}) == 3
    # the prior is about old tokens alone
    assert len({one["statistics"]["prior"][0].item() for one in found}) == 1


def test_the_classifiers_learn_from_whole_sequences_also_where_they_route_by_running_means(expanded, batch):
    found = []
    for pool in ("sequence", "prefix"):
        model = attach_classifiers(copy.deepcopy(expanded), [0], pool=pool, seed=2)
        module = module_of(noisy(model, 0.2), REVIEW)
        found.append(module(**batch))
        found[-1]["loss"].backward()
    sequence, prefix = (one["statistics"]["classifier"][0].item() for one in found)
    assert prefix == pytest.approx(sequence, rel=1e-5)  # nothing lies below layer 0
    assert abs(found[0]["loss"].item() - found[1]["loss"].item()) > 1e-4  # tokens went other ways


def test_old_tokens_may_be_told_one_by_one(classified, batch):
    module = module_of(classified, REVIEW)
    by_group = module(**batch)["loss"].item()
    mask = (batch["group"] == 0)[:, None].expand_as(batch["labels"])
    assert module(**batch, old_mask=mask)["loss"].item() == by_group
    mask = mask.clone()
    mask[0, :4] = False
    assert module(**batch, old_mask=mask)["loss"].item() != by_group


def test_padded_tokens_are_never_old():
    attention = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert old_tokens(attention, torch.tensor([0, 1])).tolist() == [[True, True, False], [False] * 3]
    assert old_tokens(attention, None, torch.ones(2, 3, dtype=torch.bool)).tolist() == attention.bool().tolist()
    assert not old_tokens(attention, None).any()


def test_in_bfloat16_the_terms_are_summed_in_float32(classified, batch):
    module = module_of(classified, Objective(balance_weight=0.1, prior_weight=0.1, classifier_weight=0.1)).bfloat16()
    found = module(**batch)
    exact = module_of(classified, module.objective)(**batch)
    assert found["loss"].dtype == torch.float32
    for name in ("balance", "prior", "classifier"):
        total, count = found["statistics"][name]
        assert total.dtype == torch.float32
        assert (total / count).item() == pytest.approx(
            (lambda a, b: a / b)(*exact["statistics"][name]).item(), rel=0.02
        )
    found["loss"].backward()
    assert all(torch.isfinite(value).all() for value in gradients(module).values())


def test_evaluation_gives_the_loss_of_each_sequence_and_what_it_is(classified, batch):
    module = module_of(classified, REVIEW).eval()
    found = module(**batch, language=torch.arange(6))
    logits = classified(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found["nll"], losses.view(6, -1).sum(1), rtol=1e-4, atol=1e-5)
    assert found["num_labels"].tolist() == (batch["labels"][:, 1:] != NO).sum(1).tolist()
    assert found["loss"].item() == pytest.approx(losses.sum().item() / found["num_labels"].sum().item(), rel=1e-5)
    assert found["language"].tolist() == list(range(6))
    assert not found["loss"].requires_grad


def test_the_review_needs_the_group_of_each_sequence(classified, batch):
    without = {name: value for name, value in batch.items() if name != "group"}
    with pytest.raises(ValueError, match="needs the language group"):
        module_of(classified, REVIEW)(**without)
