"""RTO's module against plain autograd on whole logits: values, gradients, micro-batches, evaluation, a toy critic."""

import copy

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.rto_experience import Judged, Targets
from tenfold.methods.aligndistil.rto_module import Critic, RTOModule
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, HIDDEN = 13, 8


def language_model(seed, scale=1.0):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=64))
    with torch.no_grad():
        model.lm_head.weight.mul_(20 * scale)  # far from uniform
    return model.eval()


def options(**rto):
    data = {"train": [{"path": "none.jsonl"}]}
    return AlignDistilConfig.model_validate(
        {
            "model": {"model": "none"},
            "objective": "rto",
            "data": data,
            "on_policy": {},
            "rto": rto,
            "loss_chunk_rows": 3,
        }
    )


def made(policy_seed=1, **rto):
    frozen = {"dpo": language_model(2), "reference": language_model(3)}
    for model in frozen.values():
        model.requires_grad_(False)
    critic = Critic(language_model(4))
    return RTOModule(language_model(policy_seed), options(**rto), frozen, num_columns=VOCABULARY, critic=critic)


def batch_of(spans, width=9, seed=0):
    """Random tokens; each row's response stands at [start, stop), behind it is padding."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(spans), width), generator=draw)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (start, stop) in enumerate(spans):
        labels[row, start:stop] = ids[row, start:stop]
        mask[row, :stop] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCH = batch_of([(3, 9), (2, 4), (4, 5)])
NUM_TOKENS = 6 + 2 + 1
FIELDS = ("log_policy", "values", "advantages", "returns")


def token_log_probs(model, batch):
    """[B, T - 1] log pi of the tokens 1.., from whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]


def response(batch):
    return batch["labels"][:, 1:] != -100


def some_targets(module, batch, spread=0.5):
    """Targets whose old values lie around today's, so that some ratios and values are clipped."""
    seen = module.experience(**batch)
    draw = torch.Generator().manual_seed(5)
    noise = [torch.randn(seen.values.shape, generator=draw) for _ in range(4)]
    return Targets(seen.log_policy + spread * noise[0], seen.values + spread * noise[1], noise[2], noise[3])


def true_targets(module, batch):
    """What the trainer makes, but for the standardisation of the advantages."""
    seen = module.experience(**batch)
    judged = Judged.of(seen, batch["labels"], module.options.rto)
    return Targets(seen.log_policy, seen.values, judged.advantages, judged.returns)


def total(module, aims, batch=None, num_sequences=3):
    return module(**(BATCH if batch is None else batch), targets=aims, num_sequences=num_sequences)


def plain_loss(module, batch, aims, num_sequences=3):
    """Section 6, sequence by sequence, with gradients through whole logits."""
    log_probs = token_log_probs(module.exported, batch)
    body = module.critic.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    values = body.last_hidden_state[:, :-1] @ module.critic.weight + module.critic.bias
    at, sums = 0, []
    for row, mask in enumerate(response(batch)):
        size = int(mask.sum())
        if not size:
            continue
        old, base, advantage, target = (
            getattr(aims, name)[at : at + size] for name in ("log_policy", "values", "advantages", "returns")
        )
        ratio = (log_probs[row, mask] - old).exp()
        policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        value = values[row, mask]
        moved = base + (value - base).clamp(-0.2, 0.2)
        sums.append(policy + 0.5 * torch.max((value - target) ** 2, (moved - target) ** 2).mean())
        at += size
    return torch.stack(sums).sum() / num_sequences


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_experience_is_what_whole_logits_say_and_the_first_values_are_zero():
    module = made().train()
    seen = module.experience(**BATCH)
    mask = response(BATCH)
    for name, model in {"policy": module.exported, **module.frozen}.items():
        found = getattr(seen, f"log_{name}")
        torch.testing.assert_close(found, token_log_probs(model, BATCH)[mask], rtol=1e-5, atol=1e-5)
        assert not found.requires_grad
    assert seen.values.tolist() == [0.0] * NUM_TOKENS
    assert module.training
    assert module.exported.training


def test_loss_and_gradients_are_those_of_plain_autograd():
    module = made().train()
    with torch.no_grad():
        module.critic.weight.normal_(generator=torch.Generator().manual_seed(0))
    aims = some_targets(module, BATCH)
    found = total(module, aims)
    found["loss"].backward()
    own = gradients(module)
    module.zero_grad()
    expected = plain_loss(module, BATCH, aims)
    expected.backward()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < found["statistics"]["clipped"][0] < NUM_TOKENS
    assert own.keys() == gradients(module).keys() == dict(module.named_parameters()).keys()
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_right_after_writing_the_loss_is_minus_the_mean_advantage_plus_half_the_squared_returns():
    module = made().train()
    aims = true_targets(module, BATCH)
    found = total(module, aims)
    assert torch.equal(aims.returns, aims.advantages)  # V is 0
    parts = aims.advantages.split([6, 2, 1])
    expected = sum(-part.mean() + 0.5 * part.square().mean() for part in parts) / 3
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found["statistics"]["clipped"][0] == 0


def test_bfloat16_weights_are_read_with_float32_products_and_values():
    module = made().train()
    module.to(torch.bfloat16)
    for model in module.frozen.values():
        model.to(torch.bfloat16)
    seen = module.experience(**BATCH)
    with torch.no_grad():
        states = module.frozen["dpo"].model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"])
        rows = states.last_hidden_state[:, :-1][response(BATCH)]
        logits = rows.float() @ module.frozen["dpo"].lm_head.weight.float().T
    tokens = BATCH["labels"][:, 1:][response(BATCH)]
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(seen.log_dpo, expected, rtol=0, atol=1e-5)
    assert seen.values.dtype == seen.log_policy.dtype == torch.float32
    # the same arithmetic twice: no ratio moves by rounding
    found = total(module, true_targets(module, BATCH))
    assert found["statistics"]["policy_loss"][0].item() == pytest.approx(
        -sum(part.mean() for part in true_targets(module, BATCH).advantages.split([6, 2, 1])).item(), rel=1e-5
    )
    found["loss"].backward()
    assert gradients(module).keys() == dict(module.named_parameters()).keys()


def test_a_small_step_makes_tokens_with_an_advantage_more_probable():
    module = made().train()
    seen = module.experience(**BATCH)
    advantages = torch.zeros(NUM_TOKENS)
    advantages[[2, 7]] = torch.tensor([3.0, -3.0])
    aims = Targets(seen.log_policy, seen.values, advantages, seen.values)
    total(module, aims)["loss"].backward()
    with torch.no_grad():
        for parameter in module.exported.parameters():
            parameter -= 1e-3 * parameter.grad
    change = module.experience(**BATCH).log_policy - seen.log_policy
    assert change[2] > 1e-5
    assert change[7] < -1e-5


def test_two_micro_batches_add_up_to_one_batch_whatever_their_lengths():
    module = made().train()
    aims = some_targets(module, BATCH)
    total(module, aims)["loss"].backward()
    whole = gradients(module)
    module.zero_grad()
    added = 0.0
    for rows, tokens in ((slice(0, 1), slice(0, 6)), (slice(1, 3), slice(6, 9))):
        part = {name: value[rows] for name, value in BATCH.items()}
        own = Targets(*(getattr(aims, field)[tokens] for field in FIELDS))
        loss = total(module, own, part)["loss"]
        loss.backward()
        added += loss.item()
    assert added == pytest.approx(total(module, aims)["loss"].item(), rel=1e-5)
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_sequence_without_a_token_counts_for_nothing():
    module = made().train()
    empty = batch_of([(3, 9), (0, 0), (2, 4), (4, 5)])
    for name in ("input_ids", "labels", "attention_mask"):
        empty[name][[0, 2, 3]] = BATCH[name]
    empty["attention_mask"][1] = 1
    aims = some_targets(module, BATCH)
    with_it, without = (total(module, aims, batch)["loss"].item() for batch in (empty, BATCH))
    assert with_it == pytest.approx(without, rel=1e-5)


def test_a_batch_without_any_token_gives_zero_with_a_graph():
    module = made().train()
    batch = batch_of([(0, 0), (0, 0)])
    batch["attention_mask"][:] = 1
    found = total(module, some_targets(module, batch), batch, num_sequences=0)
    found["loss"].backward()
    assert found["loss"].item() == 0.0
    assert not any(gradient.any() for gradient in gradients(module).values())


def test_padding_does_not_matter():
    module = made().train()
    aims = some_targets(module, BATCH)
    other = {name: value.clone() for name, value in BATCH.items()}
    other["input_ids"][other["attention_mask"] == 0] = 1
    wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in other.items()}
    wider["labels"][:, 9:] = -100
    expected = total(module, aims)["loss"].item()
    for batch in (other, wider):
        assert total(module, aims, batch)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_critic_is_apart_from_the_policy_and_frozen_models_never_change():
    module = made().train()
    before = copy.deepcopy(module.frozen)
    total(module, some_targets(module, BATCH))["loss"].backward()
    apart = {id(parameter) for parameter in module.projector_parameters()}
    assert apart == {id(parameter) for parameter in module.critic.parameters()}
    assert not apart & {id(parameter) for parameter in module.exported.parameters()}
    assert not any(name.startswith(("_frozen", "dpo", "reference")) for name in module.state_dict())
    for name, model in module.frozen.items():
        assert all(parameter.grad is None for parameter in model.parameters())
        for own, first in zip(model.parameters(), before[name].parameters(), strict=True):
            assert torch.equal(own, first)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_chunk_changes_nothing(chunk):
    module = made().train()
    aims = some_targets(module, BATCH)
    expected = total(module, aims)["loss"].item()
    module.options = module.options.model_copy(update={"loss_chunk_rows": chunk})
    assert total(module, aims)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_evaluation_gives_what_the_policy_expects_along_given_responses():
    module = made(reward_beta=0.3).eval()
    with torch.no_grad():
        found = module(**BATCH)
        logs = {
            name: model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"])
            .logits.double()
            .log_softmax(-1)[:, :-1]
            for name, model in {"policy": module.exported, **module.frozen}.items()
        }
    mask = response(BATCH)
    probs = logs["policy"].exp()
    reward = 0.3 * (probs * (logs["dpo"] - logs["reference"])).sum(-1)
    divergence = (probs * (logs["policy"] - logs["reference"])).sum(-1)
    nll = -logs["policy"].gather(-1, BATCH["input_ids"][:, 1:, None])[..., 0]
    for name, expected in {"rto_reward": reward, "kl_reference": divergence, "nll": nll}.items():
        torch.testing.assert_close(found[name].double(), (expected * mask).sum(1), rtol=1e-4, atol=1e-5, msg=name)
    assert found["num_labels"].tolist() == [6, 2, 1]


def test_gradient_checkpointing_reaches_policy_and_critic():
    module = made()
    module.gradient_checkpointing_enable()
    for body in (module.exported.model, module.critic.backbone):
        assert all(layer.gradient_checkpointing for layer in body.layers)


def test_the_critic_learns_the_returns_of_fixed_responses():
    module = made().train()
    optimizer = torch.optim.AdamW(module.critic.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        found = total(module, true_targets(module, BATCH))
        found["loss"].backward()
        losses.append(found["statistics"]["value_loss"][0].item())
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]
