"""Builds the Trainer of every stage of an expansion, and of its competitors, on every worker."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.methods.layermoe.corpora import Corpus, group_of_language, languages_of, lines_by_language
from tenfold.methods.layermoe.evaluation import line_rows
from tenfold.methods.layermoe.expansion import trainable
from tenfold.methods.layermoe.insertion import train_copies
from tenfold.methods.layermoe.modeling import blocks_of, layout_of
from tenfold.methods.layermoe.module import ExpansionModule, Objective, old_tokens
from tenfold.methods.layermoe.packing import BlockCollator, packed_blocks
from tenfold.platform.errors import DataError, ModelError
from tenfold.platform.models.adapters import add_adapter
from tenfold.platform.models.cache import cache_folder
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.step_trainer import Batches, StepTrainer
from tenfold.platform.training.trainer import Trainer, perplexity_metrics
from tenfold.platform.training.worker import WorkerContext

Stage = Literal["base", "experts", "review", "full_ft", "lora", "llama_pro"]
Row = dict[str, Any]


class ExpansionTrainer(StepTrainer):
    """Trains one stage: the loss of a step does not depend on ranks or accumulation, but for the balance.

    The balance, a product of means, is the mean over the forward passes of a step.
    """

    evaluated: ClassVar[tuple[str, ...]] = ("nll", "num_labels", "language")

    def prepare_step(self, batches: Batches) -> Batches:
        """Give the batches of a review the old and real tokens and the sequences of the step, on all ranks."""
        if not batches or not self.model.objective.reads_groups:
            return batches
        # integers: the Trainer rounds other numbers of a batch to the model's dtype
        own = torch.zeros(3, dtype=torch.int64, device=self.args.device)
        for batch in batches:
            old = old_tokens(batch["attention_mask"], batch["group"], batch.get("old_mask"))
            counts = [old.sum(), batch["attention_mask"].sum(), torch.tensor(len(old), device=old.device)]
            own += torch.stack(counts).to(own.device)
        counted = self.accelerator.reduce(own, reduction="sum")
        names = ("num_old_tokens", "num_real_tokens", "num_sequences")
        return [{**batch, **dict(zip(names, counted, strict=True))} for batch in batches]


def build_trainer(context: WorkerContext) -> Trainer:
    """Load model and data on this worker and put them into a Trainer.

    `context.config` has the method's options under `layermoe`, the `stage`, and the source of the `model` that it
    trains; for `experts` and `review` an expanded one, for `llama_pro` one with `copies` of layers.

    Raises:
        ModelError: the model does not fit the stage.
        DataError: text is missing or too short.
    """
    payload = context.config
    config, stage = LayerMoEConfig.model_validate(payload["layermoe"]), payload["stage"]
    source = ModelSource.model_validate(payload["model"])
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, seed=context.seed, dtype="float32")
    choose_weights(model, config, stage, seed=context.seed, copies=payload.get("copies", ()))
    groups = group_of_language(config.data, earlier_expansions(model.config, stage))
    held_out = evaluated_languages(config, stage)
    return ExpansionTrainer(
        model=ExpansionModule(model, objective_of(config, stage, layout_of(model.config).classifier_layers)),
        args=context.arguments,
        train_dataset=training_blocks(config, stage, tokenizer, groups, seed=context.seed),
        eval_dataset=held_out_rows(config, stage, tokenizer, held_out),
        data_collator=BlockCollator(tokenizer.pad_token_id),
        compute_metrics=functools.partial(language_metrics, languages=held_out),
        processing_class=tokenizer,
        cosine_floor=context.options.lr_scheduler_type == "cosine_to_floor",
    )


def choose_weights(model: Any, config: LayerMoEConfig, stage: Stage, *, seed: int, copies: Sequence[int] = ()) -> None:
    """Let what a stage trains require gradients, and nothing else.

    Args:
        model: changed.
        config: the method's options.
        stage: what is trained.
        seed: decides the adapter of lora.
        copies: the layers that llama_pro trains.

    Raises:
        ModelError: the stage trains experts, and the model has none.
    """
    if stage == "lora":
        add_adapter(model, config.lora, seed=seed)
    elif stage == "llama_pro":
        train_copies(model, copies)
    elif stage == "review":
        trainable(model, 2)
    elif stage == "experts" and config.strategy != "moe":
        trainable(model, 1)
    elif stage == "experts" and not blocks_of(model):
        raise ModelError(f"{model.config.model_type}: strategy moe trains experts, and no layer has any. Expand it")


def objective_of(config: LayerMoEConfig, stage: Stage, classifier_layers: Sequence[int]) -> Objective:
    """Return the loss of a stage: balance in stage 1, prior and classifiers in stage 2, next-token loss in all."""
    chunk = config.loss_chunk_rows
    if stage == "experts":
        return Objective(balance_weight=config.balance_weight, chunk=chunk)
    if stage == "review":
        return Objective(
            prior_weight=config.prior_weight,
            classifier_weight=config.classifier_weight if classifier_layers else None,
            prior_form=config.prior_form,
            route_with=config.classifier.route_with if classifier_layers else "predicted",
            chunk=chunk,
        )
    return Objective(chunk=chunk)


def earlier_expansions(model_config: Any, stage: Stage) -> list[list[str]]:
    """Return the languages of the expansions before the one that is trained, as the model itself records them."""
    expansions = layout_of(model_config).languages["expansions"]
    return expansions[:-1] if stage in ("experts", "review") else expansions


def training_corpora(config: LayerMoEConfig, stage: Stage) -> list[Corpus]:
    """Return the text of a stage: old languages for the base, all of them for the review, else the new ones."""
    data = config.data
    if stage == "base":
        return list(data.old)
    return [*data.new, *data.earlier, *data.old] if stage == "review" else list(data.new)


def block_length(config: LayerMoEConfig, stage: Stage) -> int:
    """Return the tokens of a stage's blocks."""
    return config.data.stage2_length if stage == "review" else config.data.stage1_length


def training_blocks(
    config: LayerMoEConfig, stage: Stage, tokenizer: Any, groups: Mapping[str, int], *, seed: int
) -> Any:
    """Return a stage's blocks, which lie in the cache; the ranks of a node make them once.

    Raises:
        DataError: there is no text, it is too short, or the cache cannot be written.
    """
    from filelock import FileLock

    corpora = training_corpora(config, stage)
    if not corpora:
        raise DataError("data.old is empty: base_training trains on the old languages. Give documents of them")
    folder = cache_folder() / "layermoe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "blocks.lock")
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"{folder}: the cache cannot be written: {error}. Set XDG_CACHE_HOME to a folder that can"
        ) from error
    try:
        return packed_blocks(
            corpora,
            tokenizer,
            block_length(config, stage),
            seed,
            groups=groups,
            max_documents=config.data.max_documents if stage == "review" else None,
            token_budget=None if stage in ("base", "review") else config.data.token_budget,
            folder=folder,
        )
    finally:
        lock.release()


def evaluated_languages(config: LayerMoEConfig, stage: Stage) -> dict[str, str]:
    """Return language -> old, earlier or new, for those whose held-out text a stage is evaluated on.

    Those are all that have documents; for the base the old ones alone.
    """
    names = {language: name for name, group in config.data.groups().items() for language in group}
    found = {language: names[language] for language in languages_of(config.data.evaluation) if language in names}
    if stage == "base":
        return {language: name for language, name in found.items() if name == "old"}
    return found


def held_out_rows(config: LayerMoEConfig, stage: Stage, tokenizer: Any, languages: Mapping[str, str]) -> list[Row]:
    """Return a row for each held-out line or document (`evaluation.line_rows`), cut to the length of a block.

    Args:
        config: the method's options.
        stage: decides the length.
        tokenizer: with an EOS token.
        languages: language -> name of its group; only these, and `language` of a row is the place in them.

    Raises:
        DataError: a file cannot be used.
    """
    length = block_length(config, stage)
    corpora = [corpus for corpus in config.data.evaluation if corpus.language in languages]
    lines = lines_by_language(corpora, config.evaluation.max_lines)
    rows: list[Row] = []
    for number, (language, name) in enumerate(languages.items()):
        facts = {"old": name == "old", "group": int(name != "old"), "language": number}
        rows += [
            {**{column: ids[:length] for column, ids in row.items()}, **facts}
            for row in line_rows(lines[language], tokenizer)
        ]
    return rows


def language_metrics(prediction: Any, languages: Mapping[str, str]) -> dict[str, float]:
    """Return the metrics of held-out text from the columns of `ExpansionTrainer.evaluated`.

    Args:
        prediction: what the Trainer gathered, one row a line.
        languages: language -> name of its group, in the order of the column `language`.

    Returns:
        `nll` and `perplexity` of all label tokens, `nll_LANGUAGE`, and `nll_old`, `nll_earlier`, `nll_new` of the
        groups that are evaluated; nats per label token, NaN where there is none.
    """
    nll, counts, places = torch.as_tensor(prediction.predictions, dtype=torch.float64).T

    def mean(of: Sequence[int]) -> float:
        rows = torch.isin(places, torch.tensor(of, dtype=torch.float64))
        count = counts[rows].sum().item()
        return nll[rows].sum().item() / count if count else math.nan

    metrics = {f"nll_{language}": mean([number]) for number, language in enumerate(languages)}
    for group in dict.fromkeys(languages.values()):
        metrics[f"nll_{group}"] = mean([number for number, name in enumerate(languages.values()) if name == group])
    return {**perplexity_metrics(prediction), **metrics}
