"""Documents become blocks of tokens for training (section 5.2 of LayerMoE, arXiv 2505.22582; "ours").

Every document is tokenised without special tokens and ended by one EOS; the documents of a language are joined and cut
into blocks of equal length, and what is left at the language's end is dropped. So a block is of one language, and of
one group: it has one true class. (The official packer joins groups, and drops a tail every 1000 documents.)

Labels are the tokens themselves, EOS included. (The official collator takes labels off by id, which loses all EOS
targets where pad is EOS.)

Legend: B rows, T padded length.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.corpora import Corpus, by_language, corpora_digest, documents, languages_of
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.errors import DataError, ModelError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENTS_AT_ONCE = 256  # in one call of the tokenizer
BLOCKS_AT_ONCE = 512  # in one record batch of a file
OLD_GROUP = 0


class Packer:
    """Cuts the joined documents of one language into blocks; between two documents its `vars` are plain data.

    Args:
        length: tokens of a block.
        eos: token that ends every document.

    Attributes:
        documents: how many were added.
        tokens: of all documents, EOS included.
        rest: tokens that fill no block yet.
    """

    def __init__(self, length: int, eos: int):
        self.documents = self.tokens = 0
        self.rest: list[int] = []
        self._length, self._eos = length, eos

    def add(self, ids: Sequence[int]) -> list[list[int]]:
        """Add one document, without special tokens; return the blocks that it fills."""
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids) + 1
        stream = [*self.rest, *ids, self._eos]
        whole = len(stream) - len(stream) % self._length
        self.rest = stream[whole:]
        return [stream[start : start + self._length] for start in range(0, whole, self._length)]


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    packer: Packer,
    token_budget: int | None = None,
) -> Iterator[list[int]]:
    """Yield the blocks of one language's documents, which are read as they are needed.

    Args:
        texts: documents.
        tokenizer: makes token ids; adds no special tokens.
        packer: fresh, or with what an earlier call left.
        token_budget: no further document is added once so many tokens were; the last one is added whole.
    """
    for batch in _batched(texts, DOCUMENTS_AT_ONCE):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from packer.add(ids)
            if token_budget is not None and packer.tokens >= token_budget:
                return


def packed_blocks(
    corpora: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    *,
    groups: Mapping[str, int],
    max_documents: int | None = None,
    token_budget: int | None = None,
    folder: Path | None = None,
) -> Dataset:
    """Return the blocks of some corpora, shuffled once; the same arguments give the same blocks in the same order.

    Args:
        corpora: documents; those of one language are joined in the order given.
        tokenizer: with an EOS token.
        length: tokens of a block.
        seed: decides the order of the blocks alone.
        groups: language -> number of its group, 0 = old (`corpora.group_of_language`).
        max_documents: first documents of a language that are read.
        token_budget: documents of a language are read until they have so many tokens, EOS included.
        folder: where the blocks lie, for what does not fit in memory; named by all that decides them, and not packed
            again when they are there. Default: in memory.

    Returns:
        A Dataset with `input_ids` and `labels` (each `length` tokens), `old` (bool), `group` and `language` (the place
        in `languages_of(corpora)`).

    Raises:
        DataError: a language fills no block, or a file cannot be used.
        ModelError: the tokenizer has no EOS token.
    """
    import numpy as np

    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, which ends every document. Set eos_token in its folder")
    batches = _batches(corpora, tokenizer, length, groups, max_documents, token_budget)
    if folder is None:
        blocks = _in_memory(batches)
    else:
        decisive = [corpora_digest(corpora), _tokenizer_digest(tokenizer), length, max_documents, token_budget]
        decisive += [[groups[language] for language in languages_of(corpora)]]
        name = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:24]
        blocks = _on_disk(batches, folder / f"blocks-{name}.arrow")
    # memory maps read blocks wherever they lie, so the order costs no second copy
    order = np.random.default_rng(seed).permutation(len(blocks))
    return blocks.select(order, keep_in_memory=True)


def blocks_by_language(blocks: Dataset, languages: Sequence[str]) -> dict[str, int]:
    """Return language -> number of its blocks; `languages` as `languages_of` lists those of the corpora."""
    counts = Counter(blocks["language"])
    return {language: counts[number] for number, language in enumerate(languages)}


class BlockCollator:
    """Puts blocks, or evaluation rows of unequal length, into a batch; padding is on the right.

    Args:
        pad_token_id: fills `input_ids`; there `attention_mask` is 0, `labels` -100 and `old_mask` false.
    """

    def __init__(self, pad_token_id: int):
        self._collate = CausalCollator(pad_token_id, scalar=("old", "group", "language"))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return int64 [B, T] input_ids, attention_mask, labels; bool [B, T] old_mask; [B] group and language."""
        batch = self._collate(rows)
        old = batch.pop("old").bool()
        return {**batch, "old_mask": old[:, None] & batch["attention_mask"].bool()}


def _batches(
    corpora: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    groups: Mapping[str, int],
    max_documents: int | None,
    token_budget: int | None,
) -> Iterator[pyarrow.RecordBatch]:
    """Yield all blocks, language by language, and log what each gave."""
    import pyarrow

    eos: Any = tokenizer.eos_token_id
    for number, (language, own) in enumerate(by_language(corpora).items()):
        packer, count = Packer(length, eos), 0
        texts = itertools.islice(documents(own), max_documents)
        for blocks in _batched(pack(texts, tokenizer, packer, token_budget), BLOCKS_AT_ONCE):
            count += len(blocks)
            ids = pyarrow.array(blocks, type=pyarrow.list_(pyarrow.int32()))
            facts = {"old": groups[language] == OLD_GROUP, "group": groups[language], "language": number}
            columns = {"input_ids": ids, "labels": ids}
            columns |= {name: pyarrow.array([value] * len(blocks)) for name, value in facts.items()}
            yield pyarrow.RecordBatch.from_pydict(columns)
        if not count:
            raise DataError(
                f"{language}: {packer.documents:,} documents have {packer.tokens:,} tokens, which fill no block of "
                f"{length:,}. Give more text, or shorter blocks"
            )
        logger.info(
            "%s: %s documents, %s tokens, %s blocks of %s; %s tokens at the end are left out",
            *(language, f"{packer.documents:,}", f"{packer.tokens:,}", f"{count:,}", f"{length:,}", len(packer.rest)),
        )


def _in_memory(batches: Iterator[pyarrow.RecordBatch]) -> Dataset:
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    # a fingerprint of its own: datasets would else hash the whole table, for a cache that nothing here uses
    return Dataset(InMemoryTable(pyarrow.Table.from_batches(batches)), fingerprint=uuid.uuid4().hex[:16])


def _on_disk(batches: Iterator[pyarrow.RecordBatch], path: Path) -> Dataset:
    import pyarrow
    from datasets import Dataset

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # several processes may write the same; readers see a whole file or none
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            first = next(batches)
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_stream(sink, first.schema) as writer:
                for batch in itertools.chain([first], batches):
                    writer.write_batch(batch)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return Dataset.from_file(str(path))


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
