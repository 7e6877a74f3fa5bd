"""Losses of preference optimisation, from the log-probabilities of whole responses.

l(y) = sum_t log pi(y_t | x, y_<t) over the tokens of a response, its EOS included, by the trained policy (l_theta) and
by a frozen reference (l_ref). A pair has a chosen response (w) and a rejected one (l). With the two exchanged each of
these losses trains the reverse model. Nothing is averaged here: one value a pair, or an example for KTO.

Legend: B pairs or examples. All tensors are [B] in float32 or float64; reference terms are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def margin(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> Tensor:
    """Return h = (l_theta(w) - l_theta(l)) - (l_ref(w) - l_ref(l)), [B]."""
    return (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)


def smoothed_logistic(argument: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return -(1 - s) log sigmoid(u) - s log sigmoid(-u): a share s of the preferences is taken as exchanged."""
    loss = -logsigmoid(argument)
    if label_smoothing:
        # log sigmoid(-u) = log sigmoid(u) - u
        loss = loss + label_smoothing * argument
    return loss


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO (arXiv 2305.18290): -log sigmoid(beta h), [B]; with label smoothing it is cDPO."""
    h = margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return smoothed_logistic(beta * h, label_smoothing)


def ipo(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """IPO (arXiv 2310.12036): (h - 1 / (2 beta))^2, [B], of sums over tokens (trl takes means)."""
    h = margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return (h - 1 / (2 * beta)).square()


def simpo(
    chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma_ratio: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO (arXiv 2405.14734): -log sigmoid(beta (m_w - m_l) - gamma), [B], without a reference.

    Args:
        chosen_mean: m_w = l_theta(w) / number of its tokens.
        rejected_mean: m_l.
        beta: scale of the means.
        gamma_ratio: gamma / beta.
        label_smoothing: share of exchanged preferences.
    """
    return smoothed_logistic(beta * (chosen_mean - rejected_mean) - beta * gamma_ratio, label_smoothing)


def tdpo1(h: Tensor, kl_chosen: Tensor, kl_rejected: Tensor, beta: float) -> Tensor:
    """TDPO1 (arXiv 2404.11999): -log sigmoid(beta (h - (K(l) - K(w)))), [B], with gradients through both K.

    Args:
        h: see `margin`.
        kl_chosen: K(w) = sum_t KL(pi_ref || pi_theta) over the tokens of the chosen response.
        kl_rejected: K(l).
        beta: beta_0.
    """
    return smoothed_logistic(beta * (h - (kl_rejected - kl_chosen)))


def tdpo2(h: Tensor, kl_chosen: Tensor, kl_rejected: Tensor, beta: float, alpha: float) -> Tensor:
    """TDPO2: -log sigmoid(beta (h - alpha (K(l) - sg(K(w))))), [B], without a gradient through K(w).

    (The official code of AlignDistil exchanges alpha and the choice between the two forms.)
    """
    return smoothed_logistic(beta * (h - alpha * (kl_rejected - kl_chosen.detach())))


def kto(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306) with rho = l_theta - l_ref, [B].

    lambda_D (1 - sigmoid(beta (rho - z_0))) of a good answer, lambda_U (1 - sigmoid(beta (z_0 - rho))) of a bad one.

    Args:
        policy: l_theta of the answers.
        reference: l_ref.
        desirable: bool, whether an answer is good.
        reference_point: z_0 of each answer, or a scalar; no gradient flows through it.
        beta: beta_0.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
    """
    distance = beta * (policy - reference - reference_point.detach())
    good, bad = desirable_weight * torch.sigmoid(-distance), undesirable_weight * torch.sigmoid(distance)
    return torch.where(desirable, good, bad)


def kl_reference_point(log_ratio_sum: Tensor, count: Tensor) -> Tensor:
    """Return z_0 = max(0, mean of l_theta - l_ref), detached; 0 where nothing is counted.

    KTO estimates the KL of policy and reference by it, from answers of other prompts: sums of log-ratios over the
    micro-batch and all ranks are averaged before the maximum is taken.
    """
    return (log_ratio_sum / count.clamp(min=1)).clamp(min=0).detach()


def paired_reference_point(log_ratio_sums: Tensor, counts: Tensor, desirable: Tensor) -> Tensor:
    """Return z_0 of each example, [B]: of a good answer from the bad ones of the batch, and the other way round.

    Args:
        log_ratio_sums: [2], sums of l_theta - l_ref over the bad and over the good answers.
        counts: [2], their numbers.
        desirable: [B] bool.
    """
    points = kl_reference_point(log_ratio_sums, counts)
    return torch.where(desirable, points[0], points[1])
