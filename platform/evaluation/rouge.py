"""ROUGE-L and exact match of responses, by the protocol of DSKD (arXiv 2406.17328) and MiniLLM (arXiv 2306.08543)."""

from __future__ import annotations

import string
from collections.abc import Sequence

END_OF_TEXT = "<|endoftext|>"


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over items of the best ROUGE-L F-measure over an item's references, times 100.

    Stemmed (Porter). ROUGE's tokenizer keeps [a-z0-9] only, so text in other scripts scores 0 even when identical.

    Args:
        predictions: generated texts; `clean_response` is applied.
        references: for each prediction at least one reference.

    Raises:
        ValueError: unequal lengths, nothing to score, or an item without references.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(predictions, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        scorer.score_multi(own, clean_response(prediction))["rougeL"].fmeasure
        for prediction, own in zip(predictions, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share, times 100, of predictions equal to one of their references.

    Both are compared in lower case, without ASCII punctuation, with runs of white space as one space.

    Raises:
        ValueError: unequal lengths, nothing to score, or an item without references.
    """
    _check(predictions, references)
    hits = [
        _normal(clean_response(prediction)) in {_normal(reference) for reference in own}
        for prediction, own in zip(predictions, references, strict=True)
    ]
    return 100 * sum(hits) / len(hits)


def clean_response(text: str) -> str:
    """Cut at a literal end-of-text mark and strip, as the papers' evaluation does."""
    return text.split(END_OF_TEXT, 1)[0].strip()


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} lists of references; needs equally many, at least one"
        )
    for index, own in enumerate(references):
        if isinstance(own, str) or not own:
            raise ValueError(f"item {index}: references are {own!r}; needs a list of at least one text")


def _normal(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
