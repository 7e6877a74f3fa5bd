"""Builds the Trainer of the distilled objectives on every worker: AlignDistil and the teachers it is compared with."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from tenfold.methods.aligndistil.agreement import check_vocabularies, disagreement, log_disagreement
from tenfold.methods.aligndistil.collators import PairCollator
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.distillation_module import SUMS, DistillationModule
from tenfold.methods.aligndistil.loading import Loaded, load_models
from tenfold.methods.aligndistil.on_policy import Rollout
from tenfold.methods.aligndistil.preference_rows import Pair
from tenfold.methods.aligndistil.preferences import held_out_pairs, load_pairs, load_prompts
from tenfold.methods.aligndistil.tokenising import chosen_rows, pair_rows, prompt_rows
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.positions import label_positions
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.step_trainer import Batches, StepTrainer
from tenfold.platform.training.trainer import Trainer, perplexity_metrics
from tenfold.platform.training.worker import WorkerContext
from torch import Tensor

logger = logging.getLogger(__name__)

COMPARED_PAIRS = 32  # on which the two frozen models are compared before the first step


class DistillationTrainer(StepTrainer):
    """Trains on given responses: every sequence of the global batch counts alike, whatever ranks and accumulation.

    Args:
        compared: batches of held-out pairs (`PairCollator`) on which the frozen models are compared before the first
            step, the same ones on every rank.
    """

    evaluated: ClassVar[tuple[str, ...]] = ("nll", "num_labels", *SUMS)

    def __init__(self, *args: Any, compared: Batches, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._compared = compared

    def prepare_step(self, batches: Batches) -> Batches:
        """Give the batches the number of sequences of the step, and say whether it is measured."""
        if not batches:
            return batches
        self._compare_frozen()
        # integers: the Trainer rounds other numbers of a batch to the model's dtype
        own = sum(label_positions(batch["labels"]).any(1).sum() for batch in batches)
        total = self.accelerator.reduce(torch.as_tensor(own, device=self.args.device), reduction="sum")
        return [{**batch, "num_sequences": total, "is_measured": self._is_measured} for batch in batches]

    @property
    def _is_measured(self) -> bool:
        """Whether the coming step is one after which statistics are reported."""
        return (self.state.global_step + 1) % max(int(self.state.logging_steps), 1) == 0

    def _compare_frozen(self) -> None:
        """Say once how the frozen models differ; a sharded one needs all ranks."""
        other, batches, self._compared = self.model.other, self._compared, []
        if other is not None and batches:
            found = disagreement(self.model, other, (self._prepare_inputs(batch) for batch in batches))
            if self.is_world_process_zero():
                log_disagreement(found, other)


class OnPolicyTrainer(DistillationTrainer):
    """Has the policy answer the prompts of a step with the weights that it has then.

    Args:
        rollout: what generates.
    """

    def __init__(self, *args: Any, rollout: Rollout, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rollout = rollout
        self._max_truncated = self.model.options.on_policy.max_truncated
        rollout.start_engine(self.model.exported, self.accelerator)

    def prepare_step(self, batches: Batches) -> Batches:
        """Replace prompts by the policy's responses, then count them."""
        written = [self._written(number, batch) for number, batch in enumerate(batches)]
        self._warn_about_length(written)
        return super().prepare_step(written)

    def _written(self, number: int, prompts: dict[str, Tensor]) -> dict[str, Any]:
        policy = self.model.exported
        seed = self._rollout.seed_of(self.state.global_step, number, self.args.process_index)
        batch = self._rollout.generate(policy, prompts, seed)
        return {**batch, "truncated": self._rollout.truncated(policy, batch)}

    def _warn_about_length(self, written: Batches) -> None:
        """Warn the first time that more responses of a step than `max_truncated` are cut, over all ranks."""
        if self._max_truncated >= 1 or not written:
            return
        truncated = torch.cat([batch["truncated"] for batch in written])
        own = torch.tensor([int(truncated.sum()), len(truncated)], device=self.args.device)
        cut, number = self.accelerator.reduce(own, reduction="sum").tolist()
        share = cut / number
        if share <= self._max_truncated:
            return
        self._max_truncated = 1.0  # said once
        if self.is_world_process_zero():
            logger.warning(
                "step %d: %.0f %% of the responses are cut at max_new_tokens (max_truncated is %.0f %%). Responses "
                "that grow to the limit mean that the policy degenerates, or that the limit is too low",
                self.state.global_step + 1,
                100 * share,
                100 * self.model.options.on_policy.max_truncated,
            )


def build_trainer(context: WorkerContext) -> Trainer:
    """Load models and data on this worker and put them into a Trainer; see `prepare`."""
    loaded, settings = prepare(context)
    config = loaded.config
    module = DistillationModule(loaded.policy, config, loaded.frozen, num_columns=len(loaded.tokenizer))
    make_trainer = DistillationTrainer if config.on_policy is None else OnPolicyTrainer
    metrics = functools.partial(distillation_metrics, other=module.other)
    return make_trainer(model=module, compute_metrics=metrics, **settings)


def prepare(context: WorkerContext) -> tuple[Loaded, dict[str, Any]]:
    """Load models and data of the objectives that read DPO models; returns a Trainer's arguments besides the models.

    `context.config` is what `load_models` reads. Trained on chosen responses or, on-policy, on prompts; evaluated on
    the chosen responses of the held-out pairs, which are the same in every run.
    """
    sources = {name: ModelSource.model_validate(source) for name, source in context.config["frozen"].items()}
    loaded = load_models(context)
    config, tokenizer = loaded.config, loaded.tokenizer
    check_vocabularies({"policy": config.model, **sources})
    validation = held_out_pairs(config.data)
    collator = CausalCollator(tokenizer.pad_token_id)
    settings: dict[str, Any] = {
        "args": context.arguments,
        "eval_dataset": chosen_rows(validation, tokenizer, config.data)[0],
        "data_collator": collator,
        "processing_class": tokenizer,
        "cosine_floor": config.training.lr_scheduler_type == "cosine_to_floor",
        "compared": compared_batches(validation, tokenizer, config),
    }
    if config.on_policy is None:
        settings["train_dataset"] = chosen_rows(load_pairs(config.data).train, tokenizer, config.data)[0]
    else:
        settings["train_dataset"] = prompt_rows(load_prompts(config.data).train, tokenizer, config.data)[0]
        settings["rollout"] = Rollout(config, tokenizer, collator, context.seed)
    return loaded, settings


def compared_batches(pairs: Sequence[Pair], tokenizer: Any, config: AlignDistilConfig) -> Batches:
    """Return the first held-out pairs, on which the frozen models are compared before training, in batches."""
    rows = pair_rows(pairs[:COMPARED_PAIRS], tokenizer, config.data)[0]
    size = max(config.training.per_device_eval_batch_size // 2, 1)  # pairs have two rows
    collate = PairCollator(tokenizer.pad_token_id)
    return [
        collate([rows[at] for at in range(start, min(start + size, len(rows)))]) for start in range(0, len(rows), size)
    ]


def distillation_metrics(prediction: Any, other: str | None) -> dict[str, float]:
    """Return the metrics of held-out chosen responses from the columns of `DistillationTrainer.evaluated`.

    Args:
        prediction: what the Trainer gathered, one row a sequence.
        other: name of the second frozen model; None: what compares with it is left out.

    Returns:
        `nll` and `perplexity` of the chosen responses; per token `kl` (student || teacher), `kl_dpo` (student || DPO
        model) and `kl_<other>`, `alpha` and `tvd`; per sequence `kl_dpo_sequence` and the expected contrastive rewards
        `reward` (of the student) and `dpo_reward`. NaN where there is nothing to average.
    """
    columns = torch.as_tensor(prediction.predictions, dtype=torch.float64)
    sums = dict(zip(DistillationTrainer.evaluated, columns.sum(0).tolist(), strict=True))
    tokens, sequences = sums["num_labels"], float(len(columns))

    def mean(name: str, count: float) -> float:
        return sums[name] / count if count else math.nan

    metrics = {**perplexity_metrics(prediction), "kl": mean("kl", tokens), "kl_dpo": mean("kl_dpo", tokens)}
    metrics["kl_dpo_sequence"] = mean("kl_dpo", sequences)
    if other is None:
        return metrics
    metrics |= {name: mean(name, tokens) for name in ("alpha", "tvd")} | {f"kl_{other}": mean("kl_other", tokens)}
    return metrics | {name: mean(name, sequences) for name in ("reward", "dpo_reward")}
