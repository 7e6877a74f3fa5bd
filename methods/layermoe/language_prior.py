"""Language-prior routing (LPR) of stage 2: tokens of old languages shall prefer expert 0, the original FFN.

Over the layers M that have a router and the old tokens (o_t = 1), with p = softmax(z):

    nll         1/|M| sum_i  1/sum_t o_t  sum_t o_t  -log p_{t,0}
    official    -log softmax(p_t)_0 in place of -log p_{t,0}, averaged over all old tokens of all layers with the same
                number of experts, then over the distinct numbers

The official code feeds probabilities into a second softmax: its value never falls below log(1 + (E - 1) / e), and at a
uniform router its gradient is 1/E of the other. It is kept for parity. New tokens are not constrained.

Legend: B sequences, T padded length, E experts of the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

PriorForm = Literal["nll", "official"]


def token_prior(router_logits_BTE: Tensor, form: PriorForm = "nll") -> Tensor:
    """Return what each token costs, float32 [B, T], old or not; the logits may have any float dtype."""
    scores = router_logits_BTE.float()
    if form == "official":
        scores = scores.softmax(dim=-1)
    return scores.logsumexp(dim=-1) - scores[..., 0]


def layer_weights(router_logits: Mapping[int, Tensor], form: PriorForm) -> dict[int, float]:
    """Return what each layer counts for, summing to 1: all the same, or (`official`) by numbers of experts."""
    if form == "nll":
        return dict.fromkeys(router_logits, 1.0 / len(router_logits))
    experts = {layer: logits.shape[-1] for layer, logits in router_logits.items()}
    alike = Counter(experts.values())
    return {layer: 1.0 / (alike[number] * len(alike)) for layer, number in experts.items()}


def prior_sum(router_logits: Mapping[int, Tensor], old_mask_BT: Tensor, form: PriorForm = "nll") -> Tensor:
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


def base_probability(router_logits: Mapping[int, Tensor]) -> Tensor:
    """Return p_0, the probability of expert 0 in the mean over layers, float32 [B, T], without gradient."""
    probabilities = [logits.detach().float().softmax(dim=-1)[..., 0] for logits in router_logits.values()]
    return torch.stack(probabilities).mean(dim=0)
