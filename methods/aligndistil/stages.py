"""The stages of an alignment run: a DPO and a reverse DPO model where they are not given, then the policy.

Stage 1 trains both from the same model on the same rows in the same order; only chosen and rejected are exchanged
(arXiv 2503.02832, Section 3). What it gives is shared by all runs and trials with the same data and options; where
the objective is that very DPO, its model is also the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tenfold.methods.aligndistil.config import PREFERENCE, AlignDistilConfig
from tenfold.platform.method import Outcome
from tenfold.platform.models.source import ModelSource
from tenfold.platform.stages import Stage, StageResult

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

logger = logging.getLogger(__name__)

# Options that only evaluation or the place of work depend on.
UNDECISIVE = {"evaluation", "side_by_side", "preference_training", "dpo_model", "reverse_model", "model"}
# Options that DPO does not read: they must not make another stage.
NOT_OF_DPO = (
    "preference_training",
    "on_policy",
    "dpo_model",
    "reverse_model",
    "extrapolation",
    "official_beta2",
    "epsilon",
    "constant",
    "temperature",
    "length_norm",
    "max_token_weight",
    "tdpo_alpha",
    "simpo",
    "kto",
    "rto",
)


def preference_config(config: AlignDistilConfig, *, reverse: bool) -> AlignDistilConfig:
    """Return the options of the DPO (or reverse DPO) stage of a run."""
    fields = AlignDistilConfig.model_fields
    return config.model_copy(
        update={
            **{name: fields[name].get_default(call_default_factory=True) for name in NOT_OF_DPO},
            "objective": "dpo",
            "data": config.data.model_copy(update={"swap_preferences": config.data.swap_preferences != reverse}),
            "training": config.preference_training or config.training,
        }
    )


def policy_is_dpo_model(config: AlignDistilConfig) -> bool:
    """Say whether the policy is the DPO model that the run trains first, for its evaluation.

    Of what DPO reads, only the steps of the two stages can differ: the rest is the same configuration's.
    """
    return (
        config.objective == "dpo"
        and config.dpo_model is None
        and "dpo" in config.evaluated_names
        and config.preference_training in (None, config.training)
    )


def frozen_models(config: AlignDistilConfig, context: RunContext) -> dict[str, ModelSource]:
    """Return name -> the frozen models that training or evaluation reads; those that are missing are trained."""
    given = {"dpo": config.dpo_model, "reverse": config.reverse_model, "reference": config.model}
    missing = [name for name in config.evaluated_names if given[name] is None]
    stages = [
        _stage(name, preference_config(config, reverse=name == "reverse"), context, shared=True) for name in missing
    ]
    done = dict(zip(missing, context.stages(stages, at_once=config.side_by_side), strict=True))
    return {
        name: given[name] or ModelSource(model=done[name].model_folder)  # a result is only there where none is given
        for name in config.evaluated_names
    }


def train_policy(config: AlignDistilConfig, models: Mapping[str, ModelSource], context: RunContext) -> StageResult:
    """Train what the objective names beside the frozen models that it reads, of those in `models`.

    A policy that is the DPO model among `models` is copied: the run's folder alone holds all that the run gives.
    """
    frozen = {name: models[name] for name in config.frozen_names}
    stage = _stage(config.objective, config, context, frozen=frozen)
    if policy_is_dpo_model(config):
        stage = replace(stage, work=partial(_copy, str(models["dpo"].model)))
    return context.stages([stage])[0]


def _copy(folder: str, context: RunContext) -> Outcome:
    manifest = context.copy_model(folder, name="policy")
    logger.info("dpo: the DPO model that evaluation reads is the policy; copied from %s", folder)
    return Outcome(metrics=manifest.metrics, model="models/policy")


def _stage(
    name: str,
    config: AlignDistilConfig,
    context: RunContext,
    *,
    frozen: dict[str, ModelSource] | None = None,
    shared: bool = False,
) -> Stage:
    from tenfold.methods.aligndistil.preferences import data_digest
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve

    sources = frozen if frozen is not None else {"reference": config.model}
    decides: dict[str, Any] = {
        "aligndistil": config.model_dump(mode="json", exclude=UNDECISIVE),
        "model": model_digest(resolve(config.model)),
        "data": data_digest(config),
        "workers": context.compute.max_workers,
        "critic": None if config.rto.critic is None else model_digest(resolve(config.rto.critic)),
        "frozen": {name: model_digest(resolve(source)) for name, source in sources.items()},
    }
    return Stage(name, decides, partial(_train, name, config, sources, decides), shared=shared)


def _train(
    name: str,
    config: AlignDistilConfig,
    frozen: dict[str, ModelSource],
    decides: dict[str, Any],
    context: RunContext,
) -> Outcome:
    from tenfold.platform.models.manifest import Parent
    from tenfold.platform.training.launch import TrainingJob

    payload = {
        "aligndistil": config.model_dump(mode="json"),
        "frozen": {key: source.model_dump(mode="json") for key, source in frozen.items()},
    }
    result = context.train(TrainingJob(trainer_of(config), payload, config.training, name=name))
    metrics = {key: value for key, value in result.best.metrics.items() if key.startswith("eval/")}
    parents = [
        Parent(kind="policy", reference=config.model.name, digest=decides["model"]),
        Parent(kind="data", reference=", ".join(s.path for s in config.data.train), digest=decides["data"]),
        *(
            Parent(kind=key, reference=source.name, digest=decides["frozen"][key])
            for key, source in frozen.items()
            if key != "reference"
        ),
    ]
    model = context.save_model(result.best.path, name="policy", flavor="causal-lm", metrics=metrics, parents=parents)
    return Outcome(metrics=metrics, model=model)


def trainer_of(config: AlignDistilConfig) -> Callable[..., Any]:
    """Return the function that makes an objective's Trainer on a worker."""
    if config.objective in PREFERENCE:
        from tenfold.methods.aligndistil.preference_trainer import build_trainer
    elif config.objective == "rto":
        from tenfold.methods.aligndistil.rto_trainer import build_trainer
    else:
        from tenfold.methods.aligndistil.distillation_trainer import build_trainer
    return build_trainer
