"""GKD is objective kl with divergence jsd: beside trl's own GKDTrainer, on logits and on whole models.

trl names the shares the other way round: its beta is the teacher's share of the mixture, ours (js_beta) the student's.
At 0 and 1 its loss becomes the forward and the reverse KL. Both divide the sum over the label tokens by their number
in the global batch. Its temperature only shapes what is sampled, so ours for the divergence (kd_temperature) is 1.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.trainer import make_module
from tenfold.platform.experiment import load_experiment
from tenfold.platform.losses.divergence import divergence_rows

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module")
def gkd():
    """Return trl's module, which warns of being experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental import gkd
    return gkd


@pytest.fixture
def trl_gkd(gkd):
    return gkd.GKDTrainer


def ours(beta):
    """Name and options of our divergence for trl's beta."""
    if beta in (0.0, 1.0):
        return {"divergence": "reverse_kl" if beta else "forward_kl"}
    return {"divergence": "jsd", "js_beta": 1 - beta}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_is_trls_in_value_and_gradient(trl_gkd, beta, temperature):
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 11, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 11, (2, 5), generator=draw)
    labels[0, :2] = -100
    counted = labels != -100
    theirs_in, ours_in = student.clone().requires_grad_(), student.clone().requires_grad_()
    theirs = trl_gkd.generalized_jsd_loss(theirs_in, teacher, labels, beta, temperature)
    found = divergence_rows(ours_in[counted], teacher[counted], temperature=temperature, **ours(beta)).mean()
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-14)
    theirs.backward()
    found.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-10, atol=1e-14)
    assert ours_in.grad[0, 2:].abs().min() > 0


@pytest.mark.parametrize("num_items", [17, 40])
@pytest.mark.parametrize("beta", BETAS)
def test_a_batch_of_the_data_gives_the_loss_and_gradients_of_trls_trainer(trl_gkd, tiny_llama, beta, num_items):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 320, (3, 10), generator=draw)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4] = -100
    labels[2, 7:] = -100
    mask[2, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    student, same = tiny_llama(seed=0), tiny_llama(seed=0)
    teacher = tiny_llama(hidden=48, seed=5)

    trainer = SimpleNamespace(teacher_model=teacher, beta=beta, generalized_jsd_loss=trl_gkd.generalized_jsd_loss)
    theirs = trl_gkd.compute_loss(trainer, same, batch, num_items_in_batch=num_items)
    config = DSKDConfig(
        student={"model": "a"},
        teacher={"model": "b"},
        data={"train": [{"path": "c.json"}]},
        objective="kl",
        kd_rate=1.0,
        kd_temperature=1.0,
        teacher_mode="live",
        loss_chunk_rows=4,
        **ours(beta),
    )
    module = make_module(student, config, "none", num_columns=320, teacher=teacher.eval())
    found = module.train()(**batch, num_items_in_batch=num_items)["loss"]
    assert int((labels[:, 1:] != -100).sum()) == 6 + 6 + 3
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-7)
    theirs.backward()
    found.backward()
    for (name, parameter), other in zip(student.named_parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)
        assert parameter.grad.abs().max() > 0


def test_the_recipe_has_the_values_of_trls_defaults(gkd):
    fields = {name: field.default for name, field in gkd.GKDConfig.__dataclass_fields__.items()}
    config = load_experiment("dskd/gkd", []).config
    assert config.divergence == "jsd"
    assert config.js_beta == 1 - fields["beta"]
    policy = config.on_policy
    assert (policy.after_epochs, policy.ratio) == (0, fields["lmbda"])
    assert (policy.temperature, policy.max_new_tokens) == (fields["temperature"], fields["max_new_tokens"])
    assert (policy.top_k, policy.top_p) == (0, 1.0)
    assert (config.kd_rate, config.kd_temperature) == (1.0, 1.0)
