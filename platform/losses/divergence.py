"""Divergences between the next-token distributions of a student and a teacher.

N rows (tokens), V vocabulary. q = softmax(student logits / tau) is the student's distribution and p = softmax(teacher
logits / tau / tau_teacher) the teacher's. The teacher is a constant in all of them, and none is multiplied by tau^2.

The first six of `DIVERGENCES` are those that DSKD (arXiv 2406.17328) compares, with its defaults. Skewed KL is due to
DistiLLM (arXiv 2402.03898), adaptive KL to arXiv 2404.02657, the generalised JS to GKD (arXiv 2306.13649).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DivergenceOptions:
    """Numbers that shape a divergence; each is read only by the divergences that name it.

    Attributes:
        temperature: tau > 0, divides both logits. DSKD's experiments use 2.
        teacher_temperature: > 0, divides the teacher's logits once more.
        skew_lambda: lambda in [0, 1), the share mixed in by `skewed_forward_kl` and `skewed_reverse_kl`.
        adaptive_alpha: a in [0, 1], the probability mass that `adaptive_kl` counts as the tail.
        js_beta: beta in (0, 1), the student's share of the mixture in `jsd`.

    Raises:
        ValueError: a number is outside its range.
    """

    temperature: float = 1.0
    teacher_temperature: float = 1.0
    skew_lambda: float = 0.1
    adaptive_alpha: float = 0.5
    js_beta: float = 0.5

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0 < self.temperature < math.inf, "a finite number > 0"),
            "teacher_temperature": (0 < self.teacher_temperature < math.inf, "a finite number > 0"),
            "skew_lambda": (0 <= self.skew_lambda < 1, "in [0, 1)"),
            "adaptive_alpha": (0 <= self.adaptive_alpha <= 1, "in [0, 1]"),
            "js_beta": (0 < self.js_beta < 1, "strictly between 0 and 1"),
        }
        for name, (is_allowed, wanted) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}.")


def log_softmax_rows(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) in float32 (float64 stays float64), finite everywhere.

    A column at -inf is masked: it gets a finite log-probability so low that its probability is exactly 0, which makes
    its terms 0 * finite instead of 0 * inf. A row that is masked everywhere counts as uniform.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        scaled = scaled / temperature
    # Half of the range, so that subtracting the log of the sum cannot overflow to -inf again.
    return torch.log_softmax(scaled.clamp(min=torch.finfo(scaled.dtype).min / 2), dim=-1)


def log_weight(weight: float) -> float:
    """Return log(weight), -inf at 0."""
    return math.log(weight) if weight > 0 else -math.inf


def log_mixture(log_first: Tensor, log_second: Tensor, first_share: float) -> Tensor:
    """Return log(first_share * exp(log_first) + (1 - first_share) * exp(log_second)), elementwise and stable."""
    return torch.logaddexp(log_first + log_weight(first_share), log_second + log_weight(1.0 - first_share))


def _kl(log_left: Tensor, log_right: Tensor) -> Tensor:
    return (log_left.exp() * (log_left - log_right)).sum(-1)


def forward_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """KL(p || q): [N, V] log-probabilities of student and teacher to [N]."""
    return _kl(log_p, log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """KL(q || p)."""
    return _kl(log_q, log_p)


def js_divergence(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """Jensen-Shannon: the mean of KL(p || m) and KL(q || m) with m = (p + q) / 2; at most ln 2."""
    log_m = log_mixture(log_q, log_p, 0.5)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def skewed_forward_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """KL(p || lambda p + (1 - lambda) q)."""
    return _kl(log_p, log_mixture(log_p, log_q, options.skew_lambda))


def skewed_reverse_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """KL(q || lambda q + (1 - lambda) p)."""
    return _kl(log_q, log_mixture(log_q, log_p, options.skew_lambda))


def adaptive_weight(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Weight of the forward KL in `adaptive_kl`, [N], without gradient.

    The tail of a row is the least probable tokens under the teacher whose summed probability is at most alpha. The
    weight is the share of sum |p - q| that lies outside the tail, 0.5 where p = q makes it 0 / 0.
    """
    with torch.no_grad():
        p_sorted, order = log_p.exp().sort(dim=-1)
        gap = (p_sorted - log_q.exp().gather(-1, order)).abs_()
        total = gap.sum(-1)
        head = gap.masked_fill_(p_sorted.cumsum(-1) <= alpha, 0.0).sum(-1)
        return torch.where(total > 0, head / total, 0.5)


def adaptive_kl(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """KL(p || q) and KL(q || p) with the shares w and 1 - w, w being the row's `adaptive_weight`."""
    weight = adaptive_weight(log_q, log_p, options.adaptive_alpha)
    return weight * _kl(log_p, log_q) + (1.0 - weight) * _kl(log_q, log_p)


def tvd(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """Total variation distance, half of sum |p - q|; at most 1."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def jsd(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    log_m = log_mixture(log_q, log_p, options.js_beta)
    return options.js_beta * _kl(log_q, log_m) + (1.0 - options.js_beta) * _kl(log_p, log_m)


def top1_ce(log_q: Tensor, log_p: Tensor, options: DivergenceOptions) -> Tensor:
    """-p(v) log q(v) at the teacher's most probable token v (the lowest index among equals)."""
    top_log_p, top = log_p.max(dim=-1, keepdim=True)
    return -(top_log_p.exp() * log_q.gather(-1, top)).squeeze(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, DivergenceOptions], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js_divergence": js_divergence,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
    "jsd": jsd,
    "top1_ce": top1_ce,
}


def check_divergence(name: str) -> None:
    """Raise ValueError, naming all divergences, unless `name` is one of them."""
    if name not in DIVERGENCES:
        raise ValueError(f"Unknown divergence {name!r}. Choose one of: {', '.join(DIVERGENCES)}.")


def log_probabilities(
    student_logits: Tensor, teacher_logits: Tensor, options: DivergenceOptions
) -> tuple[Tensor, Tensor]:
    """Return (log q, log p), [N, V] each, float32 or wider; no gradient flows to the teacher.

    Raises:
        ValueError: the two shapes differ, or there is no vocabulary axis with at least one entry.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits have shape {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}. "
            "Both need the same rows and the same vocabulary: cut padded columns first."
        )
    if student_logits.ndim == 0 or student_logits.shape[-1] == 0:
        raise ValueError(f"logits of shape {tuple(student_logits.shape)} have no vocabulary entry to compare.")
    log_q = log_softmax_rows(student_logits, options.temperature)
    log_p = log_softmax_rows(teacher_logits.detach(), options.temperature * options.teacher_temperature)
    return log_q, log_p


def divergence_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skew_lambda: float = 0.1,
    adaptive_alpha: float = 0.5,
    js_beta: float = 0.5,
) -> Tensor:
    """Divergence of every row, differentiable with respect to the student's logits only.

    Args:
        student_logits: [..., V] in any float dtype. A column at -inf in both logits is masked and contributes 0.
        teacher_logits: [..., V]; treated as a constant.
        divergence: a key of `DIVERGENCES`.
        temperature: tau, divides both logits; the value is *not* multiplied by its square.
        teacher_temperature: divides the teacher's logits in addition.
        skew_lambda: see `DivergenceOptions`, as the following.
        adaptive_alpha: tail mass of `adaptive_kl`.
        js_beta: student share of `jsd`.

    Returns:
        [...] float32 (float64 for float64 logits): one value per row, not reduced.

    Raises:
        ValueError: unknown divergence, shapes that differ, or an option outside its range.
    """
    check_divergence(divergence)
    options = DivergenceOptions(temperature, teacher_temperature, skew_lambda, adaptive_alpha, js_beta)
    log_q, log_p = log_probabilities(student_logits, teacher_logits, options)
    return DIVERGENCES[divergence](log_q, log_p, options)
