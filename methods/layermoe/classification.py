"""The classifiers of stage 2: which sequences are of an old language, told before the router of a layer.

    L_cls = 1 / (|C| B) sum_{i in C} sum_b -log softmax(c^i_b)_{g_b}

over the layers C that have one, with the classifier's logits c [B, K] and the class g of each sequence. The classifier
learns from this loss alone: the decision is an arg-max.

Legend: B sequences, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def class_of(group_B: Tensor, num_classes: int) -> Tensor:
    """Return the class of each language group: 0 for the old one; with K classes all from group K - 1 on are one.

    So two classes tell the original languages from all others, those of earlier expansions included.
    """
    return group_B.clamp(max=num_classes - 1)


def classifier_sum(classifier_logits: Mapping[int, Tensor], group_B: Tensor) -> Tensor:
    """Return L_cls times the number of sequences: divide by the number of the whole step, over all ranks.

    Args:
        classifier_logits: layer -> [B, K], any float dtype; all that follows is float32.
        group_B: int64 [B], language group of each sequence.

    Returns:
        Scalar float32.

    Raises:
        ValueError: no layer has a classifier.
    """
    if not classifier_logits:
        raise ValueError("no layer has a classifier; attach classifiers first, or leave this loss out")
    terms = [
        F.cross_entropy(logits_BK.float(), class_of(group_B, logits_BK.shape[-1]), reduction="sum")
        for logits_BK in classifier_logits.values()
    ]
    return torch.stack(terms).mean()


def classifier_hits(classifier_logits: Mapping[int, Tensor], group_B: Tensor) -> Tensor:
    """Return the share of the layers whose decision about a sequence is right, float32 [B], without gradient."""
    hits = [
        logits.detach().argmax(dim=-1) == class_of(group_B, logits.shape[-1]) for logits in classifier_logits.values()
    ]
    return torch.stack(hits).float().mean(dim=0)
