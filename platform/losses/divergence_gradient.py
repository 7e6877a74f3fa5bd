"""Value and gradient of every divergence in closed form, without autograd.

With x = student logits / tau and q = softmax(x), a divergence D(q) has dD/dx_v = q_v (g_v - sum_u q_u g_u) where
g = dD/dq up to a constant per row. The functions below give g, or the product where it simplifies. They exist because
the fused losses need the gradient of a block of rows at once and in few passes over it; each is tested against
autograd on `tenfold.platform.losses.divergence`.
"""

from collections.abc import Callable

import torch
from tenfold.platform.losses.divergence import (
    DivergenceOptions,
    adaptive_weight,
    check_divergence,
    log_mixture,
    log_probabilities,
    log_weight,
)
from torch import Tensor


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products over the vocabulary, [N, V] x [N, V] to [N, 1]."""
    return torch.linalg.vecdot(left, right).unsqueeze(-1)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """Turn slope = dD/dq into dD/dx, overwriting it."""
    return slope.sub_(_dot(q, slope)).mul_(q)


def _forward_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    # dD/dx = q - p
    p = log_p.exp()
    value = _dot(p, log_p - log_q)
    return value, log_q.exp().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    # dD/dx = q (log(q / p) - D)
    q = log_q.exp()
    log_ratio = log_q - log_p
    value = _dot(q, log_ratio)
    return value, log_ratio.sub_(value).mul_(q)


def _generalised_js(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    # g = beta log(q / m), m = beta q + (1 - beta) p
    q, p = log_q.exp(), log_p.exp()
    log_m = log_mixture(log_q, log_p, beta)
    student_part = log_q - log_m
    student_kl = _dot(q, student_part)
    value = beta * student_kl + (1.0 - beta) * _dot(p, log_p - log_m)
    return value, student_part.sub_(student_kl).mul_(q).mul_(beta)


def _js_divergence(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    return _generalised_js(log_q, log_p, 0.5)


def _jsd(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    return _generalised_js(log_q, log_p, options.js_beta)


def _skewed_forward_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    # q g = -p (1 - lambda) q / m with m = lambda p + (1 - lambda) q; the last factor is at most 1
    q, p = log_q.exp(), log_p.exp()
    log_m = log_mixture(log_p, log_q, options.skew_lambda)
    value = _dot(p, log_p - log_m)
    student_part = log_m.neg_().add_(log_q).exp_().mul_(p).mul_(1.0 - options.skew_lambda)
    return value, q.mul_(student_part.sum(-1, keepdim=True)).sub_(student_part)


def _skewed_reverse_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    # g = log(q / m) - lambda q / m with m = lambda q + (1 - lambda) p
    q = log_q.exp()
    log_ratio = log_q - log_mixture(log_q, log_p, options.skew_lambda)
    value = _dot(q, log_ratio)
    student_part = (log_ratio + log_weight(options.skew_lambda)).exp_()
    return value, _through_softmax(q, log_ratio.sub_(student_part))


def _adaptive_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    weight = adaptive_weight(log_q, log_p, options.adaptive_alpha).unsqueeze(-1)
    forward_value, forward_gradient = _forward_kl(log_q, log_p, options)
    reverse_value, reverse_gradient = _reverse_kl(log_q, log_p, options)
    return torch.lerp(reverse_value, forward_value, weight), reverse_gradient.lerp_(forward_gradient, weight)


def _tvd(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    # g = sign(q - p) / 2
    q = log_q.exp()
    slope = (q - log_p.exp()).mul_(0.5)
    value = slope.abs().sum(-1, keepdim=True)
    return value, _through_softmax(q, slope.sign_().mul_(0.5))


def _top1_ce(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    # dD/dx = p(v) (q - onehot(v)), v the teacher's most probable token
    top_log_p, top = log_p.max(dim=-1, keepdim=True)
    top_p = top_log_p.exp()
    value = -top_p * log_q.gather(-1, top)
    return value, log_q.exp().mul_(top_p).scatter_add_(-1, top, -top_p)


_VALUE_AND_GRADIENT: dict[str, Callable[[Tensor, Tensor, DivergenceOptions], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js_divergence": _js_divergence,
    "skewed_forward_kl": _skewed_forward_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "tvd": _tvd,
    "jsd": _jsd,
    "top1_ce": _top1_ce,
}


def divergence_value_and_gradient(
    student_logits: Tensor, teacher_logits: Tensor, *, divergence: str, options: DivergenceOptions
) -> tuple[Tensor, Tensor]:
    """Divergence of every row and its gradient with respect to the student's logits.

    Args:
        student_logits: [N, V] in any float dtype; not changed. Masked columns as in `divergence_rows`.
        teacher_logits: [N, V].
        divergence: a key of `tenfold.platform.losses.divergence.DIVERGENCES`.
        options: temperatures and shape of the divergence.

    Returns:
        [N] values and [N, V] gradients (d value / d student logits, 1 / tau included), float32 or wider. The
        adaptive weight counts as a constant, and |p - q| has slope 0 at 0.

    Raises:
        ValueError: unknown divergence, or shapes that differ.
    """
    check_divergence(divergence)
    with torch.no_grad():
        log_q, log_p = log_probabilities(student_logits, teacher_logits, options)
        value, gradient = _VALUE_AND_GRADIENT[divergence](log_q, log_p, options)
        if options.temperature != 1.0:
            gradient.div_(options.temperature)
        return value.squeeze(-1), gradient


def cross_entropy_value_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of every row, without temperature, and its gradient softmax(logits) - onehot(target).

    Args:
        logits: [N, V] in any float dtype; not changed.
        targets: [N] int64 in [0, V).

    Returns:
        [N] values and [N, V] gradients, float32 or wider.
    """
    with torch.no_grad():
        log_q = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        index = targets.unsqueeze(-1)
        value = -log_q.gather(-1, index)
        gradient = log_q.exp_()
        gradient.scatter_add_(-1, index, -torch.ones_like(value))
        return value.squeeze(-1), gradient
