"""Whether the models of a run fit together: one vocabulary, and two frozen models that disagree the right way round.

Both mistakes train without an error (section 8.2): a model given twice makes the adaptive teacher the DPO model
itself, exchanged models make the policy worse.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tenfold.methods.aligndistil.extrapolation import total_variation
from tenfold.platform.data.positions import next_labels
from tenfold.platform.errors import ModelError
from torch import Tensor

if TYPE_CHECKING:
    from tenfold.methods.aligndistil.aligned_module import AlignedModule
    from tenfold.platform.losses.chunked_rows import Side
    from tenfold.platform.models.source import ModelSource

logger = logging.getLogger(__name__)

SAME = 1e-3  # mean total variation distance below which two models are taken for one


def check_vocabularies(sources: Mapping[str, ModelSource]) -> None:
    """Make sure that all models read the same token ids and have equally many outputs; reads no weights.

    Args:
        sources: name -> model; the first one's tokenizer makes the token ids.

    Raises:
        ModelError: an output size, a vocabulary, its way to encode or an EOS token differs; says all that do. Other
            special tokens only give a warning: the first model's are used.
    """
    from tenfold.platform.models.loading import describe, load_tokenizer, same_tokenizer

    (first, source), *others = sources.items()
    tokenizer, size = load_tokenizer(source), describe(source).vocabulary_size
    wrong = []
    for name, other in others:
        found, outputs = load_tokenizer(other), describe(other).vocabulary_size
        differing = sorted({token for token, _ in set(tokenizer.get_vocab().items()) ^ set(found.get_vocab().items())})
        parts = []
        if outputs != size:
            parts.append(f"{outputs:,} outputs, {first} has {size:,}")
        if differing:
            parts.append(f"{len(differing):,} tokens have other ids or are in one of them alone, as {differing[0]!r}")
        elif not same_tokenizer(tokenizer, found):
            parts.append(f"its tokenizer has the tokens of {first} but cuts texts otherwise")
        if found.eos_token_id != tokenizer.eos_token_id:
            parts.append(f"EOS is {found.eos_token!r}, {first} has {tokenizer.eos_token!r}")
        wrong += [f"{name} ({other.name}): {'; '.join(parts)}"] if parts else []
        for special in ("pad_token", "bos_token", "unk_token"):
            ours, theirs = getattr(tokenizer, special), getattr(found, special)
            if ours != theirs and not parts:
                logger.warning("%s has %s %r, %s has %r, which is used", name, special, theirs, first, ours)
    if wrong:
        raise ModelError(
            f"the models are compared token by token with {first} ({source.name}), so they need one tokenizer and one "
            "output size:\n  " + "\n  ".join(wrong) + "\nUse models that were trained from the same one"
        )


@dataclass(frozen=True)
class Disagreement:
    """How two frozen models differ on held-out pairs.

    Attributes:
        tvd: mean total variation distance over the label positions of chosen and rejected responses.
        preferred: share of pairs in which the DPO model prefers the chosen response by more than the other does:
            l_dpo(y_w) - l_dpo(y_l) > l_other(y_w) - l_other(y_l), the accuracy of the contrastive reward.
        pairs: how many there are.
    """

    tvd: float
    preferred: float
    pairs: int


@torch.no_grad()
def disagreement(module: AlignedModule, other: str, batches: Iterable[dict[str, Tensor]]) -> Disagreement:
    """Compare the module's frozen model "dpo" with another one.

    Args:
        module: what trains.
        other: name of the other one.
        batches: of `PairCollator`, on the module's device. All ranks need equally many.
    """
    distance = positions = preferred = pairs = 0.0
    for batch in batches:
        with module.reading("dpo", **batch) as dpo, module.reading(other, **batch) as second:
            distance += _total_variation(module, dpo, second)
            log_ratio = module.nll_rows(second, batch["labels"])[0] - module.nll_rows(dpo, batch["labels"])[0]
        chosen, rejected = log_ratio.chunk(2)
        preferred += int((chosen > rejected).sum())
        positions += len(next_labels(batch["labels"]))
        pairs += len(chosen)
    return Disagreement(distance / max(positions, 1), preferred / max(pairs, 1), int(pairs))


def _total_variation(module: AlignedModule, dpo: Side, other: Side) -> float:
    """Sum D_t over all rows, a chunk at a time."""
    total, chunk = 0.0, module.options.loss_chunk_rows
    for start in range(0, len(dpo.hidden), chunk):
        rows = slice(start, start + chunk)
        logits = [_logits(side, rows)[:, : module.num_columns] for side in (dpo, other)]
        total += total_variation(*logits).sum().item()
    return total


def _logits(side: Side, rows: slice) -> Tensor:
    return torch.nn.functional.linear(side.hidden[rows], side.head, side.bias)


def warnings_about(found: Disagreement, other: str) -> list[str]:
    """Return what a user should be told about frozen models that can hardly teach."""
    told: list[str] = []
    if found.pairs and found.tvd < SAME:
        told.append(
            f"the dpo and the {other} model are nearly the same: mean total variation distance {found.tvd:.1e} on "
            f"{found.pairs} held-out pairs. If one model is given twice, there is nothing to extrapolate"
        )
    elif found.pairs and found.preferred <= 0.5:
        told.append(
            f"the dpo model prefers the chosen response more than the {other} model does in only "
            f"{found.preferred:.0%} of {found.pairs} held-out pairs. If they are exchanged, training makes the policy "
            "worse"
        )
    return told


def log_disagreement(found: Disagreement, other: str) -> None:
    """Log the comparison of frozen models, and warn where it looks wrong."""
    logger.info(
        "dpo and %s model on %d held-out pairs: mean total variation distance %.3f, reward accuracy %.0f %%",
        other,
        found.pairs,
        found.tvd,
        100 * found.preferred,
    )
    for text in warnings_about(found, other):
        logger.warning("%s", text)
