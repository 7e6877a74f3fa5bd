"""Prepares data for two tokenizers: the teacher's rows of the same examples, and which positions correspond.

All of it is computed once over the cluster, before training, and kept in the cache under a digest of the rows and the
tokenizers. A position k is the k-th label position of a row.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.data.shards import fill_shards, write_shard
from tenfold.platform.errors import DataError
from tenfold.platform.models.source import ModelSource
from tenfold.platform.storage import Storage

if TYPE_CHECKING:
    import numpy as np
    from tenfold.platform.context import RunContext
    from tenfold.platform.data.examples import Example
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row = dict[str, Any]
TABLES = "tables.safetensors"


def teacher_rows(
    rows: Sequence[Row], examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DSKDConfig
) -> list[Row]:
    """Return `input_ids` and `labels` of the teacher's tokenizer for the examples of the student's rows.

    A teacher whose prompt fills `max_length` has a row without labels, and teaches nothing there.
    """
    from tenfold.platform.data.tokenise import tokenise

    return [tokenise(examples[row["index"]], tokenizer, config.data) for row in rows]


@dataclass(frozen=True)
class Pairs:
    """Where the pairs of some rows are in the cache, and what is known of them.

    Attributes:
        folder: in the cache.
        share: paired positions of all label positions of the student.
        spelled_differently: rows whose two byte strings differ.
    """

    folder: str
    share: float
    spelled_differently: int


def pair_rows(
    context: RunContext,
    config: DSKDConfig,
    rows: Sequence[Row],
    teacher: Sequence[Row],
    examples: Sequence[Example],
    kind: str,
    tables: str | None = None,
) -> Pairs:
    """Make sure that the pairs of `rows` are in the cache; say which share of the student's labels has one.

    Args:
        context: the run.
        config: DSKD's options.
        rows: the student's rows.
        teacher: the teacher's rows of the same examples.
        examples: the examples that the rows' `index` counts.
        kind: eta or mined.
        tables: folder of `minimum_edit_folder`, for mined.

    Raises:
        DataError: there is no pair at all.
    """
    from tenfold.platform.models.loading import load_tokenizer, tokenizer_digest

    plain = [
        {
            "student": [list(row["input_ids"]), list(row["labels"])],
            "teacher": [list(theirs["input_ids"]), list(theirs["labels"])],
            "response": examples[row["index"]].responses[0],
        }
        for row, theirs in zip(rows, teacher, strict=True)
    ]
    tokenizers = [tokenizer_digest(load_tokenizer(source)) for source in (config.student, config.teacher)]
    content = json.dumps([kind, config.eta_mode if kind == "eta" else "", tokenizers, plain])
    folder = f"pairs/{hashlib.sha256(content.encode()).hexdigest()[:24]}"
    common = {
        "kind": kind,
        "eta_mode": config.eta_mode,
        "tables": tables,
        "sources": [source.model_dump(mode="json") for source in (config.student, config.teacher)],
    }
    results = fill_shards(context, folder, pair_shard, plain, common)
    pairs, labels, differing = (sum(result[name] for result in results) for name in ("pairs", "labels", "differing"))
    if not pairs:
        raise DataError(
            f"config.objective = {config.objective}: none of the student's {labels} label tokens has a counterpart "
            "among the teacher's, so there is nothing to compare. Use config.objective=dual_space_v1 or uld, which "
            "need no equal tokens, or another teacher"
        )
    found = Pairs(folder, pairs / max(labels, 1), differing)
    logger.info(
        "%s: %.1f %% of the student's labels have a counterpart; %d of %d responses are spelled differently",
        config.eta_mode if kind == "eta" else kind,
        100 * found.share,
        differing,
        len(rows),
    )
    return found


def minimum_edit_folder(cache: Storage, config: DSKDConfig) -> str:
    """Make sure that MinED's vocabulary tables of the two tokenizers are in the cache; return their folder there."""
    import tempfile

    from safetensors.torch import save_file
    from tenfold.methods.dskd.vocabulary import minimum_edit_tables
    from tenfold.platform.models.loading import describe, load_tokenizer, tokenizer_digest

    sources = (config.student, config.teacher)
    tokenizers = [load_tokenizer(source) for source in sources]
    rows = [describe(source).vocabulary_size for source in sources]
    content = json.dumps([[tokenizer_digest(tokenizer) for tokenizer in tokenizers], rows])
    folder = f"tables/{hashlib.sha256(content.encode()).hexdigest()[:24]}"
    if not cache.exists(f"{folder}/{TABLES}"):
        logger.info("comparing the two vocabularies by edit distance, once")
        vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
        ends = [tokenizer.eos_token_id for tokenizer in tokenizers]
        forward, backward = minimum_edit_tables(*vocabularies, *ends, *rows)
        with tempfile.TemporaryDirectory() as scratch:
            save_file({"teacher_to_student": forward, "student_to_teacher": backward}, Path(scratch) / TABLES)
            cache.upload(scratch, folder)
    return folder


def read_minimum_edit_tables(cache: Storage, folder: str) -> tuple[Tensor, Tensor]:
    """Return the maps teacher -> student [V_t] and student -> teacher [V_s], int64, -1 = none."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        tables = load_file(cache.download(f"{folder}/{TABLES}", Path(scratch) / TABLES))
    return tables["teacher_to_student"], tables["student_to_teacher"]


@dataclass(frozen=True)
class _Side:
    """One tokenizer with the tables that pairing reads."""

    tokenizer: Any
    tokens: list[str]

    @functools.cached_property
    def bytes(self) -> list[bytes]:
        from tenfold.methods.dskd.token_bytes import token_bytes

        return token_bytes(self.tokenizer)

    def strings(self, ids: Sequence[int]) -> list[str]:
        return [self.tokens[index] for index in ids]

    def offsets(self, text: str) -> np.ndarray:
        import numpy as np

        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)


@functools.lru_cache(maxsize=4)
def _side(source: str) -> _Side:
    from tenfold.platform.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelSource.model_validate_json(source))
    vocabulary = tokenizer.get_vocab()
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        tokens[index] = token
    return _Side(tokenizer, tokens)


def pair_shard(item: dict[str, Any]) -> dict[str, Any]:
    """Write the pairs of one shard: `student_pairs` and `teacher_pairs` [K] of every row, or `teacher_position` [N].

    Returns:
        The number of pairs, of the student's labels, and of rows that are spelled differently.
    """
    import torch

    student, teacher = (_side(json.dumps(source)) for source in item["sources"])
    pair = (_mined_pairing if item["kind"] == "mined" else _exact_pairing)(item, student, teacher)
    columns, pairs, labels, differing = [], 0, 0, 0
    for row in item["rows"]:
        found, differs = pair(row)
        columns.append({name: torch.as_tensor(values, dtype=torch.int32) for name, values in found.items()})
        first = next(iter(found.values()))
        pairs += int((first >= 0).sum())
        labels += sum(label != IGNORED for label in row["student"][1])
        differing += bool(differs)
    write_shard(item, columns)
    return {"pairs": pairs, "labels": labels, "differing": differing}


def _exact_pairing(item: dict[str, Any], student: _Side, teacher: _Side) -> Callable[[Row], tuple[Row, bool]]:
    """Exact token alignment of the labels (v2), in either mode."""
    from tenfold.methods.dskd.alignment import byte_span, official

    ends = student.tokenizer.eos_token_id, teacher.tokenizer.eos_token_id

    def pair(row: Row) -> tuple[Row, bool]:
        own, theirs = (_responses(row[side]) for side in ("student", "teacher"))
        if item["eta_mode"] == "official":
            found = official(
                student.strings(own),
                teacher.strings(theirs),
                student.tokenizer.eos_token,
                teacher.tokenizer.eos_token,
            )
        else:
            text = row["response"]
            found = byte_span(
                own,
                theirs,
                student.bytes,
                teacher.bytes,
                *ends,
                offsets=lambda: (student.offsets(text), teacher.offsets(text)),
            )
        return {"student_pairs": found.student, "teacher_pairs": found.teacher}, found.spelled_differently

    return pair


def _mined_pairing(item: dict[str, Any], student: _Side, teacher: _Side) -> Callable[[Row], tuple[Row, bool]]:
    """MinED's time warping of the input tokens at the label positions."""
    from tenfold.methods.dskd.alignment import mined_positions

    table = read_minimum_edit_tables(Storage(item["cache"]), item["tables"])[0].numpy()

    def pair(row: Row) -> tuple[Row, bool]:
        own, theirs = (_inputs(row[side]) for side in ("student", "teacher"))
        found = mined_positions(own, theirs, student.strings(own), teacher.strings(theirs), table)
        return {"teacher_position": found}, False

    return pair


def _responses(ids_and_labels: Sequence[list[int]]) -> list[int]:
    """Return the label tokens of a row."""
    return [label for label in ids_and_labels[1][1:] if label != IGNORED]


def _inputs(ids_and_labels: Sequence[list[int]]) -> list[int]:
    """Return the input tokens at the label positions of a row."""
    ids, labels = ids_and_labels
    return [index for index, following in zip(ids[:-1], labels[1:], strict=True) if following != IGNORED]
