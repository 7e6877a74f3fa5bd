"""The distilled objectives' module against the formulas of the paper written out with full logits."""

import copy

import pytest
import torch
from tenfold.methods.aligndistil.config import TEACHERS, AlignDistilConfig
from tenfold.methods.aligndistil.distillation_module import DistillationModule
from tenfold.platform.data.collator import CausalCollator
from torch.nn.functional import log_softmax

NO, COLUMNS = -100, 310  # the heads have ten padded rows
LENGTHS = ((3, 4), (5, 1), (2, 6))  # tokens of prompt and response


def options(objective="aligndistil", **more):
    return AlignDistilConfig.model_validate(
        {
            "model": {"model": "a"},
            "data": {"train": [{"path": "p.jsonl"}]},
            "objective": objective,
            "extrapolation": 5.0,
            "constant": 2.0,
            "loss_chunk_rows": 4,
            **more,
        }
    )


@pytest.fixture(scope="module")
def models(tiny_llama):
    made = {
        "policy": tiny_llama(seed=0),
        "dpo": tiny_llama(hidden=48, seed=1).eval(),
        "reverse": tiny_llama(seed=2).eval(),
        "reference": tiny_llama(seed=3).eval(),
    }
    with torch.no_grad():  # fresh models are all but uniform
        for model in made.values():
            model.double().lm_head.weight.mul_(15)
    return made


@pytest.fixture
def module(models):
    def make(objective="aligndistil", policy=None, **more):
        config = options(objective, **more)
        frozen = {name: models[name] for name in config.frozen_names}
        return DistillationModule(policy or copy.deepcopy(models["policy"]), config, frozen, num_columns=COLUMNS)

    return make


def rows(seed=0, lengths=LENGTHS):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for prompt, response in lengths:
        ids = torch.randint(3, COLUMNS, (prompt + response,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [NO] * prompt + ids[prompt:]})
    return made


def batch(seed=0, lengths=LENGTHS, pad=0):
    return CausalCollator(pad)(rows(seed, lengths))


def token_values(module, row):
    """Everything about one sequence from whole logits, position by position (pseudo-code of section 3.5)."""
    config = module.options
    first = row["labels"].count(NO)
    names = {"student": module.exported, **module.frozen}
    found = {"loss": [], "kl": [], "kl_dpo": [], "reward": [], "dpo_reward": [], "realised": []}
    ids = torch.tensor([row["input_ids"]])
    logits = {name: model(ids).logits[0, :, :COLUMNS] for name, model in names.items()}
    for position in range(first - 1, len(row["input_ids"]) - 1):
        student, dpo, *rest = (logits[name][position] for name in names)
        other = rest[0].detach() if rest else dpo.detach()
        dpo = dpo.detach()
        distance = 0.5 * (dpo.softmax(-1) - other.softmax(-1)).abs().sum()
        alpha = config.scale * distance + config.epsilon
        teacher, weight = {
            "aligndistil": (dpo + alpha * (dpo - other), config.beta / alpha),
            "contrast_const": (dpo + config.constant * (dpo - other), config.beta / config.constant),
            "theorem1_const": (config.constant * dpo + (1 - config.constant) * other, config.beta / config.constant),
            "theorem1_adaptive": (alpha * dpo + (1 - alpha) * other, config.beta / alpha),
            "gkd": (dpo, torch.tensor(1.0)),
        }[config.objective]
        log_q, log_p, log_d, log_o = (log_softmax(values, -1) for values in (student, teacher, dpo, other))
        kl = (log_q.exp() * (log_q - log_p)).sum()
        found["kl"].append(kl)
        found["loss"].append(weight * kl)
        found["kl_dpo"].append((log_q.exp() * (log_q - log_d)).sum())
        found["reward"].append(config.beta * (log_q.exp() * (log_d - log_o)).sum())
        found["dpo_reward"].append(config.beta * (log_d.exp() * (log_d - log_o)).sum())
        # over the whole head, as tokens are drawn
        token = row["input_ids"][position + 1]
        whole = [log_softmax(names[name](ids).logits[0, position], -1)[token] for name in module.frozen]
        found["realised"].append(config.beta * (whole[0] - whole[-1]))
    return {name: torch.stack(values) for name, values in found.items()}


def gradients(module):
    found = {name: parameter.grad.clone() for name, parameter in module.exported.named_parameters()}
    module.exported.zero_grad()
    return found


def assert_same_gradients(found, expected, tolerance=1e-5):  # the models' norms are float32
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("objective", TEACHERS)
def test_loss_and_gradients_are_those_of_the_formulas(module, objective, length_norm):
    made = module(objective, length_norm=length_norm).train()
    found = made(**batch())["loss"]
    found.backward()
    own = gradients(made)
    sequences = [token_values(made, row)["loss"] for row in rows()]
    expected = sum(values.mean() if length_norm else values.sum() for values in sequences) / len(sequences)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    expected.backward()
    assert_same_gradients(own, gradients(made))


def test_passes_of_one_sequence_add_up_to_a_batch(module):
    made = module().train()
    whole = made(**batch())["loss"]
    whole.backward()
    expected = gradients(made)
    parts = [made(**CausalCollator(0)([row]), num_sequences=torch.tensor(3))["loss"] for row in rows()]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-7, atol=0)
    assert_same_gradients(gradients(made), expected)


def test_the_number_of_label_tokens_is_not_read(module):
    made = module().train()
    assert torch.equal(made(**batch(), num_items_in_batch=torch.tensor(999))["loss"], made(**batch())["loss"])


def test_padding_order_and_unscored_sequences_do_not_matter(module):
    made = module().train()
    expected = made(**batch())["loss"]
    longer = CausalCollator(7, pad_to_multiple_of=16)
    torch.testing.assert_close(made(**longer(rows()))["loss"], expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(made(**longer(rows()[::-1]))["loss"], expected, rtol=1e-7, atol=0)
    unscored = {"input_ids": [5, 6, 7], "labels": [NO] * 3}
    torch.testing.assert_close(made(**longer([unscored, *rows()]))["loss"], expected, rtol=1e-7, atol=0)


def test_a_batch_without_labels_is_zero_with_a_graph(module):
    made = module().train()
    outputs = made(**CausalCollator(0)([{"input_ids": [5, 6, 7], "labels": [NO] * 3}]))
    assert outputs["loss"] == 0
    outputs["loss"].backward()
    assert all(gradient.abs().max() == 0 for gradient in gradients(made).values())
    assert outputs["statistics"]["kl"] == (0, 0)


def test_only_positions_that_predict_a_response_token_get_a_gradient(module):
    made, kept = module().train(), []

    def keep(_, __, output):
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    made.exported.base_model.register_forward_hook(keep)
    made(**CausalCollator(0)([{"input_ids": [9, 8, 7, 20, 21, 2, 0], "labels": [NO] * 3 + [20, 21, 2, NO]}]))[
        "loss"
    ].backward()
    scored = kept[0].grad[0].abs().amax(-1)
    assert (scored > 0).tolist() == [False, False, True, True, True, False, False]


def test_frozen_models_are_neither_trained_nor_saved_nor_changed(module, models):
    before = {name: copy.deepcopy(models[name].state_dict()) for name in ("dpo", "reverse")}
    made = module().train()
    optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    made(**batch())["loss"].backward()
    optimizer.step()
    assert len(list(made.parameters())) == len(list(models["policy"].parameters()))
    assert all(name.startswith("exported.") for name in made.state_dict())
    for name, weights in before.items():
        assert not models[name].training
        for key, value in models[name].state_dict().items():
            assert torch.equal(value, weights[key]), key
        assert all(parameter.grad is None for parameter in models[name].parameters())


@pytest.mark.parametrize("objective", ["gkd", "aligndistil", "theorem1_const"])
def test_a_policy_that_is_its_teacher_has_no_loss_and_no_gradient(models, objective):
    # one model as all frozen ones: the teacher is this model
    config = options(objective)
    frozen = dict.fromkeys(config.frozen_names, models["reverse"])
    made = DistillationModule(copy.deepcopy(models["reverse"]), config, frozen, num_columns=COLUMNS)
    made.train()
    outputs = made(**batch(), is_measured=True)
    outputs["loss"].backward()
    assert outputs["loss"].abs() < 1e-9
    assert max(gradient.abs().max() for gradient in gradients(made).values()) < 1e-9
    total, count = outputs["statistics"]["token_weight"]
    expected = {"gkd": 1.0, "aligndistil": config.beta / config.epsilon, "theorem1_const": config.beta / 2}
    assert total / count == pytest.approx(expected[objective], rel=1e-6)


def test_statistics_are_sums_and_counts_of_the_formulas(module):
    made = module().train()
    assert not {"reward", "kl_dpo", "realised_reward", "truncated"} & set(made(**batch())["statistics"])
    cut = torch.tensor([True, False, False])
    outputs = made(**batch(), truncated=cut, is_measured=True)
    found = {name: (total.item(), int(count)) for name, (total, count) in outputs["statistics"].items()}
    expected = [token_values(made, row) for row in rows()]
    tokens = sum(response for _, response in LENGTHS)
    for name, key, count in [
        ("kl", "kl", tokens),
        ("kl_dpo", "kl_dpo", tokens),
        ("kl_dpo_sequence", "kl_dpo", 3),
        ("reward", "reward", 3),
        ("dpo_reward", "dpo_reward", 3),
        ("realised_reward", "realised", 3),
    ]:
        total = sum(values[key].sum().item() for values in expected)
        assert found[name] == (pytest.approx(total, rel=1e-6), count), name
    largest = max(values["loss"].max().item() for values in expected)
    assert found["token_loss_max"] == (pytest.approx(largest, rel=1e-5), 1)
    assert found["response_length"] == (tokens, 3)
    assert found["truncated"] == (1, 3)
    assert found["alpha"][0] == pytest.approx(5 * found["tvd"][0] + 1e-3 * tokens, rel=1e-5)
    assert {"kl_reverse", "alpha_max", "token_weight"} <= set(found)


def test_evaluation_gives_sums_of_each_sequence_whatever_the_batch(module):
    made = module().eval()
    with torch.no_grad():
        together = made(**batch())
        apart = [made(**CausalCollator(0)([row])) for row in rows()]
        expected = [token_values(made, row) for row in rows()]
        nll = []
        for row in rows():
            log_probs = log_softmax(made.exported(torch.tensor([row["input_ids"]])).logits[0], -1)
            chosen = [log_probs[at - 1, label] for at, label in enumerate(row["labels"]) if label != NO]
            nll.append(-sum(chosen))
    assert together["num_labels"].tolist() == [4, 1, 6]
    torch.testing.assert_close(together["nll"], torch.stack(nll), rtol=1e-7, atol=1e-9)
    for name in ("kl", "kl_dpo", "reward", "dpo_reward"):
        values = torch.stack([one[name].sum() for one in expected])
        torch.testing.assert_close(together[name], values, rtol=1e-7, atol=1e-9, msg=name)
    for name in ("nll", "kl", "kl_other", "alpha", "tvd", "reward"):
        torch.testing.assert_close(together[name], torch.cat([one[name] for one in apart]), rtol=1e-7, atol=1e-9)
    losses = torch.stack([one["loss"] for one in apart])
    torch.testing.assert_close(together["loss"], losses.mean(), rtol=1e-7, atol=0)


def test_the_policy_goes_beyond_the_dpo_model_the_further_the_larger_the_scale(tiny_llama):
    """Property 18: token 4 is chosen, token 5 rejected, and neither model is sure."""
    start = tiny_llama(vocab=8, hidden=16, layers=1, seed=0)
    start.lm_head = torch.nn.Linear(16, 8)
    with torch.no_grad():
        start.lm_head.weight.mul_(0.1)
        start.lm_head.bias.zero_()
    frozen = {}
    for name, sign in (("dpo", 1.0), ("reverse", -1.0)):
        frozen[name] = copy.deepcopy(start).eval()
        with torch.no_grad():
            frozen[name].lm_head.bias[4:6] += sign * torch.tensor([0.5, -0.5])
    prompt = torch.tensor([[6, 7]])
    given = {"input_ids": torch.tensor([[6, 7, 4]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    given["labels"] = torch.tensor([[NO, NO, 4]])

    def probabilities(model):
        with torch.no_grad():
            return model(prompt).logits[0, -1].softmax(-1)[4:6]

    found = []
    for scale in (0.0, 2.0, 10.0):
        policy = copy.deepcopy(start)
        made = DistillationModule(policy, options(extrapolation=scale), frozen, num_columns=8).train()
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
        for _ in range(120):
            optimizer.zero_grad()
            made(**given)["loss"].backward()
            optimizer.step()
        found.append(probabilities(policy))
    (none, some, more), dpo = found, probabilities(frozen["dpo"])
    assert dpo[0] < 0.9
    torch.testing.assert_close(none, dpo, rtol=0.02, atol=0)
    assert more[0] > some[0] > dpo[0] * 1.02
    assert more[1] < some[1] < dpo[1] * 0.98
