"""The teacher reads the data once: hidden states of the label positions on disk, reused by epochs, seeds and trials.

Hidden states instead of logits: 2 D bytes a token instead of 2 V (DSKD, arXiv 2406.17328, works on them anyway).
Entries are named by a digest of the teacher, its dtype and the token ids, so that nothing stale is ever read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.data.shards import fill_shards, write_shard
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

logger = logging.getLogger(__name__)


def teacher_dtype(config: DSKDConfig) -> str:
    """Return the dtype the teacher computes in."""
    from tenfold.platform.hardware import supports_bf16

    if config.teacher_dtype == "auto":
        return "bfloat16" if supports_bf16() else "float32"
    return config.teacher_dtype


def cache_key(teacher: ModelSource, dtype: str, num_columns: int, rows: Sequence[dict[str, Any]]) -> str:
    """Return the digest that names the cached states of these rows; predictions are among `num_columns` tokens."""
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve

    content = {
        "teacher": model_digest(resolve(teacher)),
        "dtype": dtype,
        "columns": num_columns,
        "rows": [[row["input_ids"], row["labels"]] for row in rows],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class TeacherStates:
    """Where the states of some rows are in the cache, and the teacher's summed next-token loss (nats) and labels."""

    folder: str
    nll: float
    labels: int


def encode_rows(context: RunContext, config: DSKDConfig, rows: Sequence[dict[str, Any]], name: str) -> TeacherStates:
    """Make sure the teacher's states of `rows` are in the cache."""
    from tenfold.platform.models.loading import load_tokenizer

    dtype, num_columns = teacher_dtype(config), len(load_tokenizer(config.teacher))
    folder = f"teacher/{cache_key(config.teacher, dtype, num_columns, rows)}"
    logger.info("teacher reads %d %s rows, unless it has read them before (%s)", len(rows), name, dtype)
    plain = [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]
    common = {"teacher": config.teacher.model_dump(mode="json"), "dtype": dtype, "num_columns": num_columns}
    results = fill_shards(context, folder, encode_shard, plain, common)
    nll, labels = (sum(result[name] for result in results) for name in ("nll", "labels"))
    return TeacherStates(folder, nll, labels)


@functools.lru_cache(maxsize=1)
def _loaded(teacher: str, dtype: str, on_gpu: bool) -> Any:
    from tenfold.platform.models.hidden import check_head
    from tenfold.platform.models.loading import load_causal_lm

    model = load_causal_lm(ModelSource.model_validate_json(teacher), dtype=dtype).eval()
    check_head(model)
    return model.to("cuda") if on_gpu else model


def encode_shard(item: dict[str, Any]) -> dict[str, Any]:
    """Write one shard: `teacher_hidden` [n, D] in the teacher's dtype and `teacher_prediction` [n] of every row.

    Returns:
        The number of label positions and the teacher's summed next-token loss, which makes its perplexity free.
    """
    import torch
    from tenfold.platform.data.collator import CausalCollator
    from tenfold.platform.data.positions import label_positions, next_labels
    from tenfold.platform.losses.fused_linear import linear_argmax, linear_cross_entropy_rows
    from tenfold.platform.models.heads import head_of
    from tenfold.platform.models.hidden import final_hidden

    model = _loaded(json.dumps(item["teacher"]), item["dtype"], torch.cuda.is_available())
    head, bias = head_of(model)
    collate = CausalCollator(pad_token_id=0)
    rows = item["rows"]
    columns: list[dict[str, Any]] = [{} for _ in rows]
    nll, labels = 0.0, 0
    with torch.inference_mode():
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        for start in range(0, len(order), 8):
            chosen = order[start : start + 8]
            batch = {k: v.to(model.device) for k, v in collate([rows[index] for index in chosen]).items()}
            positions, targets = label_positions(batch["labels"]), next_labels(batch["labels"])
            states = final_hidden(model, batch["input_ids"], batch["attention_mask"])[positions]
            nll += linear_cross_entropy_rows(states, head, targets, bias=bias).double().sum().item()
            labels += len(targets)
            sizes = positions.sum(1).tolist()
            best = linear_argmax(states, head, bias=bias, num_columns=item["num_columns"]).int().split(sizes)
            for index, own, top in zip(chosen, states.split(sizes), best, strict=True):
                columns[index] = {"teacher_hidden": own.cpu(), "teacher_prediction": top.cpu()}
    write_shard(item, columns)
    return {"labels": labels, "nll": nll}
