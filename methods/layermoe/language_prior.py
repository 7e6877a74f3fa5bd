"""Language-prior routing (LPR) of stage 2: tokens of old languages shall prefer expert 0, the original FFN.

Over the layers M that have a router and the old tokens (o_t = 1), with p = softmax(z):

    nll         1/|M| sum_i  1/sum_t o_t  sum_t o_t  -log p_{t,0}
    official    -log softmax(p_t)_0 in place of -log p_{t,0}, averaged over all old tokens of all layers with the same
                number of experts, then over the distinct numbers

The official code feeds probabilities into a second softmax: its value never falls below log(1 + (E - 1) / e), and at a
uniform router its gradient is 1/E of the other. It is kept for parity. New tokens are not constrained.

A third form, for later expansions of MoE-LPR, is about all real tokens (m_t = 1): each shall prefer the experts A(t)
of its own group, of old languages expert 0, of an expansion's those that it added to the layer.

    group       1/|M| sum_i  1/sum_t m_t  sum_t m_t  sum_{e in A(t)} -log p_{t,e}

(The official code indexes with a mask of integers, which takes rows 0 and 1 again and again, and knows equal counts
alone.) A token whose expansion added nothing to a layer costs nothing there.

Legend: B sequences, T padded length, E experts of the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

BaseForm = Literal["nll", "official"]
PriorForm = Literal["nll", "official", "group"]


def token_prior(router_logits_BTE: Tensor, form: BaseForm = "nll") -> Tensor:
    """Return what each token costs, float32 [B, T], old or not; the logits may have any float dtype."""
    scores = router_logits_BTE.float()
    if form == "official":
        scores = scores.softmax(dim=-1)
    return scores.logsumexp(dim=-1) - scores[..., 0]


def layer_weights(router_logits: Mapping[int, Tensor], form: BaseForm) -> dict[int, float]:
    """Return what each layer counts for, summing to 1: all the same, or (`official`) by numbers of experts."""
    if form == "nll":
        return dict.fromkeys(router_logits, 1.0 / len(router_logits))
    experts = {layer: logits.shape[-1] for layer, logits in router_logits.items()}
    alike = Counter(experts.values())
    return {layer: 1.0 / (alike[number] * len(alike)) for layer, number in experts.items()}


def prior_sum(router_logits: Mapping[int, Tensor], old_mask_BT: Tensor, form: BaseForm = "nll") -> Tensor:
    """Return L_LPR times the number of old tokens: divide by the number of the whole step, over all ranks.

    Args:
        router_logits: layer -> [B, T, E_i].
        old_mask_BT: bool, which tokens are real and of an old language.
        form: `nll` or `official`.

    Returns:
        Scalar float32; 0 with a valid graph where no token is old.

    Raises:
        ValueError: no layer has a router.
    """
    if not router_logits:
        raise ValueError("no layer has a router; needs an expanded model, whose decoder layers have more than one FFN")
    weights = layer_weights(router_logits, form)
    terms = [
        weights[layer] * torch.where(old_mask_BT, token_prior(logits_BTE, form), 0.0).sum()
        for layer, logits_BTE in router_logits.items()
    ]
    return torch.stack(terms).sum()


def own_experts(groups_BT: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return A(t): which experts of a layer belong to each token's group, bool [B, T, E], E = 1 + sum(sizes).

    Args:
        groups_BT: int64, 0 for old languages, g for those of expansion g.
        sizes: experts that each expansion added to the layer.
    """
    owners = torch.arange(1 + len(sizes)).repeat_interleave(torch.tensor([1, *sizes]))
    return groups_BT[..., None] == owners.to(groups_BT.device)


def group_prior_sum(
    router_logits: Mapping[int, Tensor], sizes: Mapping[int, Sequence[int]], groups_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """Return the loss of the form `group` times the real tokens: divide by those of the whole step, over all ranks.

    Args:
        router_logits: layer -> [B, T, E_i].
        sizes: layer -> experts that each expansion added to it.
        groups_BT: int64, see `own_experts`.
        mask_BT: bool, which tokens are real.

    Returns:
        Scalar float32; 0 with a valid graph where no token is real.

    Raises:
        ValueError: no layer has a router.
    """
    if not router_logits:
        raise ValueError("no layer has a router; needs an expanded model, whose decoder layers have more than one FFN")
    terms = []
    for layer, logits_BTE in router_logits.items():
        counted = own_experts(groups_BT, sizes[layer]) & mask_BT[..., None]
        terms.append(torch.where(counted, -logits_BTE.float().log_softmax(dim=-1), 0.0).sum())
    return torch.stack(terms).mean()


def base_probability(router_logits: Mapping[int, Tensor]) -> Tensor:
    """Return p_0, the probability of expert 0 in the mean over layers, float32 [B, T], without gradient."""
    probabilities = [logits.detach().float().softmax(dim=-1)[..., 0] for logits in router_logits.values()]
    return torch.stack(probabilities).mean(dim=0)
