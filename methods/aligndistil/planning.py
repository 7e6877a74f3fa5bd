"""What a run will do, checked before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tenfold.methods.aligndistil.config import PREFERENCE, AlignDistilConfig
from tenfold.platform.errors import ConfigError
from tenfold.platform.method import PlanSection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tenfold.methods.aligndistil.tokenising import TokenCounts
    from tenfold.platform.context import PlanContext
    from tenfold.platform.models.loading import ModelFacts
    from tenfold.platform.training.options import TrainingOptions

ADAM = 12  # bytes a trained parameter beside its float32 weight: gradient and two moments


def describe_run(config: AlignDistilConfig, context: PlanContext) -> list[PlanSection]:
    """Return the plan's sections.

    Raises:
        ConfigError: a batch is larger than the data; own responses may be longer than `max_length`; a package of the
            rollout engine is missing.
        ModelError: a model is missing, damaged, of another vocabulary, or changes its logits after the head.
        DataError: preferences cannot be used.
    """
    from tenfold.methods.aligndistil.preferences import held_out_pairs
    from tenfold.methods.aligndistil.stages import policy_is_dpo_model
    from tenfold.platform.evaluation.judge_client import check_judge
    from tenfold.platform.models.loading import describe, load_tokenizer
    from tenfold.platform.models.vllm_rollout import check_engine

    if config.on_policy is not None and config.on_policy.engine == "vllm":
        check_engine("config.on_policy.engine")
    if config.evaluation.judge is not None:
        check_judge(config.evaluation.judge)
    policy = describe(config.model)
    _check_models(config)
    tokenizer = load_tokenizer(config.model)
    rows, counts, found = training_rows(config, tokenizer)
    _check_length(config, max(rows["length"]))
    evaluated = len(held_out_pairs(config.data))
    workers = context.compute.max_workers
    stages = _stages(config)
    for name, options in stages:
        _check_batch(name, options, len(rows), workers)
    return [
        PlanSection("models", tuple(_model_rows(config, policy, context))),
        PlanSection(
            "preferences",
            (
                *found,
                *counts.rows(),
                ("training rows", f"{len(rows):,} ({sum(rows['length']):,} tokens)"),
                ("held-out pairs", f"{evaluated:,}"),
            ),
        ),
        PlanSection(
            "stages",
            (
                *((name, _stage_text(options, len(rows), workers)) for name, options in stages),
                *([("policy", "the dpo model, which is not trained twice")] if policy_is_dpo_model(config) else []),
            ),
        ),
    ]


def training_rows(config: AlignDistilConfig, tokenizer: Any) -> tuple[Any, TokenCounts, Sequence[tuple[str, str]]]:
    """Return the training rows of an objective, what tokenising did to them, and what reading them found."""
    from tenfold.methods.aligndistil import preferences, tokenising

    if config.on_policy is not None:
        prompts = preferences.load_prompts(config.data)
        return *tokenising.prompt_rows(prompts.train, tokenizer, config.data), prompts.found.rows()
    if config.objective == "kto":
        singles = preferences.load_singles(config.data)
        return *tokenising.single_rows(singles.train, tokenizer, config.data), singles.found.rows()
    pairs = preferences.load_pairs(config.data)
    make = tokenising.pair_rows if config.objective in PREFERENCE else tokenising.chosen_rows
    return *make(pairs.train, tokenizer, config.data), pairs.found.rows()


def _check_length(config: AlignDistilConfig, longest_prompt: int) -> None:
    """Refuse own responses that `data.max_length` has no room for: nothing would cut them."""
    if config.on_policy is None:
        return
    new, limit = config.on_policy.max_new_tokens, config.data.max_length
    if longest_prompt + new > limit:
        raise ConfigError(
            f"config.on_policy.max_new_tokens = {new}: behind the longest prompt of {longest_prompt} tokens that is "
            f"{longest_prompt + new} tokens, config.data.max_length is {limit}, and own responses are not cut to it. "
            f"Lower max_new_tokens or config.data.max_prompt_length, or raise config.data.max_length"
        )


def _check_models(config: AlignDistilConfig) -> None:
    from tenfold.methods.aligndistil.agreement import check_vocabularies
    from tenfold.platform.models.heads import check_logit_options
    from tenfold.platform.models.loading import outline

    given = {"config.model": config.model}
    for name in ("dpo_model", "reverse_model"):
        source = getattr(config, name)
        if source is not None:
            given[f"config.{name}"] = source
    if config.objective == "rto" and config.rto.critic is not None:
        given["config.rto.critic"] = config.rto.critic
    for source in given.values():
        check_logit_options(outline(source).config)
    check_vocabularies(given)


def _check_batch(name: str, options: TrainingOptions, rows: int, workers: int) -> None:
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * workers
    if batch > rows:
        raise ConfigError(
            f"{name}: a step takes {batch} rows ({options.per_device_train_batch_size} x "
            f"{options.gradient_accumulation_steps} x {workers} workers), the training data has {rows}; use a smaller "
            "batch or fewer workers"
        )


def _stages(config: AlignDistilConfig) -> list[tuple[str, TrainingOptions]]:
    from tenfold.methods.aligndistil.stages import policy_is_dpo_model

    given = {"dpo": config.dpo_model, "reverse": config.reverse_model}
    first = [name for name in config.evaluated_names if name in given and given[name] is None]
    options = config.preference_training or config.training
    policy = [] if policy_is_dpo_model(config) else [(config.objective, config.training)]
    return [(name, options) for name in first] + policy


def _stage_text(options: TrainingOptions, rows: int, workers: int) -> str:
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * workers
    precision = "bfloat16" if options.use_bf16() else "float32"
    return (
        f"{options.steps(rows, workers):,} steps of {batch} rows ({options.per_device_train_batch_size} x "
        f"{options.gradient_accumulation_steps} accumulated x {workers} workers), peak rate "
        f"{options.learning_rate:g}, {precision}"
    )


def _model_rows(config: AlignDistilConfig, policy: ModelFacts, context: PlanContext) -> list[tuple[str, str]]:
    from tenfold.methods.aligndistil.loading import frozen_dtype
    from tenfold.platform.models.adapters import add_adapter, num_trained
    from tenfold.platform.models.loading import outline

    trained = policy.num_parameters
    if config.lora is not None:
        model = outline(config.model)
        add_adapter(model, config.lora)
        trained = num_trained(model)
    dtype = frozen_dtype(config)
    frozen = len(config.frozen_names) * policy.num_parameters * (2 if dtype == "bfloat16" else 4)
    logits = 4 * 6 * config.loss_chunk_rows * policy.vocabulary_size  # a few float32 copies of one chunk
    bodies = 2 if config.objective == "rto" else 1  # the critic is a second one
    memory = bodies * (4 * policy.num_parameters + ADAM * trained) + frozen + logits
    given = {"dpo": config.dpo_model, "reverse": config.reverse_model, "reference": config.model}
    sources = {name: given[name].name if given[name] is not None else "trained first" for name in config.frozen_names}  # type: ignore[union-attr]
    how = "on its own responses" if config.on_policy is not None else "on given responses"
    return [
        ("policy", f"{policy.name}: {policy.num_parameters:,} parameters, vocabulary {policy.vocabulary_size:,}"),
        ("trained", f"{trained:,} parameters" + (f" (LoRA, rank {config.lora.r})" if config.lora else "")),
        ("objective", f"{config.objective}, {how}"),
        *((name, f"{text}, frozen, {dtype}") for name, text in sources.items()),
        ("memory a worker", f"about {memory / 2**30:.2f} GiB without activations, before sharding (estimate)"),
    ]
