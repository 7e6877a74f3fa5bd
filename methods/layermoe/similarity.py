"""How alike languages look to a layer (section 3.1 of LayerMoE, arXiv 2505.22582).

The mean cosine over all pairs of token vectors of two languages is the product of their mean unit vectors, so one pass
over each language and a running sum replace the official script's matrix of all pairs.

Legend: L layers, H hidden size, B documents, T tokens of the longest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tenfold.platform.errors import ConfigError, DataError, ModelError
from tenfold.platform.models.hidden import evaluating
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Indicator = Literal["combined", "nn", "no", "pooled"]
Pairs = Mapping[tuple[str, str], NDArray[np.float64]]

SMALLEST_NORM = 1e-12


@dataclass(frozen=True, eq=False)
class LanguageSums:
    """What one pass over a language's documents gives; sums and counts of several workers may be added.

    Attributes:
        sums: [L, H] float64, summed unit vectors of the tokens before every layer's FFN.
        count: how many tokens.
        skipped: documents that were left out as too long.
    """

    sums: NDArray[np.float64]
    count: int
    skipped: int


def measure_language(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: int = 100_000,
    max_document: int = 32_000,
    truncate: int = 10_000,
) -> LanguageSums:
    """Run documents through the model, from the first on, until enough tokens are seen.

    Documents have the tokenizer's usual special tokens (such as BOS) and are run apart. Fewer tokens than wanted are
    used as they are, with a warning; the official script stops.

    Args:
        model: dense, or expanded: then its own routing is active.
        tokenizer: the model's.
        texts: the language's documents, shuffled; read no further than needed.
        tokens: how many token vectors are wanted (Q).
        max_document: documents of more tokens are skipped and counted.
        truncate: tokens of a document that the model sees: the first ones, and no more than it has positions.

    Raises:
        DataError: there is no token at all.
        ModelError: a hidden state is not a number.
    """
    skipped = 0
    most = min(truncate, getattr(model.config.get_text_config(), "max_position_embeddings", None) or truncate)

    def rows() -> Iterator[Tensor]:
        nonlocal skipped
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"]
            if len(ids) > max_document:
                skipped += 1
            elif ids:
                yield torch.tensor(ids[:most], dtype=torch.int64)

    sums, count = unit_sums(model, rows(), tokens)
    left_out = f"; {skipped} documents of more than {max_document:,} tokens were left out" if skipped else ""
    if not count:
        raise DataError(
            f"the similarity of languages needs tokens, and the documents have none{left_out}. Give others"
        )
    if count < tokens:
        logger.warning("similarity is measured on %s tokens of %s wanted%s", f"{count:,}", f"{tokens:,}", left_out)
    return LanguageSums(sums, count, skipped)


@torch.no_grad()
def unit_sums(
    model: PreTrainedModel, token_rows: Iterable[Tensor], limit: int, *, batch_tokens: int = 4096
) -> tuple[NDArray[np.float64], int]:
    """Return the sums over tokens of h / |h|, where h enters a layer's FFN, and the number of tokens.

    Norms and sums are in float64. The model computes in eval mode and is left in the mode it was in.

    Args:
        model: a causal language model.
        token_rows: [T] int64, T > 0, one document each; read no further than needed.
        limit: tokens that count: the first ones of all rows together.
        batch_tokens: tokens at once, padding included; a longer row runs alone. Changes no value beyond rounding.

    Returns:
        [L, H] float64, and at most `limit`.

    Raises:
        ModelError: a hidden state is not a number.
    """
    from tenfold.methods.layermoe.modeling import ffn_of

    ffns = ffn_of(model)
    sums = [torch.zeros(model.config.get_text_config().hidden_size, dtype=torch.float64) for _ in ffns]
    count = 0
    with evaluating(model):
        for ids, mask, counted in _batches(token_rows, limit, batch_tokens):
            with _summing(ffns, sums, counted):
                model.base_model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
            count += int(counted.sum())
    result = torch.stack(sums).numpy()
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if len(bad):
        raise ModelError(
            f"layers {bad.tolist()}: hidden states are not finite, so their similarity is not defined. Load the model "
            f"in bfloat16 or float32 (float16 overflows), or repair it"
        )
    return result, count


def _batches(rows: Iterable[Tensor], limit: int, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield input_ids [B, T] padded on the right, attention_mask [B, T], and which tokens count, [B, T] bool."""
    batch: list[Tensor] = []
    taken = 0
    for row in rows:
        width = max(len(other) for other in [*batch, row])
        if batch and width * (len(batch) + 1) > batch_tokens:
            yield _padded(batch, limit - taken)
            taken += sum(map(len, batch))
            batch = []
        batch.append(row)
        if taken + sum(map(len, batch)) >= limit:
            break
    if batch:
        yield _padded(batch, limit - taken)


def _padded(batch: Sequence[Tensor], left: int) -> tuple[Tensor, Tensor, Tensor]:
    # The whole last document runs, though only some tokens count: a classifier may decide by all of it.
    lengths = torch.tensor([len(row) for row in batch])
    ids = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True)
    columns = torch.arange(ids.shape[1])[None]
    mask = columns < lengths[:, None]
    before = lengths.cumsum(0) - lengths
    return ids, mask.long(), mask & (columns < (left - before)[:, None])


@contextmanager
def _summing(ffns: Sequence[torch.nn.Module], sums: list[Tensor], counted: Tensor) -> Iterator[None]:
    """Add the unit vectors of the counted tokens that enter each FFN to its sum."""

    def hook(index: int) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0]
            vectors = hidden[counted.to(hidden.device)].double()
            units = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
            sums[index] += units.sum(0).cpu()

        return add

    handles = [ffn.register_forward_pre_hook(hook(index)) for index, ffn in enumerate(ffns)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pairwise(means: Mapping[str, NDArray[np.float64]]) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Return s^i(a, b), the mean cosine of the token vectors of two languages by layer, [L] float64.

    Args:
        means: language -> its mean unit vectors [L, H], which are `sums / count`.

    Returns:
        (a, b) -> [L] in [-1, 1] for each two languages, a before b in `means`; s(b, a) is the same.

    Raises:
        DataError: a mean is not a number, or languages have different shapes.
    """
    vectors = {language: np.asarray(mean, dtype=np.float64) for language, mean in means.items()}
    for language, mean in vectors.items():
        check_finite(mean, f"mean unit vectors of {language}")
    shapes = {language: mean.shape for language, mean in vectors.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"mean unit vectors of different shapes: {shapes}. Measure all languages on the same model")
    return {(a, b): np.einsum("lh,lh->l", vectors[a], vectors[b]) for a, b in combinations(vectors, 2)}


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of languages by layer.

    Attributes:
        old: languages that the model knows (all earlier groups).
        new: languages that are added.
        pairs: (a, b) -> s^i(a, b), [L] float64, for each two new languages and each new and old one.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    pairs: Pairs

    @property
    def nn(self) -> NDArray[np.float64] | None:
        """[L] mean over each two new languages; None if there is one alone."""
        return self._mean(combinations(self.new, 2))

    @property
    def no(self) -> NDArray[np.float64] | None:
        """[L] mean over each new with each old language; None if there is no old one."""
        return self._mean((new, old) for new in self.new for old in self.old)

    @property
    def combined(self) -> NDArray[np.float64]:
        """[L] mean of the two means, not of all pairs: S of the paper. If there is one of them alone, that one."""
        sides = [side for side in (self.nn, self.no) if side is not None]
        return np.mean(sides, axis=0)

    @property
    def pooled(self) -> NDArray[np.float64]:
        """[L] mean over all pairs (an ablation)."""
        return np.mean(list(self.pairs.values()), axis=0)

    def indicator(self, name: Indicator) -> NDArray[np.float64]:
        """Return the similarity that decides counts, [L] float64.

        Raises:
            ConfigError: it needs languages that are not there.
        """
        values = {"combined": self.combined, "nn": self.nn, "no": self.no, "pooled": self.pooled}[name]
        if values is None:
            needs = "a second new language" if name == "nn" else "an old language"
            raise ConfigError(
                f"similarity.indicator = {name} needs {needs}; new: {', '.join(self.new)}; old: "
                f"{', '.join(self.old) or 'none'}. Use indicator: combined"
            )
        return values

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data, the means as well, for people."""
        means = {"nn": self.nn, "no": self.no, "combined": self.combined, "pooled": self.pooled}
        return {
            "old": list(self.old),
            "new": list(self.new),
            "pairs": [[a, b, values.tolist()] for (a, b), values in self.pairs.items()],
            **{name: None if values is None else values.tolist() for name, values in means.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Similarity:
        """Return what `to_json` wrote; the means are computed from the pairs.

        Raises:
            DataError: it is something else.
        """
        try:
            pairs = {(a, b): np.asarray(values, dtype=np.float64) for a, b, values in data["pairs"]}
            old, new = list(data["old"]), list(data["new"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a similarity that was written here: {error!r}. Measure it again") from error
        return layer_similarity(pairs, old, new)

    def _mean(self, pairs: Iterable[tuple[str, str]]) -> NDArray[np.float64] | None:
        values = [self.pairs[pair] for pair in pairs]
        return np.mean(values, axis=0) if values else None


def layer_similarity(pairs: Pairs, old: Sequence[str], new: Sequence[str]) -> Similarity:
    """Choose the pairs with a new language; two old ones say nothing about an expansion.

    Args:
        pairs: as `pairwise` gives them, in either order.
        old: languages that the model knows, in a later expansion those of all earlier groups; may be empty.
        new: languages that are added.

    Raises:
        DataError: a language is there twice, there are no two languages to compare, or a pair is missing, not a number
            or of another length.
    """
    names = [*old, *new]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"languages named more than once: {', '.join(twice)}. A language is old or new, once")
    wanted = [*combinations(new, 2), *((a, b) for a in new for b in old)]
    if not wanted:
        raise DataError(
            f"no two languages to compare: new: {', '.join(new) or 'none'}; old: {', '.join(old) or 'none'}. Give a "
            f"new and an old language, or two new ones"
        )
    chosen: dict[tuple[str, str], NDArray[np.float64]] = {}
    for a, b in wanted:
        values = pairs.get((a, b), pairs.get((b, a)))
        if values is None:
            raise DataError(f"the similarity of {a} and {b} was not measured. Measure all languages")
        chosen[a, b] = np.asarray(values, dtype=np.float64)
        check_finite(chosen[a, b], f"similarity of {a} and {b}")
    lengths = {len(values) for values in chosen.values()}
    if len(lengths) > 1:
        raise DataError(f"similarities of {sorted(lengths)} layers. Measure all languages on the same model")
    return Similarity(tuple(old), tuple(new), chosen)


def check_finite(values: NDArray[np.float64], what: str) -> None:
    """Make sure that every value, [L] or [L, H], is a number.

    Raises:
        DataError: one is not; the message names the layers.
    """
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if len(bad):
        raise DataError(f"{what}: not a number at layers {bad.tolist()}. Measure it again, not in float16")
