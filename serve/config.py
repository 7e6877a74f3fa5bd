"""What the language-model server is told: models, limits, keys, replicas. Checked without importing torch or Ray."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import StrictModel
from tenfold.platform.models.source import REFERENCE_FORMS, ModelSource
from tenfold.platform.paths import expanded
from tenfold.platform.validation import validate_all


class ServedModel(StrictModel):
    """One model and the name by which clients ask for it."""

    name: str = Field(min_length=1, description="the `model` of a request")
    model: str = Field(min_length=1, description=f"where the weights are: {REFERENCE_FORMS}")
    tokenizer: str | None = Field(None, min_length=1, description="default: the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the weights in memory; auto: as stored"
    )
    revision: str | None = Field(None, description="branch, tag or commit; only for hub names")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="expected digest of the model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    max_context: int | None = Field(
        None, ge=2, description="most tokens of prompt and answer together; default: what the model was made for"
    )
    cache_gb: float = Field(
        1.0, gt=0, description="most GiB for the keys and values of running requests; must hold one of max_context"
    )

    @property
    def source(self) -> ModelSource:
        """What `tenfold.platform.models.loading` loads."""
        return ModelSource(
            model=self.model,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            revision=self.revision,
            sha256=self.sha256,
            trust_remote_code=self.trust_remote_code,
        )


class ApiKeys(StrictModel):
    """Where the keys are that clients must send as `Authorization: Bearer KEY`; never the keys themselves."""

    env: str | None = Field(
        None, min_length=1, description="environment variable of the replicas; several keys are separated by commas"
    )
    file: str | None = Field(None, min_length=1, description="file on the replicas' nodes, one key a line, # comments")

    @model_validator(mode="after")
    def _one_place(self) -> ApiKeys:
        if (self.env is None) == (self.file is None):
            raise ValueError("needs exactly one of env and file")
        return self

    def load(self) -> list[str]:
        """Read the keys where this process runs.

        Raises:
            ConfigError: the variable or file is missing or holds no key.
        """
        if self.env is not None:
            place = f"api_keys.env = {self.env!r}"
            found = [key.strip() for key in os.environ.get(self.env, "").split(",")]
            hint = "set the variable before Ray is started on the node, or use api_keys.file"
        else:
            place = f"api_keys.file = {self.file!r}"
            try:
                lines = expanded(str(self.file)).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{place}: cannot be read: {error}") from error
            found = [line.partition("#")[0].strip() for line in lines]
            hint = "write one key a line into it"
        keys = [key for key in found if key]
        if not keys:
            raise ConfigError(f"{place}: holds no key; {hint}")
        return keys


class Limits(StrictModel):
    """What one request may ask for, and how many may be there at once, for each replica and model."""

    max_body_bytes: int = Field(2**20, ge=1, description="bytes of a request's body; more is answered by 413")
    max_messages: int = Field(256, ge=1, description="messages of a chat request")
    default_max_tokens: int = Field(
        256, ge=1, description="tokens of a chat answer where the request says nothing, if the context has room"
    )
    max_running: int = Field(16, ge=1, description="requests of one model that are generated in one batch")
    max_waiting: int = Field(64, ge=0, description="requests of one model that wait for it; more are answered by 429")
    max_batch_tokens: int = Field(512, ge=16, description="tokens in one forward pass; longer prompts take several")
    stream_interval_s: float = Field(
        0.02,
        ge=0,
        description="seconds between the events of one stream: faster tokens share an event, because Serve passes on "
        "every event by itself; 0 sends each token alone",
    )
    retry_after_s: int = Field(1, ge=1, description="seconds in the Retry-After of a 429")


class Copies(StrictModel):
    """How many copies of an application there are."""

    min: int = Field(1, ge=1, description="copies")
    max: int | None = Field(None, ge=1, description="copies that autoscaling may reach; default: no autoscaling")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max = {self.max} is less than min = {self.min}")
        return self

    def scaling(self, target_ongoing_requests: int) -> dict[str, Any]:
        """Return what `serve.deployment` takes; autoscaling aims at so many requests a copy."""
        if self.max is None:
            return {"num_replicas": self.min}
        return {
            "autoscaling_config": {
                "min_replicas": self.min,
                "max_replicas": self.max,
                "target_ongoing_requests": target_ongoing_requests,
            }
        }


class Replicas(Copies):
    """How many copies of the server there are, and what each takes from the cluster."""

    cpus: float = Field(1.0, gt=0, description="CPU cores of a copy; also its torch threads")
    gpus: float = Field(0.0, ge=0, description="GPUs of a copy; 0 generates on the CPU")
    drain_s: float = Field(60.0, ge=0, description="seconds that a stopping copy waits for its running answers")


class ServeConfig(StrictModel):
    """The language-model application."""

    models: list[ServedModel] = Field(min_length=1, description="models by name; every replica holds all of them")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="transformers: continuous batching on CPU or GPU; vllm: Ray Serve LLM"
    )
    api_keys: ApiKeys | None = Field(None, description="where the clients' keys are; default: anyone may ask")
    limits: Limits = Field(default_factory=Limits)
    replicas: Replicas = Field(default_factory=Replicas)

    @model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two models have the name {', '.join(twice)}; clients could not tell them apart")
        if self.engine == "vllm":
            self._only_what_vllm_knows()
        return self

    def _only_what_vllm_knows(self) -> None:
        useless = [name for name in ("api_keys", "limits") if name in self.model_fields_set]
        useless += [f"replicas.{name}" for name in ("cpus", "drain_s") if name in self.replicas.model_fields_set]
        for index, model in enumerate(self.models):
            useless += [
                f"models.{index}.{name}" for name in ("tokenizer", "cache_gb") if name in model.model_fields_set
            ]
        if useless:
            raise ValueError(f"engine: vllm does not know {', '.join(useless)}; leave them out")
        if self.replicas.gpus != int(self.replicas.gpus):
            raise ValueError(f"engine: vllm needs whole GPUs, not replicas.gpus = {self.replicas.gpus:g}")


def parse_config(data: dict[str, Any]) -> ServeConfig:
    """Check the `args` of a Serve configuration file.

    Raises:
        ConfigError: all errors at once, each with key, value and what is allowed.
    """
    config, errors = validate_all(ServeConfig, data)
    if config is None:
        raise ConfigError("the language-model application cannot be configured like this:\n" + "\n".join(errors))
    return config
