"""Which data, and how it becomes token ids: the configuration section."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field, model_validator
from tenfold.platform.experiment import StrictModel

FIELDS = ("instruction", "input", "response", "messages")


class DataSource(StrictModel):
    """One file or data set.

    Without `fields` the columns are found by name, the first of each list that a row has: instruction, prompt, query,
    question; input, context; output, response, answer, completion; or messages; or self-instruct's instances. With
    `fields` exactly the named columns are read.
    """

    path: str = Field(
        min_length=1,
        description="file or URI (s3://, gs://); sample:PATH for packaged samples; a data set's name with format hub",
    )
    format: Literal["auto", "json", "jsonl", "parquet", "hub", "ray"] = Field(
        "auto", description="auto: by the file's ending; hub: Hugging Face data set; ray: read with Ray Data"
    )
    split: str | None = Field(None, description="split of a hub data set; default: train")
    start: int = Field(0, ge=0, description="first row taken, from 0")
    stop: int | None = Field(None, ge=1, description="row after the last one taken; default: to the end")
    fields: dict[str, str] = Field(
        default_factory=dict,
        description=f"our name ({', '.join(FIELDS)}) -> the data's column; default: found by name",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataSource:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop must be above start; got start {self.start}, stop {self.stop}")
        if self.split is not None and self.format != "hub":
            raise ValueError(f"split is read with format hub only; got format {self.format}. Remove split")
        if self.path.startswith("sample:"):
            inner = PurePosixPath(self.path.removeprefix("sample:"))
            if inner.is_absolute() or ".." in inner.parts:
                raise ValueError("sample:PATH is relative to the packaged samples and must not leave them")
        return self

    @model_validator(mode="after")
    def _fields_are_complete(self) -> DataSource:
        unknown = sorted(set(self.fields) - set(FIELDS))
        if unknown:
            raise ValueError(f"fields: unknown {', '.join(unknown)}; allowed: {', '.join(FIELDS)}")
        names = set(self.fields)
        if names and names != {"messages"} and names not in ({*FIELDS[:3]}, {"instruction", "response"}):
            raise ValueError(
                f"fields names {', '.join(sorted(names))}; needs messages alone, or instruction, response (and input)"
            )
        return self


class DataConfig(StrictModel):
    """Training and validation data and their tokenisation."""

    train: list[DataSource] = Field(min_length=1, description="training data")
    validation: list[DataSource] | None = Field(
        None, min_length=1, description="validation data; default: a part of the training data"
    )
    validation_ratio: float = Field(
        0.1, gt=0, lt=1, description="share of the training data held out where `validation` is not given"
    )
    split_seed: int = Field(
        0, ge=0, description="shuffles the training data before the last part is held out; independent of `seed`"
    )
    template: Literal["chat", "alpaca", "none"] = Field(
        "chat",
        description="chat: the tokenizer's own; alpaca: that of DSKD's Dolly sets (arXiv 2406.17328); none: bare text",
    )
    system: str | None = Field(
        None, min_length=1, description="system message of conversations that have none; chat template only"
    )
    max_length: int = Field(512, ge=2, description="tokens of prompt and response together (DSKD: 512)")
    max_prompt_length: int = Field(256, ge=1, description="first tokens of the prompt that are kept (DSKD: 256)")
    skip_bad_rows: bool = Field(False, description="leave out and count rows that cannot be used, instead of stopping")
    max_train_rows: int | None = Field(None, ge=1, description="use only the first rows after the split")
    max_validation_rows: int | None = Field(None, ge=1, description="use only the first rows after the split")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.max_prompt_length > self.max_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} is above max_length {self.max_length}; "
                "lower it, or no response fits"
            )
        if self.system is not None and self.template != "chat":
            raise ValueError(f"system is read by the chat template only; got template {self.template}. Remove system")
        return self
