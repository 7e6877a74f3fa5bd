"""PPO's two clipped losses (arXiv 1707.06347), token by token; section 6 of RTO's setting (arXiv 2404.18922).

"old" is what was computed with the weights that wrote the responses. All tensors are of one shape, float32 or wider;
the old ones, advantages and returns are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """Return -min(rho A, clip(rho, 1 - c, 1 + c) A) with rho = pi / pi_old; differentiable in `log_probs`.

    At rho = 1 the gradient is -A: good tokens become more probable. It vanishes where rho has moved beyond the clip in
    the direction that A asks for, and only there.
    """
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Return 1/2 max((V - G)^2, (V_clip - G)^2), V_clip = V_old + clip(V - V_old, +-c); differentiable in `values`."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def is_clipped(log_probs: Tensor, old_log_probs: Tensor, *, clip: float) -> Tensor:
    """Say which ratios are outside of 1 +- c (bool)."""
    return ((log_probs - old_log_probs).exp() - 1).abs() > clip
