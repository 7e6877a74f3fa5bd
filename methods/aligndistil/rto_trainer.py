"""Trains RTO (arXiv 2404.18922): a step writes responses, rewards their tokens and takes one step of PPO on them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.distillation_trainer import OnPolicyTrainer, prepare
from tenfold.methods.aligndistil.rto_experience import Judged
from tenfold.methods.aligndistil.rto_module import Critic, RTOModule
from tenfold.platform.errors import ModelError
from tenfold.platform.models.adapters import add_adapter
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer, same_tokenizer
from tenfold.platform.training.step_trainer import Batches
from tenfold.platform.training.trainer import Trainer
from tenfold.platform.training.worker import WorkerContext


class RTOTrainer(OnPolicyTrainer):
    """Before the first forward pass of a step writes its responses and computes the advantages of their tokens.

    The advantages are standardised over all micro-batches and ranks of the step. All of it is done with the weights
    that wrote the responses, which are used for one step and never again.
    """

    evaluated: ClassVar[tuple[str, ...]] = ("nll", "num_labels", "rto_reward", "kl_reference")

    def prepare_step(self, batches: Batches) -> Batches:
        """Return batches of prompts and responses, with what PPO's losses aim at."""
        written = super().prepare_step(batches)
        if not written:
            return written
        judged = [self._judge(batch) for batch in written]
        sums = torch.stack([part.moments for part in judged]).sum(0)
        found = self.accelerator.reduce(sums, reduction="sum")
        return [{**batch, "targets": part.targets(found)} for batch, part in zip(written, judged, strict=True)]

    def _judge(self, batch: dict[str, Any]) -> Judged:
        sequences = self._prepare_inputs({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        with self.accelerator.autocast():
            experience = self.model.experience(**sequences)
        return Judged.of(experience, sequences["labels"], self.model.options.rto)


def build_trainer(context: WorkerContext) -> Trainer:
    """Load models and data on this worker and put them into a Trainer; see `distillation_trainer.prepare`."""
    loaded, settings = prepare(context)
    config, tokenizer = loaded.config, loaded.tokenizer
    critic = load_critic(config, tokenizer, seed=context.seed)
    return RTOTrainer(
        model=RTOModule(loaded.policy, config, loaded.frozen, num_columns=len(tokenizer), critic=critic),
        compute_metrics=rto_metrics,
        projector_learning_rate=config.rto.critic_learning_rate,
        **settings,
    )


def load_critic(config: AlignDistilConfig, tokenizer: Any, *, seed: int) -> Critic:
    """Load the critic's backbone, with an adapter of its own where the policy has one.

    Raises:
        ModelError: it has another tokenizer than the policy.
    """
    source = config.rto.critic or config.model
    if config.rto.critic is not None and not same_tokenizer(load_tokenizer(source), tokenizer):
        raise ModelError(
            f"config.rto.critic = {source.name}: has another tokenizer than config.model = {config.model.name}, whose "
            "tokens it must read. Give a critic of the same family, or leave it out to start it from config.model"
        )
    model = load_causal_lm(source, seed=seed, dtype="float32")
    if config.lora is not None:
        add_adapter(model, config.lora, seed=seed)
    return Critic(model)


def rto_metrics(prediction: Any) -> dict[str, float]:
    """Return the metrics of held-out responses from the columns of `RTOTrainer.evaluated`.

    Returns:
        `nll`, nats per token; `rto_reward`, the dense rewards of a response that the policy expects along it, mean
        over responses; `kl_reference`, its divergence from the reference per token. NaN where there are no tokens.
    """
    nll, lengths, reward, divergence = numpy.asarray(prediction.predictions, dtype=numpy.float64).T
    tokens, responses = lengths.sum(), (lengths > 0).sum()
    if not tokens:
        return dict.fromkeys(("nll", "rto_reward", "kl_reference"), math.nan)
    return {
        "nll": float(nll.sum() / tokens),
        "rto_reward": float(reward.sum() / responses),
        "kl_reference": float(divergence.sum() / tokens),
    }
