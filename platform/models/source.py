"""Which model and tokenizer an option means; checked without importing torch or transformers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from tenfold.platform.experiment import StrictModel

REFERENCE_FORMS = (
    "a folder, a .gguf file, the address of a model in run storage (s3://, gs://, ...), runs:/MLFLOW_RUN_ID, "
    "models:/NAME@ALIAS, models:/NAME/VERSION, package:MODULE/FILE.gguf, sample:PATH, or a Hugging Face hub name"
)


class ModelSource(StrictModel):
    """A causal language model with its tokenizer: either weights that exist, or a fresh random model."""

    model: str | None = Field(None, min_length=1, description=f"where the weights are: {REFERENCE_FORMS}")
    config: dict[str, Any] | None = Field(
        None,
        description="fresh random model: model_type and the options of that type's transformers configuration; "
        "vocab_size defaults to the tokenizer's length, special token ids to the tokenizer's",
    )
    tokenizer: str | None = Field(
        None, min_length=1, description=f"default: the model's own; needed with config: {REFERENCE_FORMS}"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the weights in memory; auto: as stored, float32 for a fresh model"
    )
    revision: str | None = Field(None, description="branch, tag or commit; only for hub names")
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="expected sha256 of the .gguf file, or digest of the model folder; another one is an error",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; only for sources you have read"
    )

    @model_validator(mode="after")
    def _weights_or_fresh(self) -> ModelSource:
        if (self.model is None) == (self.config is None):
            raise ValueError("needs exactly one of model (existing weights) and config (a fresh random model)")
        if self.config is not None:
            if not isinstance(self.config.get("model_type"), str):
                raise ValueError("config needs model_type, e.g. model_type: llama")
            if self.tokenizer is None:
                raise ValueError("a fresh model (config) needs tokenizer")
            useless = [name for name in ("revision", "sha256") if getattr(self, name) is not None]
            if useless:
                raise ValueError(f"{' and '.join(useless)} belong to existing weights (model), not to a fresh model")
        return self

    @property
    def name(self) -> str:
        """What messages and tables call it."""
        return self.model if self.model is not None else f"fresh {(self.config or {})['model_type']}"
