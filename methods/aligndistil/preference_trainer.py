"""Builds the Trainer of the preference objectives on every worker: DPO, cDPO, IPO, SimPO, TDPO and KTO."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy
import torch
from tenfold.methods.aligndistil.collators import PairCollator, SingleCollator
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.kto_module import KTOModule
from tenfold.methods.aligndistil.loading import load_models
from tenfold.methods.aligndistil.preference_module import PreferenceModule
from tenfold.methods.aligndistil.preferences import load_pairs, load_singles
from tenfold.methods.aligndistil.tokenising import pair_rows, single_rows
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.training.step_trainer import Batches, StepTrainer
from tenfold.platform.training.trainer import Trainer
from tenfold.platform.training.worker import WorkerContext

Metrics = dict[str, float]
Partners = Sequence[tuple[int, int]]


class PreferenceTrainer(StepTrainer):
    """Trains on pairs: every pair of the global batch counts the same, whatever the ranks and the accumulation."""

    evaluated: ClassVar[tuple[str, ...]] = ("reward_chosen", "reward_rejected", "preference_nll", "nll", "num_labels")

    def prepare_step(self, batches: Batches) -> Batches:
        """Give the batches the number of examples of the step on all ranks."""
        own = sum(len(batch["labels"]) // self.model.sequences_per_example for batch in batches)
        # an integer: the Trainer rounds other numbers of a batch to the model's dtype
        total = self.accelerator.reduce(torch.tensor(own, device=self.args.device), reduction="sum")
        return [{**batch, "num_examples": total} for batch in batches]


class SinglesTrainer(PreferenceTrainer):
    """Trains on single answers (KTO)."""

    evaluated = ("reward", "desirable", "preference_nll", "nll", "num_labels")


def build_trainer(context: WorkerContext) -> Trainer:
    """Load models and data on this worker and put them into a Trainer; for `context.config` see `load_models`."""
    loaded = load_models(context)
    config, tokenizer = loaded.config, loaded.tokenizer
    parts = _singles(config, tokenizer) if config.objective == "kto" else _pairs(config, tokenizer)
    make_module, make_trainer, settings = parts
    module = make_module(loaded.policy, config, loaded.frozen, num_columns=len(tokenizer))
    return make_trainer(
        model=module,
        args=context.arguments,
        processing_class=tokenizer,
        cosine_floor=config.training.lr_scheduler_type == "cosine_to_floor",
        **settings,
    )


Parts = tuple[type[PreferenceModule], type[PreferenceTrainer], dict[str, Any]]


def _pairs(config: AlignDistilConfig, tokenizer: Any) -> Parts:
    splits = load_pairs(config.data)
    settings = {
        "train_dataset": pair_rows(splits.train, tokenizer, config.data)[0],
        "eval_dataset": pair_rows(splits.validation, tokenizer, config.data)[0],
        "data_collator": PairCollator(tokenizer.pad_token_id),
        "compute_metrics": pair_metrics,
    }
    return PreferenceModule, PreferenceTrainer, settings


def _singles(config: AlignDistilConfig, tokenizer: Any) -> Parts:
    splits = load_singles(config.data)
    # shuffled: the answer of the next row is to another prompt, as in training
    validation = single_rows(splits.validation, tokenizer, config.data)[0].shuffle(
        seed=config.data.split_seed, keep_in_memory=True
    )
    settings = {
        "train_dataset": single_rows(splits.train, tokenizer, config.data)[0],
        "eval_dataset": validation,
        "data_collator": SingleCollator(
            tokenizer.pad_token_id,
            mismatched=config.kto.reference_point == "mismatched",
            max_length=config.data.max_length,
        ),
        "compute_metrics": functools.partial(single_metrics, partners=find_partners(validation)),
    }
    return KTOModule, SinglesTrainer, settings


def find_partners(rows: Any) -> list[tuple[int, int]]:
    """Return the places of (good, bad) answers to the same prompt, the first good one with the first bad one.

    Args:
        rows: `input_ids`, `labels` and `desirable` of single answers, in the order of evaluation.
    """
    by_prompt: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for place, row in enumerate(rows):
        size = next((i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
        good, bad = by_prompt.setdefault(tuple(row["input_ids"][:size]), ([], []))
        (good if row["desirable"] else bad).append(place)
    return [pair for good, bad in by_prompt.values() for pair in zip(good, bad, strict=False)]


def pair_metrics(prediction: Any) -> Metrics:
    """Return the metrics of held-out pairs from the columns of `PreferenceTrainer.evaluated`.

    Returns:
        `reward_accuracy`, 0 to 100, of pairs whose chosen response has the higher reward (ties count as wrong),
        `reward_tie_rate`, 0 to 100, `reward_margin`, the mean difference, `preference_nll`, the objective's own mean
        loss, and `nll`, nats per token of the chosen responses. NaN where there is nothing to average.
    """
    chosen, rejected, losses, nll, lengths = numpy.asarray(prediction.predictions, dtype=numpy.float64).T
    return {
        **_ranking(chosen, rejected),
        "preference_nll": _mean(losses),
        "nll": _ratio(nll.sum(), lengths.sum()),
    }


def single_metrics(prediction: Any, partners: Partners) -> Metrics:
    """Return the metrics of held-out single answers from the columns of `SinglesTrainer.evaluated`.

    Args:
        prediction: what the Trainer gathered, in the order of the data.
        partners: places of good and bad answers to the same prompt.

    Returns:
        As `pair_metrics`; rewards are compared between partners alone and left out where there are none, and `nll` is
        of the good answers.
    """
    reward, desirable, losses, nll, lengths = numpy.asarray(prediction.predictions, dtype=numpy.float64).T
    good = desirable > 0
    metrics = {"preference_nll": _mean(losses), "nll": _ratio(nll[good].sum(), lengths[good].sum())}
    if not partners:
        return metrics
    first, second = numpy.asarray(partners).T
    return {**_ranking(reward[first], reward[second]), **metrics}


def _ranking(chosen: numpy.ndarray, rejected: numpy.ndarray) -> Metrics:
    return {
        "reward_accuracy": 100 * _mean(chosen > rejected),
        "reward_tie_rate": 100 * _mean(chosen == rejected),
        "reward_margin": _mean(chosen - rejected),
    }


def _mean(values: numpy.ndarray) -> float:
    return _ratio(values.sum(), len(values))


def _ratio(total: float, count: float) -> float:
    return float(total) / float(count) if count else math.nan
