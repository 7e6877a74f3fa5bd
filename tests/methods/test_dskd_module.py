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
