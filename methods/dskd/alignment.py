"""Which tokens of two tokenizers correspond: exact token alignment (DSKDv2, arXiv 2504.11426), MinED's time warping.

All functions take the tokens of one response read by both tokenizers and return positions in them. They are linear in
the length of the text (time warping: in the product of the two lengths) and belong into the preparation of the data.

Legend: n student tokens, m teacher tokens, K aligned pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tenfold.methods.dskd.vocabulary import WORD_MARKERS, edit_distances

# A byte that no UTF-8 text contains stands for EOS, whose spellings differ.
_EOS_BYTE = b"\xff"
_EOS_OFFSET = 2**31 - 2


class Alignment(NamedTuple):
    """Pairs of positions, both strictly increasing.

    Attributes:
        student: int32 [K].
        teacher: int32 [K].
        spelled_differently: the two byte strings differ; count these responses.
    """

    student: np.ndarray
    teacher: np.ndarray
    spelled_differently: bool = False


def byte_span(
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    student_bytes: Sequence[bytes],
    teacher_bytes: Sequence[bytes],
    student_eos: int,
    teacher_eos: int,
    offsets: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Alignment:
    """Align the tokens that cover the same bytes of the text: the set A of the paper without its label condition.

    Equal intervals of bytes mean the same prefix and the same token text, the definition of the paper; " on" and "on"
    differ. A dummy space that one tokenizer puts in front is dropped. EOS is paired with EOS by id. One of the texts
    may be cut short (`max_length`): what both have is aligned.

    Args:
        student_ids: [n] of the response, with EOS unless it was cut.
        teacher_ids: [m] of the same response.
        student_bytes: the student's table of `token_bytes`.
        teacher_bytes: the teacher's.
        student_eos: EOS id of the student.
        teacher_eos: EOS id of the teacher.
        offsets: called when the byte strings differ (a normalising tokenizer, an unknown token). Returns the character
            intervals [., 2] that the two fast tokenizers give for the uncut response, without EOS. None (generated
            tokens have no offsets): pairs before the first difference only.

    Returns:
        The pairs; empty arrays where nothing corresponds.

    Raises:
        ValueError: fewer offsets than tokens.
    """
    student_is_eos, teacher_is_eos = _ends(student_ids, student_eos), _ends(teacher_ids, teacher_eos)
    student = [_EOS_BYTE if eos else student_bytes[i] for i, eos in zip(student_ids, student_is_eos, strict=True)]
    teacher = [_EOS_BYTE if eos else teacher_bytes[i] for i, eos in zip(teacher_ids, teacher_is_eos, strict=True)]
    student_drop, teacher_drop, common = _dummy_spaces(b"".join(student), b"".join(teacher))
    student_spans, teacher_spans = _byte_spans(student, student_drop), _byte_spans(teacher, teacher_drop)
    # one text may be the beginning of the other, if one was cut
    differs = common < int(min(student_spans.max(initial=0), teacher_spans.max(initial=0)))
    if differs and offsets is not None:
        student_offsets, teacher_offsets = offsets()
        student_spans = _character_spans(student_offsets, student_is_eos)
        teacher_spans = _character_spans(teacher_offsets, teacher_is_eos)
    elif differs:
        student_spans[student_spans[:, 1] > common] = 0
        teacher_spans[teacher_spans[:, 1] > common] = 0
    rows, columns = _equal_spans(student_spans, teacher_spans)
    same_kind = student_is_eos[rows] == teacher_is_eos[columns]
    return Alignment(rows[same_kind].astype(np.int32), columns[same_kind].astype(np.int32), differs)


def _ends(ids: Sequence[int], eos: int) -> np.ndarray:
    """Mark EOS at the end, bool [n]; before it (the text names it) it stands for its text."""
    is_eos = np.zeros(len(ids), dtype=bool)
    is_eos[-1:] = len(ids) > 0 and ids[-1] == eos
    return is_eos


def _dummy_spaces(student: bytes, teacher: bytes) -> tuple[int, int, int]:
    """Return the leading bytes to drop of each side (a space of one of them, or none), and how far the rest agrees.

    Equality goes first: of two texts of spaces, one is also the other's beginning. Else the longest agreement decides.
    """
    ways = [(0, 0)] + [(1, 0)] * student.startswith(b" ") + [(0, 1)] * teacher.startswith(b" ")
    for left, right in ways:
        if student[left:] == teacher[right:]:
            return left, right, len(student) - left
    found = [(left, right, _common_length(student[left:], teacher[right:])) for left, right in ways]
    return max(found, key=lambda way: way[2])


def _byte_spans(pieces: Sequence[bytes], drop: int) -> np.ndarray:
    """Half-open byte intervals [n, 2] of the pieces after `drop` leading bytes."""
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    ends = lengths.cumsum()
    return np.maximum(np.stack([ends - lengths, ends], axis=1) - drop, 0)


def _character_spans(offsets: np.ndarray, is_eos: np.ndarray) -> np.ndarray:
    """Character intervals [n, 2]; EOS gets one of its own, a character that several tokens share an empty one."""
    number = int((~is_eos).sum())
    if len(offsets) < number:
        raise ValueError(
            f"{len(offsets)} character offsets for {number} tokens; one for every token but EOS is needed"
        )
    spans = np.empty((len(is_eos), 2), dtype=np.int64)
    spans[~is_eos] = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:number]
    spans[is_eos] = (_EOS_OFFSET, _EOS_OFFSET + 1)
    _, inverse, counts = np.unique(spans, axis=0, return_inverse=True, return_counts=True)
    spans[counts[inverse.ravel()] > 1] = 0
    return spans


def _equal_spans(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the non-empty intervals that both sides have; each side has an interval at most once."""
    sides = []
    for spans in (student, teacher):
        kept = np.flatnonzero(spans[:, 1] > spans[:, 0])
        sides.append((kept, (spans[kept, 0] << 32) + spans[kept, 1]))
    (rows, row_keys), (columns, column_keys) = sides
    _, in_rows, in_columns = np.intersect1d(row_keys, column_keys, assume_unique=True, return_indices=True)
    return rows[in_rows], columns[in_columns]


def _common_length(one: Sequence, other: Sequence) -> int:
    """Length of the longest common prefix."""
    differences = (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differences, min(len(one), len(other)))


def without_markers(token: str) -> str:
    """Return a token's string without the markers of a word's beginning, as the official code compares it."""
    for marker in WORD_MARKERS:
        token = token.replace(marker, "")
    return token


def official(
    student_tokens: Sequence[str], teacher_tokens: Sequence[str], student_eos: str, teacher_eos: str
) -> Alignment:
    """Align as the official DSKDv2 code does, kept for parity; `byte_span` aligns more and never what differs.

    Two cursors walk over the tokens without markers. A pair is emitted where the strings so far are equal and the next
    tokens are equal or both EOS; otherwise the shorter side goes on, both if they are equally long. What is spelled
    differently once (U+010A and <0x0A>) desynchronises the rest of the response.

    The strings so far are prefixes of two fixed strings: they are equal where both are equally long and not longer
    than the common prefix of those. This keeps the walk linear with the same outcome.

    Args:
        student_tokens: [n] as `convert_ids_to_tokens` gives them.
        teacher_tokens: [m].
        student_eos: EOS of the student.
        teacher_eos: EOS of the teacher.
    """
    student = [without_markers(token) for token in student_tokens]
    teacher = [without_markers(token) for token in teacher_tokens]
    common = _common_length("".join(student), "".join(teacher))
    pairs: list[tuple[int, int]] = []
    i = j = student_length = teacher_length = 0
    while i < len(student) and j < len(teacher):
        step_student, step_teacher = student_length <= teacher_length, teacher_length <= student_length
        same_prefix = step_student and step_teacher and student_length <= common
        if same_prefix and (
            student[i] == teacher[j] or (student_tokens[i] == student_eos and teacher_tokens[j] == teacher_eos)
        ):
            pairs.append((i, j))
        if step_student:
            student_length += len(student[i])
            i += 1
        if step_teacher:
            teacher_length += len(teacher[j])
            j += 1
    indices = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return Alignment(indices[:, 0].copy(), indices[:, 1].copy())


def warp(cost_nm: np.ndarray) -> tuple[int, list[tuple[int, int]]]:
    """Dynamic time warping: D_ij = c_ij + min(D_{i-1,j}, D_{i,j-1}, D_{i-1,j-1}) (MinED, arXiv 2401.10491).

    Args:
        cost_nm: [n, m] integers, n and m at least 1.

    Returns:
        The cost of the cheapest path, and its pairs (student, teacher) from first to last. Tracing back from the end
        takes the first minimum among the diagonal, a step of the teacher and a step of the student.
    """
    n, m = cost_nm.shape
    far = np.iinfo(np.int64).max // 4
    total = np.full((n + 1, m + 1), far, dtype=np.int64)
    total[0, 0] = 0
    for i in range(n):
        # With C = cumsum(c), D_j - C_j = min(D_{j-1} - C_{j-1}, min(above) - C_{j-1}): a running minimum.
        sums = np.cumsum(cost_nm[i], dtype=np.int64)
        above = np.minimum(total[i, 1:], total[i, :-1])
        total[i + 1, 1:] = np.minimum.accumulate(above - sums + cost_nm[i]) + sums
    i, j = n, m
    path = []
    while i and j:
        path.append((i - 1, j - 1))
        steps = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        i, j = min(steps, key=lambda step: total[step])
    return int(total[n, m]), path[::-1]


def mined_positions(
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    student_tokens: Sequence[str],
    teacher_tokens: Sequence[str],
    teacher_to_student: np.ndarray,
) -> np.ndarray:
    """Return for each student position the teacher position whose logits teach it, -1 = hard target (MinED).

    The input tokens at label positions are warped onto each other at the cost of the Levenshtein distance of their
    strings without markers. A position counts if exactly one teacher position is mapped to it, and that one's token
    maps to the student's own.

    Args:
        student_ids: [n] input ids at the label positions.
        teacher_ids: [m].
        student_tokens: [n] their strings.
        teacher_tokens: [m].
        teacher_to_student: [V_t], the dense map of `vocabulary.minimum_edit_tables`.

    Returns:
        int32 [n].
    """
    found = np.full(len(student_ids), -1, dtype=np.int32)
    if len(student_ids) == 0 or len(teacher_ids) == 0:
        return found
    cost = edit_distances([without_markers(t) for t in student_tokens], [without_markers(t) for t in teacher_tokens])
    path = np.array(warp(cost)[1])
    counts = np.bincount(path[:, 0], minlength=len(student_ids))
    students, teachers = path[counts[path[:, 0]] == 1].T
    same = np.asarray(teacher_to_student)[np.asarray(teacher_ids)[teachers]] == np.asarray(student_ids)[students]
    found[students[same]] = teachers[same]
    return found
