"""How a model is evaluated on instructions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from tenfold.platform.experiment import StrictModel
from tenfold.platform.models.options import GenerationOptions


class JudgeOptions(StrictModel):
    """A language model that compares two answers, behind any OpenAI-compatible address.

    The defaults are those of DSKD's appendix (arXiv 2406.17328): 100 items drawn by seed 42, either order by chance,
    temperature 0.1, up to 5 retries.
    """

    base_url: str = Field(description="up to and with /v1, e.g. https://api.openai.com/v1 or http://localhost:8000/v1")
    model: str = Field(min_length=1, description="the judge's name there")
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="name of the environment variable that holds the API key, which is never in a file; none: no key",
    )
    max_items: int = Field(100, ge=1, description="items that are compared; drawn at random if there are more (DSKD)")
    seed: Annotated[int, Field(ge=0)] = Field(42, description="which items, and whose answer is shown first (DSKD)")
    both_orders: bool = Field(False, description="ask twice, with the answers exchanged: twice the comparisons")
    temperature: float | None = Field(0.1, ge=0, description="of the judge (DSKD: 0.1); null: the server's own")
    max_tokens: int | None = Field(
        512, ge=1, description="longest answer of the judge, more for one that reasons aloud; null: the server's own"
    )
    max_retries: int = Field(
        5, ge=0, description="times to ask again after no answer or one without verdict (DSKD: 5)"
    )
    retry_delay_s: float = Field(1.0, ge=0, description="seconds before the first retry; doubles with each")
    timeout_s: float = Field(120.0, gt=0, description="seconds to wait for an answer")
    max_concurrent: int = Field(4, ge=1, description="questions that are open at once")

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        from urllib.parse import urlsplit

        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is no address; give one like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("no user, password or key in an address; name the key's variable with api_key_env")
        return value.rstrip("/")


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
    judge: JudgeOptions | None = Field(None, description="a language model compares the answers; off by default")
