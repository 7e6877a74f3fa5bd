"""The teacher reads the data once: hidden states of the label positions on disk, reused by epochs, seeds and trials.

Hidden states instead of logits: 2 D bytes a token instead of 2 V (DSKD, arXiv 2406.17328, works on them anyway).
Entries are named by a digest of the teacher, its dtype and the token ids, so that nothing stale is ever read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.models.source import ModelSource
from tenfold.platform.storage import Storage

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext
    from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 64
META = "meta.json"


def teacher_dtype(config: DSKDConfig) -> str:
    """Return the dtype the teacher computes in."""
    from tenfold.platform.hardware import supports_bf16

    if config.teacher_dtype == "auto":
        return "bfloat16" if supports_bf16() else "float32"
    return config.teacher_dtype


def cache_key(teacher: ModelSource, dtype: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the digest that names the cached states of these rows."""
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve

    content = {
        "teacher": model_digest(resolve(teacher)),
        "dtype": dtype,
        "rows": [[row["input_ids"], row["labels"]] for row in rows],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def encode_rows(context: RunContext, config: DSKDConfig, rows: Sequence[dict[str, Any]], name: str) -> str:
    """Make sure the teacher's states of `rows` are in the cache; return their folder there.

    Shards go to the cluster as independent pieces; a run that is stopped keeps the finished ones.
    """
    dtype = teacher_dtype(config)
    folder = f"teacher/{cache_key(config.teacher, dtype, rows)}"
    if context.cache.exists(f"{folder}/{META}"):
        logger.info("teacher states of the %s rows: already cached", name)
        return folder
    logger.info("teacher reads %d %s rows once (%s)", len(rows), name, dtype)
    shards = math.ceil(len(rows) / ROWS_PER_SHARD)
    items = [
        {
            "teacher": config.teacher.model_dump(mode="json"),
            "dtype": dtype,
            "cache": context.cache.uri,
            "path": f"{folder}/shard-{shard:05d}",
            "rows": [
                {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}
                for row in (
                    rows[i] for i in range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(rows)))
                )
            ],
        }
        for shard in range(shards)
    ]
    compute = context.compute
    results = context.map(
        encode_shard,
        items,
        name=f"teacher-{folder.rpartition('/')[2]}",
        cpus=compute.cpus_per_worker,
        gpus=compute.gpus_per_worker,
    )
    meta = {
        "counts": [count for result in results for count in result["counts"]],
        "nll": sum(result["nll"] for result in results),
    }
    context.cache.write_text(f"{folder}/{META}", json.dumps(meta))
    return folder


@functools.lru_cache(maxsize=1)
def _loaded(teacher: str, dtype: str, on_gpu: bool) -> Any:
    from tenfold.platform.models.hidden import check_head
    from tenfold.platform.models.loading import load_causal_lm

    model = load_causal_lm(ModelSource.model_validate_json(teacher), dtype=dtype).eval()
    check_head(model)
    return model.to("cuda") if on_gpu else model


def encode_shard(item: dict[str, Any]) -> dict[str, Any]:
    """Write one shard: `hidden` [N, D] in the teacher's dtype and `prediction` [N] int32; runs on a worker.

    Returns:
        Label positions per row and the teacher's summed next-token loss, which makes its perplexity free.
    """
    import tempfile

    import torch
    from safetensors.torch import save_file
    from tenfold.platform.data.collator import CausalCollator
    from tenfold.platform.data.positions import label_positions, next_labels
    from tenfold.platform.losses.fused_linear import linear_argmax, linear_cross_entropy_rows
    from tenfold.platform.models.heads import head_of
    from tenfold.platform.models.hidden import final_hidden

    model = _loaded(json.dumps(item["teacher"]), item["dtype"], torch.cuda.is_available())
    head, bias = head_of(model)
    collate = CausalCollator(pad_token_id=0)
    rows = item["rows"]
    hidden: list[Any] = [None] * len(rows)
    prediction: list[Any] = [None] * len(rows)
    nll = 0.0
    with torch.inference_mode():
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        for start in range(0, len(order), 8):
            chosen = order[start : start + 8]
            batch = {k: v.to(model.device) for k, v in collate([rows[index] for index in chosen]).items()}
            positions = label_positions(batch["labels"])
            states = final_hidden(model, batch["input_ids"], batch["attention_mask"])[positions]
            nll += (
                linear_cross_entropy_rows(states, head, next_labels(batch["labels"]), bias=bias).double().sum().item()
            )
            sizes = positions.sum(1).tolist()
            best = linear_argmax(states, head, bias=bias).int().split(sizes)
            for index, own, top in zip(chosen, states.split(sizes), best, strict=True):
                hidden[index], prediction[index] = own.cpu(), top.cpu()
    with tempfile.TemporaryDirectory() as scratch:
        tensors = {"hidden": torch.cat(hidden).contiguous(), "prediction": torch.cat(prediction).contiguous()}
        save_file(tensors, Path(scratch) / "states.safetensors")
        Storage(item["cache"]).upload(scratch, item["path"])
    return {"counts": [len(own) for own in hidden], "nll": nll}


def teacher_nll(cache: Storage, folder: str) -> float:
    """Return the teacher's mean next-token loss in nats over the cached rows."""
    meta = json.loads(cache.read_text(f"{folder}/{META}"))
    return meta["nll"] / max(sum(meta["counts"]), 1)


def with_teacher(rows: Any, cache: Storage, folder: str, scratch: Path) -> Dataset:
    """Return the rows with `teacher_hidden` [n, D] and `teacher_prediction` [n] added, read from disk as needed."""
    import torch
    from safetensors import safe_open
    from torch.utils.data import Dataset as TorchDataset

    meta = json.loads(cache.read_text(f"{folder}/{META}"))
    local = cache.download(folder, scratch / "teacher")

    class TeacherRows(TorchDataset):
        def __init__(self) -> None:
            self._offsets: list[int] = []
            for start in range(0, len(meta["counts"]), ROWS_PER_SHARD):
                offset = 0
                for count in meta["counts"][start : start + ROWS_PER_SHARD]:
                    self._offsets.append(offset)
                    offset += count

        def __len__(self) -> int:
            return len(rows)

        @functools.cache  # noqa: B019 (lives as long as the training)
        def _shard(self, number: int) -> Any:
            return safe_open(local / f"shard-{number:05d}" / "states.safetensors", framework="pt")

        def __getitem__(self, index: int) -> dict[str, Any]:
            shard, start = self._shard(index // ROWS_PER_SHARD), self._offsets[index]
            stop = start + meta["counts"][index]
            return {
                **rows[index],
                "teacher_hidden": shard.get_slice("hidden")[start:stop],
                "teacher_prediction": shard.get_slice("prediction")[start:stop].to(torch.int64),
            }

    return TeacherRows()
