"""Builds DSKD's Trainer on every worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.module import DistillationModule
from tenfold.methods.dskd.teacher import teacher_dtype, with_teacher
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.examples import load_examples
from tenfold.platform.data.tokenise import tokenised_dataset
from tenfold.platform.models.heads import head_from_folder
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.randomness import seeded
from tenfold.platform.models.references import resolve
from tenfold.platform.storage import Storage
from tenfold.platform.training.frozen import prepare_frozen
from tenfold.platform.training.trainer import Trainer, perplexity_metrics
from tenfold.platform.training.worker import WorkerContext


def build_trainer(context: WorkerContext) -> Trainer:
    """Load student, data and teacher on this worker and put them into a Trainer.

    `context.config` has DSKD's options under `dskd`, the cache's address under `cache` and, with a cached teacher, the
    folder of its training states under `states`.
    """
    config = DSKDConfig.model_validate(context.config["dskd"])
    tokenizer = load_tokenizer(config.student)
    splits = load_examples(config.data)
    rows: Any = tokenised_dataset(splits.train, tokenizer, config.data)
    validation = tokenised_dataset(splits.validation, tokenizer, config.data)
    student = load_causal_lm(config.student, seed=context.seed, dtype="float32")
    teacher, teacher_head = None, None
    if config.needs_teacher and config.teacher_mode == "cache":
        # the output folder is this worker's own and goes with it
        scratch = Path(context.arguments.output_dir)
        rows = with_teacher(rows, Storage(context.config["cache"]), context.config["states"], scratch)
        # float32 mathematics needs float32 weights; a bfloat16 student takes the smaller form
        dtype = "bfloat16" if context.arguments.bf16 else "float32"
        teacher_head = head_from_folder(resolve(config.teacher)).to(getattr(torch, dtype))
    elif config.needs_teacher:
        model = load_causal_lm(config.teacher, dtype=teacher_dtype(config))
        teacher = prepare_frozen(model, context.deepspeed, context.arguments.device)
    with seeded(context.seed):  # v1 draws its projectors
        module = DistillationModule(
            student, config, num_columns=len(tokenizer), teacher_head=teacher_head, teacher=teacher
        )
    plain = CausalCollator(tokenizer.pad_token_id)
    taught = CausalCollator(tokenizer.pad_token_id, ragged=("teacher_hidden", "teacher_prediction"))

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return (taught if "teacher_hidden" in batch[0] else plain)(batch)  # validation rows have no teacher

    return Trainer(
        model=module,
        args=context.arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=perplexity_metrics,
        processing_class=tokenizer,
        cosine_floor=config.training.lr_scheduler_type == "cosine_to_floor",
        projector_learning_rate=config.projector_learning_rate,
    )
