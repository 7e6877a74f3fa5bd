"""DSKD as the platform drives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from tenfold.methods.dskd.config import Alignment, DSKDConfig
from tenfold.platform.errors import ConfigError
from tenfold.platform.method import Outcome, Paper, PlanSection

if TYPE_CHECKING:
    from tenfold.platform.context import PlanContext, RunContext
    from tenfold.platform.models.adapters import LoraOptions
    from tenfold.platform.models.source import ModelSource


class DSKD:
    """Distils one language model into another, whatever tokenizers they have."""

    name: ClassVar[str] = "dskd"
    summary: ClassVar[str] = "dual-space distillation between any two LLMs, with SFT, vanilla KD and others beside it"
    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Dual-Space Knowledge Distillation for Large Language Models", "2406.17328", 2024),
        Paper(
            "A Dual-Space Framework for General Knowledge Distillation of Large Language Models", "2504.11426", 2025
        ),
    )
    Config: ClassVar[type[DSKDConfig]] = DSKDConfig

    def plan(self, config: DSKDConfig, context: PlanContext) -> list[PlanSection]:
        """Check models, tokenizers and data; say sizes, steps and memory."""
        from tenfold.methods.dskd.preparation import find_alignment
        from tenfold.platform.data.examples import load_examples, read_examples
        from tenfold.platform.data.tokenise import tokenised_dataset
        from tenfold.platform.evaluation.judge_client import check_judge
        from tenfold.platform.models.heads import check_logit_options
        from tenfold.platform.models.loading import describe, load_tokenizer, outline
        from tenfold.platform.models.vllm_rollout import check_engine

        if config.on_policy is not None and config.on_policy.engine == "vllm":
            check_engine("config.on_policy.engine")
        if config.evaluation.judge is not None:
            check_judge(config.evaluation.judge)
        student, teacher = describe(config.student), describe(config.teacher)
        for source in (config.student, config.teacher):
            check_logit_options(outline(source).config)
        tokenizer = load_tokenizer(config.student)
        alignment = find_alignment(config)
        splits = load_examples(config.data)
        sets = {name: read_examples(sources, config.data, name)[0] for name, sources in config.test_sets.items()}
        rows = tokenised_dataset(splits.train, tokenizer, config.data)
        labels = sum(sum(label != -100 for label in row) for row in rows["labels"])
        options, workers = config.training, context.compute.max_workers
        batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * workers
        if batch > len(rows):
            raise ConfigError(
                f"a step takes {batch} rows ({options.per_device_train_batch_size} x "
                f"{options.gradient_accumulation_steps} x {workers} workers), the training data has {len(rows)}; "
                "use a smaller batch or fewer workers"
            )
        trained = student.num_parameters if config.lora is None else _adapter_size(config.student, config.lora)
        # fp32 weights, and of the trained ones gradients and two AdamW moments; logits of one chunk in a few copies
        memory = 4 * (student.num_parameters + (trained if config.lora else 0)) + 12 * trained
        memory += 16 * config.loss_chunk_rows * student.vocabulary_size
        models = PlanSection(
            "models",
            (
                (
                    "student",
                    f"{student.name}: {student.num_parameters:,} parameters, vocabulary {student.vocabulary_size:,}",
                ),
                ("trained", f"{trained:,} parameters" + (f" (LoRA, rank {config.lora.r})" if config.lora else "")),
                ("teacher", f"{teacher.name}: {teacher.num_parameters:,} parameters ({_teacher_text(config)})"),
                ("objective", config.objective + (f", {config.divergence}" if config.needs_teacher else "")),
                ("tokenizers", _alignment_text(config, alignment)),
            ),
        )
        work = PlanSection(
            "work",
            (
                ("training rows", f"{len(rows):,} ({sum(rows['length']):,} tokens, {labels:,} of them labels)"),
                ("validation rows", f"{len(splits.validation):,}"),
                ("test sets", ", ".join(f"{name} {len(examples):,}" for name, examples in sets.items()) or "none"),
                ("skipped rows", f"{splits.skipped:,}"),
                (
                    "rows in a step",
                    f"{batch} = {options.per_device_train_batch_size} x "
                    f"{options.gradient_accumulation_steps} accumulated x {workers} workers",
                ),
                ("steps", f"{options.steps(len(rows), workers):,}"),
                ("precision", "bfloat16" if options.use_bf16() else "float32"),
                ("memory a worker", f"about {memory / 2**30:.2f} GiB without activations, before sharding (estimate)"),
            ),
        )
        return [models, work]

    def run(self, config: DSKDConfig, context: RunContext) -> Outcome:
        """Let the teacher read the data, train the student, evaluate it, keep it."""
        from tenfold.methods.dskd.preparation import prepare
        from tenfold.methods.dskd.trainer import build_trainer
        from tenfold.platform.data.examples import load_examples
        from tenfold.platform.models.manifest import Parent, model_digest
        from tenfold.platform.models.references import resolve
        from tenfold.platform.training.launch import TrainingJob

        splits = load_examples(config.data)
        payload = prepare(config, context, splits)
        result = context.train(TrainingJob(build_trainer, payload, config.training))
        parents = [
            Parent(kind="teacher", reference=config.teacher.name, digest=model_digest(resolve(config.teacher))),
            Parent(
                kind="data", reference=", ".join(source.path for source in config.data.train), digest=splits.digest
            ),
        ]
        trained = {name: value for name, value in result.best.metrics.items() if name.startswith("eval/")}
        model = context.save_model(
            result.best.path, name="student", flavor="causal-lm", metrics=trained, parents=parents
        )
        if context.trial is not None and not config.evaluation.in_sweeps:
            # a sweep compares what training measured; `evaluate` gives the rest for the trial one keeps
            return Outcome(metrics=trained, model=model)
        metrics = self.evaluate(config, context.storage.uri_of(model), context)
        return Outcome(metrics=metrics, artifacts={"responses": "responses.jsonl"}, model=model)

    def evaluate(self, config: DSKDConfig, model: str, context: RunContext) -> Mapping[str, float]:
        """Perplexity and ROUGE-L on the validation rows and the test sets, of the student and of the teacher."""
        from tenfold.methods.dskd.evaluation import measure

        return measure(config, model, context)


def _adapter_size(source: ModelSource, options: LoraOptions) -> int:
    from tenfold.platform.models.adapters import add_adapter, num_trained
    from tenfold.platform.models.loading import outline

    model = outline(source)
    add_adapter(model, options)
    return num_trained(model)


def _teacher_text(config: DSKDConfig) -> str:
    return config.teacher_mode + (", weights in main memory" if config.teacher_offload == "cpu" else "")


def _alignment_text(config: DSKDConfig, alignment: Alignment) -> str:
    return {
        "none": "one for both" if config.needs_teacher else "the student's",
        "cma": "two: cross-model attention",
        "eta": f"pairs of equal tokens ({config.eta_mode})",
        "order": "paired in order",
        "mined": "paired by edit distance",
    }[alignment]
