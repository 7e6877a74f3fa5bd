"""Which experts a token uses, and which class of languages its sequence belongs to (sections 3.4, 3.6 and 3.7).

Legend: N rows (tokens of a batch), E experts of a layer, k experts a token uses, B sequences, T positions, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_routing(logits_NE: Tensor, k: int, allowed_NE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the experts of every row: softmax in float32, then the largest k, renormalised.

    With k = 1 the weight is 1, so that a model with copied experts computes what it did before; the router then learns
    from auxiliary losses alone. (The official code does not renormalise it.)

    Args:
        logits_NE: [N, E] router logits, any floating dtype.
        k: experts of a row; min(k, E) are used.
        allowed_NE: [N, E] bool, at least one True a row; the softmax is over those alone. A row with fewer than k has
            weight 0 in the slots that are left, whatever expert stands there. None allows all.

    Returns:
        weights [N, min(k, E)] float32, falling, with sum 1 a row; experts of the same shape, int64.
    """
    logits = logits_NE.float()
    if allowed_NE is not None:
        logits = logits.masked_fill(~allowed_NE, float("-inf"))
    weights, experts = logits.softmax(dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), experts


def allowed_experts(classes_N: Tensor, sizes: list[int], num_classes: int) -> Tensor:
    """Say which experts a row of each class may use: class 0 the original FFN, class g those of expansions up to g.

    The last class may use all, so with two classes (the default) there is no limit but that of the old languages.

    Args:
        classes_N: [N] int64.
        sizes: experts that each expansion added to the layer; expert 0 is the original FFN.
        num_classes: C, at least 2.

    Returns:
        [N, E] bool, E = 1 + sum(sizes).
    """
    num_experts = 1 + sum(sizes)
    limits = [1 + sum(sizes[:group]) for group in range(num_classes - 1)] + [num_experts]
    limit_N = torch.tensor(limits, device=classes_N.device)[classes_N]
    return torch.arange(num_experts, device=classes_N.device) < limit_N[:, None]


def running_scores(
    scores_BTC: Tensor, mask_BT: Tensor | None, before: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the classifier's scores of the mean state up to each position.

    The classifier is linear, so the score of a mean is the mean of scores: no pooled state is formed, and what must be
    remembered between calls is C numbers a sequence. Sums are float64: cutting a text into calls changes nothing.

    Args:
        scores_BTC: [B, T, C] scores of every position's own state.
        mask_BT: [B, T] bool, True = real; None: all are.
        before: what the previous call returned, for the positions that came earlier.

    Returns:
        [B, T, C] float64, 0 where nothing real came yet; (sum [B, C] float64, count [B, 1] float64) after position T.
    """
    scores = scores_BTC.double()
    counted = torch.ones_like(scores[..., :1]) if mask_BT is None else mask_BT[..., None].double()
    sums = (scores * counted).cumsum(dim=1)
    counts = counted.cumsum(dim=1)
    if before is not None:
        sums = sums + before[0][:, None]
        counts = counts + before[1][:, None]
    return sums / counts.clamp(min=1), (sums[:, -1], counts[:, -1])


def pooled_scores(scores_BTC: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the classifier's scores [B, C] float32 of each sequence's mean state; 0 where no position is real.

    (The official code sums padded positions too.)
    """
    counted = torch.ones_like(scores_BTC[..., :1]) if mask_BT is None else mask_BT[..., None]
    summed = scores_BTC.float().masked_fill(~counted.bool(), 0.0).sum(dim=1)
    return summed / counted.sum(dim=1).clamp(min=1)
