"""Choosing the next token of each request: reproducible by its own seed, whatever else is in the batch.

transformers' continuous batching samples a whole batch from one global generator, so that a request's tokens would
depend on its neighbours. Here the noise of a token depends on nothing but the request's seed and the token's place:
one uniform number per token from a counter-based generator (Philox, Salmon et al., SC 2011), turned into a token by
inverting the cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keep the smallest set of most probable tokens that has this probability; 1 keeps all.
        seed: decides the noise.
        num_top_logprobs: also report this many most probable tokens a place; None reports no log probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    num_top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log probabilities of a place, under the model itself: before temperature and top_p.

    Attributes:
        chosen: of the token that was taken.
        top: (token id, log probability) of the most probable tokens, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that belongs to token number `position` of a request with this seed."""
    bits = np.random.Philox(key=seed % 2**64, counter=position)
    return float(np.random.Generator(bits).random())


def choose_tokens(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """Choose one token for every row.

    Args:
        logits: [B, V] float.
        samplings: B of them.
        draws: B numbers in [0, 1), from `uniform`; a row with temperature 0 does not use its own.

    Returns:
        [B] int64. A row depends on nothing in other rows.
    """
    tokens = logits.argmax(dim=-1)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not rows:
        return tokens
    # float64: the cumulative sum runs over the whole vocabulary.
    columns = [(samplings[row].temperature, samplings[row].top_p, draws[row]) for row in rows]
    temperature, top_p, draw = torch.tensor(columns, dtype=torch.float64, device=logits.device).T.unsqueeze(-1)
    probabilities = torch.softmax(logits[rows].double() / temperature, dim=-1)
    if any(samplings[row].top_p < 1 for row in rows):
        probabilities = nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    # right=True: a token of probability 0 is never the first whose cumulative sum is above the target.
    chosen = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).squeeze(-1)
    tokens[rows] = chosen.clamp(max=logits.shape[-1] - 1)
    return tokens


def nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Set to zero what is outside the nucleus (Holtzman et al., arXiv 1904.09751, section 3.1); sums are not restored.

    Args:
        probabilities: [B, V].
        top_p: [B, 1]; tokens as probable as the last one inside stay too, so that ties do not depend on their order.
    """
    ordered = probabilities.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    # The most probable token always stays: nothing comes before it.
    last = ((before < top_p).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return torch.where(probabilities >= ordered.gather(-1, last), probabilities, 0.0)


def logprobs_of(logits: Tensor, tokens: Tensor, samplings: Sequence[Sampling]) -> list[TokenLogprob | None]:
    """Return the log probabilities that each row's request asked for.

    Args:
        logits: [B, V] float.
        tokens: [B] int64, the tokens taken.
        samplings: B of them; None is returned for rows that asked for nothing.
    """
    found: list[TokenLogprob | None] = [None] * len(samplings)
    rows = [row for row, sampling in enumerate(samplings) if sampling.num_top_logprobs is not None]
    if not rows:
        return found
    logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
    chosen = logprobs.gather(-1, tokens[rows].unsqueeze(-1)).squeeze(-1).tolist()
    most = max(samplings[row].num_top_logprobs or 0 for row in rows)
    values, ids = (part.tolist() for part in logprobs.topk(min(most, logits.shape[-1]), dim=-1))
    for index, row in enumerate(rows):
        count = samplings[row].num_top_logprobs or 0
        top = tuple(zip(ids[index][:count], values[index][:count], strict=True))
        found[row] = TokenLogprob(chosen[index], top)
    return found
