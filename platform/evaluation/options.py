"""How a model is evaluated on instructions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from tenfold.platform.experiment import StrictModel
from tenfold.platform.models.options import GenerationOptions


class EvaluationOptions(StrictModel):
    """ROUGE-L of sampled responses; the defaults are the protocol of DSKD (arXiv 2406.17328).

    Its evaluation scripts forbid repeated 6-grams; the option is theirs, not the paper's.
    """

    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [10, 20, 30, 40, 50],
        min_length=1,
        description="one round of samples per seed; mean and standard deviation over the rounds (DSKD: these five)",
    )
    generation: GenerationOptions = Field(
        GenerationOptions(no_repeat_ngram_size=6), description="how responses are drawn (DSKD: 256 tokens, sampling)"
    )
    max_rows: int | None = Field(None, ge=1, description="generate for the first validation rows only; default: all")
    in_sweeps: bool = Field(
        False, description="also in every trial of a sweep, which otherwise compares what training itself measures"
    )
