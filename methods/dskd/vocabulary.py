"""Which entries of two vocabularies correspond (DSKDv2, arXiv 2504.11426; MinED, arXiv 2401.10491).

A vocabulary is what a tokenizer's `get_vocab()` gives: token string -> id. Strings are compared after U+0120 (the
space of byte-level BPE) is replaced by U+2581 (SentencePiece's). The tables are computed once for a tokenizer pair.

Legend: V_s, V_t rows of the student's and the teacher's head; they may exceed the vocabularies (padded heads).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

WORD_MARKERS = ("\u2581", "\u0120")
_BLOCK = 512


def _one_marker(token: str) -> str:
    to, of = WORD_MARKERS
    return token.replace(of, to)


def _by_string(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Return string -> id with one marker for both.

    Of strings that become equal, the one that needs no replacement wins, then the smaller id: the Llama vocabulary has
    the letter U+0120 as well as the marker U+2581.
    """
    ranked = sorted(vocabulary.items(), key=lambda item: (WORD_MARKERS[1] in item[0], item[1]))
    ids: dict[str, int] = {}
    for token, index in ranked:
        ids.setdefault(_one_marker(token), index)
    return ids


def overlap(
    student_vocabulary: Mapping[str, int],
    teacher_vocabulary: Mapping[str, int],
    student_eos: int,
    teacher_eos: int,
    topk_vocab: int = -1,
) -> tuple[Tensor, Tensor]:
    """Return O_s and O_t, the ids of the strings that both vocabularies have (v2, projector initialisation).

    The EOS ids are a pair, whatever their spellings (the official code leaves it out); no id is in two pairs.

    Args:
        student_vocabulary: token string -> id.
        teacher_vocabulary: token string -> id.
        student_eos: EOS id of the student.
        teacher_eos: EOS id of the teacher.
        topk_vocab: keep the pairs with the K smallest student ids; -1 keeps all. (The official code keeps the first K
            in the order of a hash table.)

    Returns:
        int64 [v] each, sorted by student id.

    Raises:
        ValueError: topk_vocab is neither -1 nor positive.
    """
    if topk_vocab != -1 and topk_vocab < 1:
        raise ValueError(f"topk_vocab is {topk_vocab}; it is a number of entries, at least 1, or -1 for all")
    teacher_ids = _by_string(teacher_vocabulary)
    pairs = [
        (index, teacher_ids[string])
        for string, index in _by_string(student_vocabulary).items()
        if string in teacher_ids and index != student_eos and teacher_ids[string] != teacher_eos
    ]
    pairs.append((student_eos, teacher_eos))
    pairs.sort()
    chosen = torch.tensor(pairs if topk_vocab == -1 else pairs[:topk_vocab], dtype=torch.int64)
    return chosen[:, 0].contiguous(), chosen[:, 1].contiguous()


def teacher_labels(
    student_vocabulary: Mapping[str, int],
    teacher_vocabulary: Mapping[str, int],
    student_eos: int,
    teacher_eos: int,
    num_teacher_rows: int,
) -> Tensor:
    """Return t2s_id [V_t] int64: the student's label for a teacher's token, -1 = the student has no such token (ETA).

    EOS becomes EOS. Unlike `convert_tokens_to_ids`, nothing unknown becomes EOS or <unk>.

    Raises:
        ValueError: an id is outside the head's rows.
    """
    _check_rows(teacher_vocabulary, num_teacher_rows)
    student_ids = _by_string(student_vocabulary)
    table = np.full(num_teacher_rows, -1, dtype=np.int64)
    for string, index in _by_string(teacher_vocabulary).items():
        table[index] = student_ids.get(string, -1)
    table[teacher_eos] = student_eos
    return torch.from_numpy(table)


def minimum_edit_tables(
    student_vocabulary: Mapping[str, int],
    teacher_vocabulary: Mapping[str, int],
    student_eos: int,
    teacher_eos: int,
    num_student_rows: int,
    num_teacher_rows: int,
) -> tuple[Tensor, Tensor]:
    """Return MinED's maps teacher -> student [V_t] and student -> teacher [V_s], int64 (arXiv 2401.10491).

    A teacher's token becomes the same string if the student has it, else the student's token of the smallest
    Levenshtein distance, the smallest id among equals. Backwards, a student's token keeps the first (smallest)
    teacher id that maps to it. EOS becomes EOS. -1: a row without a token, and a student's token that nothing maps to.

    Raises:
        ValueError: an id is outside its head's rows.
    """
    _check_rows(student_vocabulary, num_student_rows)
    _check_rows(teacher_vocabulary, num_teacher_rows)
    student_ids = _by_string(student_vocabulary)
    forward = np.full(num_teacher_rows, -1, dtype=np.int64)
    unmatched: dict[str, list[int]] = {}
    for token, index in teacher_vocabulary.items():
        string = _one_marker(token)
        if string in student_ids:
            forward[index] = student_ids[string]
        else:
            unmatched.setdefault(string, []).append(index)
    own = sorted(student_vocabulary.items(), key=lambda item: item[1])
    candidates, ids = [_one_marker(token) for token, _ in own], np.array([index for _, index in own])
    strings = list(unmatched)
    for start in range(0, len(strings), _BLOCK):
        block = strings[start : start + _BLOCK]
        # argmin takes the first minimum, and the candidates go by id
        for string, best in zip(block, edit_distances(block, candidates).argmin(axis=1), strict=True):
            forward[unmatched[string]] = ids[best]
    forward[teacher_eos] = student_eos
    backward = np.full(num_student_rows, -1, dtype=np.int64)
    teachers = np.flatnonzero(forward >= 0)
    mapped, first = np.unique(forward[teachers], return_index=True)
    backward[mapped] = teachers[first]
    return torch.from_numpy(forward), torch.from_numpy(backward)


def edit_distances(one: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """Levenshtein distances [len(one), len(other)], uint16."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    return cdist(one, other, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)


def _check_rows(vocabulary: Mapping[str, int], num_rows: int) -> None:
    largest = max(vocabulary.values())
    if largest >= num_rows:
        raise ValueError(f"the vocabulary has the id {largest}, the head only {num_rows} rows")
