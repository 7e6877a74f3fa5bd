"""DSKD's module on tiny models: every objective, gradients where they belong, exact evaluation."""

import pytest
import torch
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.trainer import make_module
from tenfold.platform.data.positions import label_positions, next_labels

OBJECTIVES = ["sft", "kl", "dual_space_v1", "dual_space_v2"]


def config(objective, **more):
    return DSKDConfig(
        student={"model": "a"},
        teacher={"model": "b"},
        data={"train": [{"path": "c.json"}]},
        objective=objective,
        **more,
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (3, 10), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(ids)
    labels[2, 7:] = -100
    mask[2, 7:] = 0
    count = int((labels[:, 1:] != -100).sum())
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "teacher_hidden": torch.randn(count, 48, generator=generator),
    }


def make(tiny_llama, objective, **more):
    torch.manual_seed(1)
    head = torch.randn(320, 48)
    student = tiny_llama(320)
    return make_module(student, config(objective, **more), "none", num_columns=320, teacher_head=head)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_gives_a_finite_loss_and_trains_the_student(tiny_llama, batch, objective):
    module = make(tiny_llama, objective)
    module.train()
    out = module(**batch)
    out["loss"].backward()
    assert torch.isfinite(out["loss"])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)
    assert module.exported.get_output_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_parts_add_up_to_the_total(tiny_llama, batch, objective):
    module = make(tiny_llama, objective, kd_rate=0.3, agreement_threshold=0.0)
    module.train()
    out = module(**batch)
    means = {name: (total / count).item() for name, (total, count) in out["statistics"].items()}
    means.pop("t2s_agreement", None)
    ce = means.pop("ce")
    expected = ce if objective == "sft" else 0.7 * ce + 0.3 * sum(means.values())
    assert out["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_evaluation_equals_the_models_own_loss(tiny_llama, batch):
    module = make(tiny_llama, "sft").eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    out = module(**inputs)
    reference = module.exported(**inputs).loss
    assert (out["nll"].sum() / out["num_labels"].sum()).item() == pytest.approx(reference.item(), rel=1e-5)


def test_splitting_a_batch_does_not_change_the_gradient_of_token_sums(tiny_llama, batch):
    whole, split = make(tiny_llama, "dual_space_v1"), make(tiny_llama, "dual_space_v1")
    split.load_state_dict(whole.state_dict())
    items = len(next_labels(batch["labels"]))
    whole.train()(**batch, num_items_in_batch=items)["loss"].backward()
    offsets = [0, *label_positions(batch["labels"]).sum(1).cumsum(0).tolist()]
    for row in range(3):
        part = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}
        part["teacher_hidden"] = batch["teacher_hidden"][offsets[row] : offsets[row + 1]]
        split.train()(**part, num_items_in_batch=items)["loss"].backward()
    for (name, one), two in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_v2_student_to_teacher_projector_follows_the_student_head(tiny_llama, batch):
    module = make(tiny_llama, "dual_space_v2", s2t_refresh_every=2).train()
    module(**batch)
    first = module.s2t_matrix.clone()
    with torch.no_grad():
        module.exported.get_output_embeddings().weight.mul_(2)
    module(**batch)
    assert torch.equal(module.s2t_matrix, first)
    module(**batch)
    torch.testing.assert_close(module.s2t_matrix, 2 * first, rtol=1e-4, atol=1e-5)


def parts_of(batch, groups):
    """Split a batch of one tokenizer into micro-batches of these rows."""
    offsets = [0, *label_positions(batch["labels"]).sum(1).cumsum(0).tolist()]
    for rows in groups:
        part = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}
        if "teacher_hidden" in batch:
            part["teacher_hidden"] = torch.cat([batch["teacher_hidden"][offsets[i] : offsets[i + 1]] for i in rows])
        yield part


def step_gradients(module, parts, items):
    """Gradients of one optimizer step, with what exact means need counted before its first forward pass."""
    module.zero_grad()
    module.train().micro_batches = len(parts)
    known = [module.counted(part, is_generated=False) for part in parts]
    if any(known):
        total = sum(one["step_counts"] for one in known)
        parts = [part | one | {"step_counts": total} for part, one in zip(parts, known, strict=True)]
    total = 0.0
    for part in parts:
        loss = module(**part, num_items_in_batch=items)["loss"]
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.clone() for parameter in module.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "more", [{}, {"agreement_threshold": 0.3}, {"t2s_mask": "gold"}, {"t2s_mask": "none"}, {"spaces": "student"}]
)
@pytest.mark.parametrize("mode", ["cache", "live"])
def test_global_means_do_not_depend_on_the_micro_batches(tiny_llama, batch, mode, more):
    found, items = {}, len(next_labels(batch["labels"]))
    for normaliser in ("global", "local"):
        module, given = agreeing(tiny_llama, batch, normaliser, mode, more)
        for groups in ([[0, 1, 2]], [[0], [1, 2]], [[2, 0], [1]], [[0], [1], [2]]):
            found[normaliser, str(groups)] = step_gradients(module, list(parts_of(given, groups)), items)
    whole = found["local", "[[0, 1, 2]]"]  # of one micro-batch both means are the same
    for (normaliser, _), (loss, gradients) in found.items():
        if normaliser == "global":
            assert loss == pytest.approx(whole[0], rel=1e-5)
            for own, other in zip(gradients, whole[1], strict=True):
                torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)  # row weights are float32
    differs = abs(found["local", "[[0], [1], [2]]"][0] - whole[0]) > 1e-4
    assert differs == (more != {"t2s_mask": "none"})


def agreeing(tiny_llama, batch, normaliser, mode, more):
    """A float64 module whose projected teacher predicts the teacher's token and the gold label in some rows."""
    teacher = tiny_llama(320, hidden=48, seed=5, tied=False).double().eval().requires_grad_(False)
    own = teacher.get_output_embeddings().weight.mul_(20)
    parts = {"teacher": teacher} if mode == "live" else {"teacher_head": own}
    options = config("dual_space_v2", normaliser=normaliser, teacher_mode=mode, **more)
    module = make_module(tiny_llama(320, seed=2, tied=False), options, "none", num_columns=320, **parts).double()
    given = {name: batch[name].clone() for name in ("input_ids", "attention_mask", "labels")}
    positions = label_positions(given["labels"])
    if mode == "cache":
        rows = given["teacher_hidden"] = batch["teacher_hidden"].double()
    else:
        rows = teacher.base_model(given["input_ids"], given["attention_mask"]).last_hidden_state[positions]
    with torch.no_grad():
        # the student's rows of what the teacher predicts in the first response point where its projection does
        head = module.exported.get_output_embeddings().weight.mul_(20)
        first = positions.nonzero()[:, 0] == 0
        head[(rows @ own.T).argmax(-1)[first]] = 20 * module.t2s(rows)[first]
        best = (module.t2s(rows) @ head.T).argmax(-1)
    gold = given["labels"][:, 1:][given["labels"][:, 1:] != -100]
    gold[:4] = best[:4]
    given["labels"][:, 1:][given["labels"][:, 1:] != -100] = gold
    return module, given


def biased(seed=0, **options):
    """A small model whose head has a bias."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = PhiForCausalLM(PhiConfig(**{**sizes, **tokens, **options}))
    torch.nn.init.normal_(model.lm_head.bias)
    torch.nn.init.normal_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_head_with_a_bias_is_read_with_it_cached_and_live(batch, objective):
    teacher = biased(3, hidden_size=48).eval().requires_grad_(False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    losses = []
    for parts in (
        {"teacher": teacher},
        {"teacher_head": teacher.lm_head.weight, "teacher_bias": teacher.lm_head.bias},
        {"teacher_head": teacher.lm_head.weight},
    ):
        torch.manual_seed(1)
        student = biased()
        module = make_module(student, config(objective, teacher_mode="live"), "none", num_columns=320, **parts)
        states = teacher.base_model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
        cached = {} if "teacher" in parts else {"teacher_hidden": states[label_positions(batch["labels"])]}
        out = module.train()(**inputs, **cached)
        out["loss"].backward()
        losses.append(out["loss"].item())
        assert student.lm_head.bias.grad.abs().sum() > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (abs(losses[0] - losses[2]) > 1e-3) == (objective != "sft")
    out = module.eval()(**inputs)
    reference = student(**inputs).loss
    assert (out["nll"].sum() / out["num_labels"].sum()).item() == pytest.approx(reference.item(), rel=1e-5)


def test_a_model_that_changes_its_logits_is_refused_before_the_first_step():
    from tenfold.platform.errors import ModelError
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = CohereForCausalLM(CohereConfig(**sizes, num_key_value_heads=2, vocab_size=64, logit_scale=0.1))
    make_module(biased(), config("sft"), "none", num_columns=320).check_heads()
    with pytest.raises(ModelError, match="its logits are not the head applied"):
        make_module(student, config("sft"), "none", num_columns=64).check_heads()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_response_that_is_cut_away_adds_nothing(tiny_llama, batch, objective):
    module = make(tiny_llama, objective).train()
    items = len(next_labels(batch["labels"]))
    loss = module(**batch, num_items_in_batch=items)["loss"]
    padded = {name: torch.cat([batch[name], batch[name][:1]]) for name in ("input_ids", "attention_mask", "labels")}
    padded["labels"][3] = -100
    again = module(**padded, teacher_hidden=batch["teacher_hidden"], num_items_in_batch=items)["loss"]
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    empty = {name: padded[name][3:] for name in ("input_ids", "attention_mask", "labels")}
    nothing = module(**empty, teacher_hidden=batch["teacher_hidden"][:0], num_items_in_batch=0)["loss"]
    nothing.backward()
    assert nothing.item() == 0


@pytest.mark.parametrize(
    ("objective", "more", "message"),
    [
        ("kl", {"t2s_mask": "gold"}, "t2s_mask = gold is for dual_space_v1 and dual_space_v2"),
        ("dual_space_v2", {"t2s_mask": "gold", "spaces": "teacher"}, "which spaces = teacher leaves out"),
        ("dual_space_v2", {"t2s_mask": "none", "agreement_threshold": 0.5}, "without a mask to bound"),
        ("dual_space_v1", {"t2s_mask": "gold", "teacher_mode": "live", "on_policy": {}}, "has no gold labels"),
        ("dual_space_v1", {"normaliser": "global"}, "normaliser = global is for the means of dual_space_v2"),
        ("uld", {"teacher_mode": "live", "on_policy": {}}, "on_policy works with kl, "),
    ],
)
def test_options_that_do_not_fit_together_are_refused(objective, more, message):
    with pytest.raises(ValueError, match=message):
        config(objective, **more)


def test_cross_model_attention_has_no_token_to_agree_with():
    from tenfold.platform.errors import ConfigError

    options = config("dual_space_v1", t2s_mask="agreement")
    assert options.alignment(same_tokenizer=True) == "none"
    with pytest.raises(ConfigError, match=r"config.t2s_mask = agreement: cross-model attention"):
        options.alignment(same_tokenizer=False)
