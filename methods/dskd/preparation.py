"""What is made ready before a training: how two tokenizers meet, the teacher's states, pairs and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tenfold.methods.dskd.config import Alignment, DSKDConfig
from tenfold.platform.errors import ConfigError

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext
    from tenfold.platform.data.examples import Splits


def find_alignment(config: DSKDConfig) -> Alignment:
    """Return how the teacher's positions reach the student's.

    Raises:
        ConfigError: the objective needs one vocabulary and there are two.
        ModelError: tokens are to be aligned by bytes, and a tokenizer does not tell them.
    """
    from tenfold.methods.dskd.token_bytes import token_bytes
    from tenfold.platform.models.loading import load_tokenizer, same_tokenizer

    if not config.needs_teacher:
        return "none"
    student, teacher = load_tokenizer(config.student), load_tokenizer(config.teacher)
    alignment = config.alignment(same_tokenizer(student, teacher))
    if alignment is None:
        raise ConfigError(
            f"config.objective = {config.objective}: needs one vocabulary; the student's tokenizer has {len(student)} "
            f"entries, the teacher's {len(teacher)}, and they encode differently. Give the student the teacher's "
            "tokenizer, or use config.objective=dual_space_v2 (dual_space_v1, overlap_kd, uld, mined, seqkd and sft "
            "take two as well)"
        )
    # generated text is aligned by bytes whatever the mode
    if alignment != "none" and ((alignment == "eta" and config.eta_mode == "byte_span") or config.on_policy):
        for tokenizer in (student, teacher):
            token_bytes(tokenizer)  # raises for one whose tokens are no bytes
    return alignment


def prepare(config: DSKDConfig, context: RunContext, splits: Splits) -> dict[str, Any]:
    """Have the teacher's part of the training data made, as far as it is not in the cache; see `build_trainer`."""
    from tenfold.methods.dskd.pairing import minimum_edit_folder, pair_rows, teacher_rows
    from tenfold.methods.dskd.sequence_level import teacher_responses
    from tenfold.methods.dskd.teacher import encode_rows
    from tenfold.platform.data.tokenise import tokenised_dataset
    from tenfold.platform.models.loading import load_tokenizer

    alignment = find_alignment(config)
    payload: dict[str, Any] = {
        "dskd": config.model_dump(mode="json"),
        "cache": context.cache.uri,
        "alignment": alignment,
    }
    if config.objective == "seqkd":
        payload["responses"] = teacher_responses(context, config, splits.train)
    if not config.needs_teacher:
        return payload
    rows = list(tokenised_dataset(splits.train, load_tokenizer(config.student), config.data))
    theirs = rows
    if alignment != "none":
        theirs = teacher_rows(rows, splits.train, load_tokenizer(config.teacher), config)
    if alignment == "mined":
        payload["tables"] = minimum_edit_folder(context.cache, config)
    if alignment in ("eta", "mined"):
        pairs = pair_rows(context, config, rows, theirs, splits.train, alignment, payload.get("tables"))
        context.report({"dskd/aligned_share": pairs.share, "dskd/spelled_differently": pairs.spelled_differently})
        payload["pairs"] = pairs.folder
    if config.teacher_mode == "cache":
        payload["states"] = encode_rows(context, config, theirs, "training").folder
    return payload
