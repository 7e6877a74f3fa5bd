"""How many blocks and steps every stage of a run has, as far as the start of the texts tells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.config import EXPANDING, LayerMoEConfig
from tenfold.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tenfold.methods.layermoe.corpora import Corpus
    from tenfold.platform.context import PlanContext
    from tenfold.platform.training.options import TrainingOptions

MOST_DOCUMENTS = 5000  # of a language that a plan tokenises


# Every point of a sweep is planned in one process, mostly on the same texts.
_counted: dict[tuple[object, ...], Blocks] = {}


@dataclass(frozen=True)
class Blocks:
    """Blocks of one or more languages.

    Attributes:
        number: how many, or the least that there are.
        is_exact: all documents were looked at.
    """

    number: int
    is_exact: bool


def planned_stages(config: LayerMoEConfig, tokenizer: Any, context: PlanContext) -> list[tuple[str, str]]:
    """Return (stage, what it trains on) of a run in their order.

    Raises:
        ConfigError: a step takes more blocks than there are, or bfloat16 where there is none.
        DataError: a language does not fill one block.
    """
    rows = []
    expansions = config.expansions()
    if config.base_training is not None:
        data = config.data
        blocks = count_blocks(data.old, tokenizer, data.stage1_length)
        rows.append(_stage("base", config.base_training, blocks, data.stage1_length, context))
    for number, options in enumerate(expansions, start=1):
        ending, data = "" if number == 1 else f"-{number}", options.data
        if options.strategy == "base":
            rows.append((f"evaluation{ending}", "of the base; nothing is trained"))
            continue
        kind = "experts" if options.strategy in EXPANDING else options.strategy
        blocks = count_blocks(data.new, tokenizer, data.stage1_length, token_budget=data.token_budget)
        rows.append(_stage(f"{kind}{ending}", options.stage1, blocks, data.stage1_length, context))
        if options.has_review and options.stage2 is not None:
            texts = [*data.old, *data.earlier, *data.new]
            blocks = count_blocks(texts, tokenizer, data.stage2_length, max_documents=data.max_documents)
            rows.append(_stage(f"review{ending}", options.stage2, blocks, data.stage2_length, context))
    return rows


def count_blocks(
    corpora: Sequence[Corpus],
    tokenizer: Any,
    length: int,
    *,
    max_documents: int | None = None,
    token_budget: int | None = None,
) -> Blocks:
    """Return the blocks of some texts: exactly where they are short, else those of each language's first documents.

    Raises:
        DataError: a language that was read to its end fills no block.
    """
    from tenfold.methods.layermoe.corpora import by_language, corpora_digest
    from tenfold.platform.models.loading import tokenizer_digest

    number, is_exact = 0, True
    told = tokenizer_digest(tokenizer)
    for own in by_language(corpora).values():
        key = (corpora_digest(own), told, length, max_documents, token_budget)
        if key not in _counted:
            _counted[key] = _count_language(own, tokenizer, length, max_documents, token_budget)
        number, is_exact = number + _counted[key].number, is_exact and _counted[key].is_exact
    return Blocks(number, is_exact)


def _count_language(
    own: Sequence[Corpus], tokenizer: Any, length: int, max_documents: int | None, token_budget: int | None
) -> Blocks:
    from tenfold.methods.layermoe.corpora import documents
    from tenfold.methods.layermoe.packing import Packer, pack

    most = min(MOST_DOCUMENTS, max_documents or MOST_DOCUMENTS)
    packer = Packer(length, tokenizer.eos_token_id)
    texts = documents(own)
    number = sum(1 for _ in pack(itertools.islice(texts, most), tokenizer, packer, token_budget))
    is_spent = token_budget is not None and packer.tokens >= token_budget
    is_whole = is_spent or max_documents == most or next(texts, None) is None
    if is_whole and number == 0:
        raise DataError(
            f"{own[0].language}: its {packer.documents} documents have {packer.tokens} tokens, a block {length}. Give "
            "more text, or use shorter blocks"
        )
    return Blocks(number, is_whole)


def _stage(name: str, options: TrainingOptions, blocks: Blocks, length: int, context: PlanContext) -> tuple[str, str]:
    workers = context.compute.max_workers
    rows, accumulated = options.per_device_train_batch_size, options.gradient_accumulation_steps
    batch, shape = rows * accumulated * workers, f"{rows} x {accumulated} accumulated x {workers} workers"
    if blocks.is_exact and batch > blocks.number:
        raise ConfigError(
            f"{name}: a step takes {batch} blocks ({shape}), the texts have {blocks.number} of {length} tokens; use a "
            "smaller batch, shorter blocks or fewer workers"
        )
    precision = "bfloat16" if options.use_bf16() else "float32"
    steps, least = options.steps(blocks.number, workers), "" if blocks.is_exact else "at least "
    return name, (
        f"{'' if options.max_steps > 0 else least}{steps:,} steps of {batch} blocks ({shape}), {least}"
        f"{blocks.number:,} blocks of {length} tokens, peak rate {options.learning_rate:g}, {precision}"
    )
