"""Builds DSKD's Trainer on every worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tenfold.methods.dskd import cross_module, dual_space_module
from tenfold.methods.dskd.collator import TaughtRows, TeachingCollator
from tenfold.methods.dskd.config import Alignment, DSKDConfig
from tenfold.methods.dskd.module import DistillationModule
from tenfold.methods.dskd.on_policy import OnPolicyTrainer, Rollout
from tenfold.methods.dskd.pairing import read_minimum_edit_tables, teacher_rows
from tenfold.methods.dskd.sequence_level import with_responses
from tenfold.methods.dskd.step_trainer import DistillationTrainer
from tenfold.methods.dskd.teacher import teacher_dtype
from tenfold.methods.dskd.vocabulary import overlap, teacher_labels
from tenfold.platform.data.examples import load_examples
from tenfold.platform.data.shards import ShardedRows
from tenfold.platform.data.tokenise import tokenised_dataset
from tenfold.platform.models.adapters import add_adapter
from tenfold.platform.models.heads import embedding_from_folder, head_and_bias_from_folder
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.randomness import seeded
from tenfold.platform.models.references import resolve
from tenfold.platform.storage import Storage
from tenfold.platform.training.frozen import load_frozen
from tenfold.platform.training.trainer import Trainer, perplexity_metrics
from tenfold.platform.training.worker import WorkerContext

# objective and alignment -> what is trained; all others: the plain module
MODULES: dict[tuple[str, Alignment], type[DistillationModule]] = {
    ("dual_space_v1", "none"): dual_space_module.DualSpaceV1,
    ("dual_space_v2", "none"): dual_space_module.DualSpaceV2,
    ("dual_space_v1", "cma"): cross_module.CrossModelAttention,
    ("dual_space_v2", "eta"): cross_module.ExactAlignment,
    ("overlap_kd", "eta"): cross_module.OverlapKD,
    ("uld", "order"): cross_module.ULD,
    ("mined", "mined"): cross_module.MinED,
}


def build_trainer(context: WorkerContext) -> Trainer:
    """Load student, data and teacher on this worker and put them into a Trainer.

    `context.config` has DSKD's options under `dskd`, the cache's address under `cache`, how positions are paired under
    `alignment`, and where in the cache the teacher's training `states`, the `pairs`, MinED's `tables` and the
    teacher's `responses` (SeqKD) are, as far as the objective needs them (`preparation.prepare`).
    """
    payload = context.config
    config = DSKDConfig.model_validate(payload["dskd"])
    tokenizer = load_tokenizer(config.student)
    splits = load_examples(config.data)
    examples = with_responses(splits.train, Storage(payload["cache"]), payload.get("responses"))
    rows: Any = tokenised_dataset(examples, tokenizer, config.data)
    validation = tokenised_dataset(splits.validation, tokenizer, config.data)
    student = load_causal_lm(config.student, seed=context.seed, dtype="float32")
    if config.lora is not None:
        add_adapter(student, config.lora, seed=context.seed)
    teacher_tokenizer, parts = tokenizer, {}
    if config.needs_teacher:
        teacher_tokenizer = load_tokenizer(config.teacher)
        # the output folder is this worker's own and goes with it
        scratch, cache = Path(context.arguments.output_dir), Storage(payload["cache"])
        folders = {name: payload[name] for name in ("states", "pairs") if name in payload}
        columns = [ShardedRows(cache.download(folder, scratch / name)) for name, folder in folders.items()]
        other = payload["alignment"] != "none"
        theirs = teacher_rows(rows, examples, teacher_tokenizer, config) if other else None
        rows = TaughtRows(rows, theirs, columns)
        parts = _teacher_parts(context, config) | _vocabulary_parts(config, payload, tokenizer, teacher_tokenizer)
    with seeded(context.seed):  # projectors are drawn
        module = make_module(student, config, payload["alignment"], num_columns=len(tokenizer), **parts)
    collator = TeachingCollator(tokenizer.pad_token_id, teacher_tokenizer.pad_token_id)
    settings: dict[str, Any] = {
        "model": module,
        "args": context.arguments,
        "train_dataset": rows,
        "eval_dataset": validation,
        "data_collator": collator,
        "compute_metrics": perplexity_metrics,
        "processing_class": tokenizer,
        "cosine_floor": config.training.lr_scheduler_type == "cosine_to_floor",
        "projector_learning_rate": config.projector_learning_rate,
    }
    if config.on_policy is None:
        return DistillationTrainer(**settings)
    other = teacher_tokenizer if payload["alignment"] != "none" else None
    return OnPolicyTrainer(rollout=Rollout(config, tokenizer, other, collator, context.seed), **settings)


def make_module(student: Any, config: DSKDConfig, alignment: Alignment, **parts: Any) -> DistillationModule:
    """Return what is trained for an objective; `parts` are the arguments of its class."""
    return MODULES.get((config.objective, alignment), DistillationModule)(student, config, **parts)


def _teacher_parts(context: WorkerContext, config: DSKDConfig) -> dict[str, Any]:
    """Return the live teacher, or of a cached one the weights that the loss reads."""
    if config.teacher_mode == "live":
        teacher = load_frozen(
            config.teacher,
            dtype=teacher_dtype(config),
            deepspeed_settings=context.deepspeed,
            device=context.arguments.device,
            offload=config.teacher_offload,
        )
        return {"teacher": teacher}
    # float32 mathematics needs float32 weights; a bfloat16 student takes the smaller form
    dtype = torch.bfloat16 if context.arguments.bf16 else torch.float32
    folder = resolve(config.teacher)
    head, bias = head_and_bias_from_folder(folder)
    parts: dict[str, Any] = {"teacher_head": head.to(dtype), "teacher_bias": None if bias is None else bias.to(dtype)}
    if context.config["alignment"] == "cma":
        parts["teacher_embedding"] = embedding_from_folder(folder).to(dtype)
    return parts


def _vocabulary_parts(
    config: DSKDConfig, payload: dict[str, Any], tokenizer: Any, teacher_tokenizer: Any
) -> dict[str, Any]:
    """Return what a module needs to know of two vocabularies."""
    alignment = payload["alignment"]
    if alignment == "none":
        return {}
    vocabularies = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    ends = tokenizer.eos_token_id, teacher_tokenizer.eos_token_id
    parts: dict[str, Any] = {"num_teacher_columns": len(teacher_tokenizer)}
    if alignment in ("cma", "eta"):
        parts["overlap"] = overlap(*vocabularies, *ends, topk_vocab=config.topk_vocab)
    if config.objective in ("dual_space_v1", "dual_space_v2"):
        parts["t2s_id"] = teacher_labels(*vocabularies, *ends, len(teacher_tokenizer))
    if alignment == "mined":
        parts["student_to_teacher"] = read_minimum_edit_tables(Storage(payload["cache"]), payload["tables"])[1]
    return parts
