"""Load balance of stage 1: every expert of a layer is to get its share of the tokens.

Of layer i with E experts, of which each token takes k, over the M real tokens of a pass (m_t = 1):

    L_i = E sum_e f_e p_e,   f_e = 1/M sum_t m_t [e in top_k(t)],   p_e = 1/M sum_t m_t softmax(z_t)_e

f carries no gradient. L_i is k where the choices are balanced or the mean probabilities are uniform, and E where all
tokens take the same k experts. The loss is the plain mean over the layers that have a router.

A product of two means is no sum over tokens: the loss of a step is the mean over its forward passes.

Legend: B sequences, T padded length, E experts of the layer (each has its own number), k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def expert_load(probabilities_BTE: Tensor, mask_BT: Tensor, top_k: int) -> Tensor:
    """Return f: the share of the real tokens that each expert is chosen by, float32 [E], without gradient.

    Args:
        probabilities_BTE: softmax of the router logits, float32.
        mask_BT: bool, which tokens are real.
        top_k: experts per token.

    Returns:
        Sums to min(k, E), or to 0 where no token is real.
    """
    num_experts = probabilities_BTE.shape[-1]
    chosen = probabilities_BTE.topk(min(top_k, num_experts), dim=-1).indices
    times_BTE = torch.zeros_like(probabilities_BTE).scatter_(-1, chosen, 1.0)
    return _masked_mean(times_BTE, mask_BT)


def layer_balance(router_logits_BTE: Tensor, mask_BT: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return L_i of one layer and the load f it has.

    Args:
        router_logits_BTE: any float dtype; all that follows is float32.
        mask_BT: which tokens are real (not 0); others do not count.
        top_k: experts per token.

    Returns:
        Scalar float32 and float32 [E]. With E <= k the scalar is the constant E, without gradient: all experts are
        taken by all tokens. Both are 0 where no token is real.
    """
    mask_BT, num_experts = mask_BT.bool(), router_logits_BTE.shape[-1]
    probabilities_BTE = router_logits_BTE.float().softmax(dim=-1)
    load = expert_load(probabilities_BTE, mask_BT, top_k)
    if num_experts <= top_k:
        # its gradient would be rounding errors, which Adam makes as large as any other
        return load.sum(), load
    return num_experts * (load * _masked_mean(probabilities_BTE, mask_BT)).sum(), load


def balance_loss(router_logits: Mapping[int, Tensor], mask_BT: Tensor, top_k: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the mean of L_i over the layers with a router, and the load of each.

    Args:
        router_logits: layer -> [B, T, E_i].
        mask_BT: which tokens are real.
        top_k: experts per token.

    Returns:
        Scalar float32, and layer -> float32 [E_i] without gradient.

    Raises:
        ValueError: no layer has a router.
    """
    if not router_logits:
        raise ValueError("no layer has a router; needs an expanded model, whose decoder layers have more than one FFN")
    terms, loads = [], {}
    for layer, logits_BTE in router_logits.items():
        term, loads[layer] = layer_balance(logits_BTE, mask_BT, top_k)
        terms.append(term)
    return torch.stack(terms).mean(), loads


def _masked_mean(values_BTE: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over the real tokens, [E]; 0 where there is none."""
    total = torch.where(mask_BT[..., None], values_BTE, 0.0).sum(dim=(0, 1))
    return total / mask_BT.sum().clamp(min=1)
