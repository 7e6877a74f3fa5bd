"""DSKD as the platform drives it."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.errors import ConfigError
from tenfold.platform.method import Outcome, Paper, PlanSection
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.platform.context import PlanContext, RunContext


class DSKD:
    """Distils one language model into another that has the same tokenizer."""

    name: ClassVar[str] = "dskd"
    summary: ClassVar[str] = "dual-space distillation of one LLM into another, with SFT and vanilla KD beside it"
    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Dual-Space Knowledge Distillation for Large Language Models", "2406.17328", 2024),
        Paper(
            "A Dual-Space Framework for General Knowledge Distillation of Large Language Models", "2504.11426", 2025
        ),
    )
    Config: ClassVar[type[DSKDConfig]] = DSKDConfig

    def plan(self, config: DSKDConfig, context: PlanContext) -> list[PlanSection]:
        """Check models, tokenizers and data; say sizes, steps and memory."""
        from tenfold.platform.data.examples import load_examples
        from tenfold.platform.data.tokenise import tokenised_dataset
        from tenfold.platform.models.loading import describe, load_tokenizer, same_tokenizer

        student, teacher = describe(config.student), describe(config.teacher)
        tokenizer = load_tokenizer(config.student)
        if config.needs_teacher and not same_tokenizer(tokenizer, load_tokenizer(config.teacher)):
            raise ConfigError(
                f"config.objective = {config.objective}: needs one vocabulary; the student's tokenizer has "
                f"{student.tokenizer_length} entries, the teacher's {teacher.tokenizer_length}, and they encode "
                "differently. Give the student the teacher's tokenizer, or use config.objective=sft"
            )
        splits = load_examples(config.data)
        rows = tokenised_dataset(splits.train, tokenizer, config.data)
        labels = sum(sum(label != -100 for label in row) for row in rows["labels"])
        options, workers = config.training, context.compute.workers
        batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * workers
        if batch > len(rows):
            raise ConfigError(
                f"a step takes {batch} rows ({options.per_device_train_batch_size} x "
                f"{options.gradient_accumulation_steps} x {workers} workers), the training data has {len(rows)}; "
                "use a smaller batch or fewer workers"
            )
        # fp32 weights, gradients and two AdamW moments; logits of one chunk in a few copies
        memory = 16 * student.num_parameters + 16 * config.loss_chunk_rows * student.vocabulary_size
        models = PlanSection(
            "models",
            (
                (
                    "student",
                    f"{student.name}: {student.num_parameters:,} parameters, vocabulary {student.vocabulary_size:,}",
                ),
                ("teacher", f"{teacher.name}: {teacher.num_parameters:,} parameters ({config.teacher_mode})"),
                ("objective", config.objective + (f", {config.divergence}" if config.needs_teacher else "")),
            ),
        )
        work = PlanSection(
            "work",
            (
                ("training rows", f"{len(rows):,} ({sum(rows['length']):,} tokens, {labels:,} of them labels)"),
                ("validation rows", f"{len(splits.validation):,}"),
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
        from tenfold.methods.dskd.teacher import encode_rows
        from tenfold.methods.dskd.trainer import build_trainer
        from tenfold.platform.data.examples import load_examples
        from tenfold.platform.data.tokenise import tokenised_dataset
        from tenfold.platform.models.loading import load_tokenizer
        from tenfold.platform.models.manifest import Parent, model_digest
        from tenfold.platform.models.references import resolve
        from tenfold.platform.training.launch import TrainingJob

        splits = load_examples(config.data)
        payload: dict[str, Any] = {"dskd": config.model_dump(mode="json"), "cache": context.cache.uri}
        if config.needs_teacher and config.teacher_mode == "cache":
            rows = tokenised_dataset(splits.train, load_tokenizer(config.student), config.data)
            payload["states"] = encode_rows(context, config, list(rows), "training")
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
        if context.trial is not None:
            # a sweep compares what training measured; `evaluate` gives the rest for the trial one keeps
            return Outcome(metrics=trained, model=model)
        with tempfile.TemporaryDirectory(prefix="tenfold-student-") as scratch:
            metrics = self.evaluate(config, context.storage.download(model, Path(scratch) / "model"), context)
        return Outcome(metrics=metrics, artifacts={"responses": "responses.jsonl"}, model=model)

    def evaluate(self, config: DSKDConfig, model: Path, context: RunContext) -> Mapping[str, float]:
        """Perplexity and ROUGE-L on the validation rows, of the student and of the teacher."""
        from tenfold.methods.dskd.teacher import encode_rows, teacher_dtype, teacher_nll
        from tenfold.platform.data.examples import load_examples
        from tenfold.platform.data.tokenise import prompt_ids, tokenised_dataset
        from tenfold.platform.evaluation.perplexity import perplexity, token_nll
        from tenfold.platform.evaluation.responses import response_metrics
        from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
        from tenfold.platform.models.manifest import model_digest
        from tenfold.platform.models.references import resolve

        source = ModelSource(model=str(model))
        tokenizer = load_tokenizer(source)
        examples = load_examples(config.data).validation
        rows = tokenised_dataset(examples, tokenizer, config.data)
        total, count = token_nll(load_causal_lm(source, dtype="float32"), rows)
        metrics = {"eval/nll": total / count, "eval/perplexity": perplexity(total, count)}
        chosen = [examples[index] for index in rows["index"]][: config.evaluation.max_rows]
        prompts = [prompt_ids(example, tokenizer, config.data) for example in chosen]
        references = [example.responses for example in chosen]
        own, texts = response_metrics(
            context, source, prompts, references, config.evaluation, digest=model_digest(model)
        )
        metrics |= {f"eval/{name}": value for name, value in own.items()}
        states = encode_rows(context, config, list(rows), "validation")
        mean = teacher_nll(context.cache, states)
        metrics |= {"teacher/nll": mean, "teacher/perplexity": math.exp(mean)}
        theirs, teacher_texts = response_metrics(
            context,
            config.teacher,
            prompts,
            references,
            config.evaluation,
            digest=model_digest(resolve(config.teacher)),
            dtype=teacher_dtype(config),
        )
        metrics |= {f"teacher/{name}": value for name, value in theirs.items()}
        lines = [
            {
                "prompt": example.messages[-1]["content"],
                "reference": example.responses[0],
                "student": one,
                "teacher": two,
            }
            for example, one, two in zip(chosen, texts, teacher_texts, strict=True)
        ]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        context.storage.write_text("responses.jsonl", text + "\n")
        context.tracker.log_text(text + "\n", "responses.jsonl")
        return metrics
