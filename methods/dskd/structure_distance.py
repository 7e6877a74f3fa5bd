"""How alike two models arrange the tokens of a response: representation structure distance (DSKD, arXiv 2406.17328).

The hidden states of one response have n x n similarities to each other. Student and teacher have different hidden
sizes, but these matrices can be compared: the lower the distance, the more alike the two spaces are. Both need
the same positions. With one tokenizer these are all that predict a token of the response; with two, the pairs of exact
token alignment, so the matrices leave out tokens that the other model reads in other pieces.

Legend: n compared positions of a response, d student's and D teacher's hidden size.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tenfold.methods.dskd.config import DSKDConfig
    from tenfold.platform.context import RunContext
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
BATCH_SIZE = 16


def cosine_matrix(hidden_nX: Tensor) -> Tensor:
    """Return cos(h_i, h_j), [n, n] float64; 0 for a state of length 0."""
    directions = torch.nn.functional.normalize(hidden_nX.double(), dim=-1, eps=1e-300)
    return directions @ directions.T


def inner_product_matrix(hidden_nX: Tensor) -> Tensor:
    """Return h_i h_j / sum_k h_i h_k, [n, n] float64: every row sums to 1, and the length of h_i drops out.

    Inner products may be negative: where a row's sum is near 0 its entries are large, which is how the quantity is
    defined. A row whose sum is exactly 0 stays 0.
    """
    product = hidden_nX.double() @ hidden_nX.double().T
    total = product.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, product / total)


def cosine_distance(student_nd: Tensor, teacher_nD: Tensor) -> float:
    """Return the mean over all pairs (i, j) of |cos_student - cos_teacher|, between 0 and 2; n at least 1."""
    return (cosine_matrix(student_nd) - cosine_matrix(teacher_nD)).abs().mean().item()


def inner_product_distance(student_nd: Tensor, teacher_nD: Tensor) -> float:
    """Return the mean over the rows i of sum_j |student_ij - teacher_ij| of the inner-product matrices."""
    return (inner_product_matrix(student_nd) - inner_product_matrix(teacher_nD)).abs().sum(-1).mean().item()


def mean_distances(pairs: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the means over responses of both distances and the responses and positions that counted.

    A response with fewer than two compared positions has no structure and does not count; nan without any that does.

    Args:
        pairs: [n, d] of the student and [n, D] of the teacher, of every response.
    """
    cosine, inner, positions = [], [], 0
    for student_nd, teacher_nD in pairs:
        if len(student_nd) < 2:
            continue
        cosine.append(cosine_distance(student_nd, teacher_nD))
        inner.append(inner_product_distance(student_nd, teacher_nD))
        positions += len(student_nd)
    return {
        "structure_distance_cosine": statistics.fmean(cosine) if cosine else float("nan"),
        "structure_distance_inner": statistics.fmean(inner) if inner else float("nan"),
        "structure_distance_rows": float(len(cosine)),
        "structure_distance_positions": float(positions),
    }


def measure_structure(
    context: RunContext,
    config: DSKDConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    number: int,
) -> dict[str, float]:
    """Compare student and teacher on the first `number` training rows; the teacher's states come from the cache.

    Raises:
        ModelError: two tokenizers, and the tokens of one of them are no bytes.
    """
    from tenfold.methods.dskd.pairing import teacher_rows
    from tenfold.methods.dskd.teacher import encode_rows
    from tenfold.platform.data.examples import load_examples
    from tenfold.platform.data.tokenise import tokenised_dataset
    from tenfold.platform.models.loading import same_tokenizer

    examples = load_examples(config.data).train[:number]
    rows = list(tokenised_dataset(examples, tokenizer, config.data))
    theirs = teacher_rows(rows, examples, teacher_tokenizer, config)
    folder = encode_rows(context, config, theirs, "structure").folder
    compared = None
    if not same_tokenizer(tokenizer, teacher_tokenizer):
        compared = aligned_positions(rows, theirs, tokenizer, teacher_tokenizer)
    return mean_distances(_states(context, student, rows, folder, compared))


def aligned_positions(
    rows: Sequence[Row],
    teacher: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[Tensor, Tensor]]:
    """Return which label positions of each row correspond: int64 [K] of the student's and of the teacher's.

    Where the two spellings of a response differ, its pairs before the first difference count.
    """
    from tenfold.methods.dskd.alignment import byte_span
    from tenfold.methods.dskd.token_bytes import token_bytes
    from tenfold.platform.data.positions import IGNORED

    tables = token_bytes(tokenizer), token_bytes(teacher_tokenizer)
    ends = tokenizer.eos_token_id, teacher_tokenizer.eos_token_id
    found = []
    for row, theirs in zip(rows, teacher, strict=True):
        own, other = ([label for label in each["labels"][1:] if label != IGNORED] for each in (row, theirs))
        pairs = byte_span(own, other, *tables, *ends)
        found.append((torch.as_tensor(pairs.student).long(), torch.as_tensor(pairs.teacher).long()))
    return found


@torch.no_grad()
def _states(
    context: RunContext,
    student: PreTrainedModel,
    rows: Sequence[Row],
    folder: str,
    compared: Sequence[tuple[Tensor, Tensor]] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the student's and the teacher's states of each row at the compared positions."""
    import tempfile

    from tenfold.platform.data.collator import CausalCollator
    from tenfold.platform.data.positions import label_positions
    from tenfold.platform.data.shards import ShardedRows
    from tenfold.platform.models.hidden import evaluating, final_hidden

    collate = CausalCollator(pad_token_id=0)  # masked and to the right: no label position sees it
    with tempfile.TemporaryDirectory() as scratch, evaluating(student):
        teacher = ShardedRows(context.cache.download(folder, Path(scratch) / "teacher"))
        for start in range(0, len(rows), BATCH_SIZE):
            batch = collate(rows[start : start + BATCH_SIZE])
            batch = {name: value.to(student.device) for name, value in batch.items()}
            positions = label_positions(batch["labels"])
            states = final_hidden(student, batch["input_ids"], batch["attention_mask"])[positions].cpu()
            for index, own in enumerate(states.split(positions.sum(1).tolist()), start):
                theirs = teacher[index]["teacher_hidden"]
                if compared is None:
                    yield own, theirs
                else:
                    yield own[compared[index][0]], theirs[compared[index][1]]
