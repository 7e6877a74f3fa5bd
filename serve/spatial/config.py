"""What the spatial application is told: storage, limits, models, keys, resources. Checked without importing Ray."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import StrictModel
from tenfold.platform.paths import expanded
from tenfold.platform.validation import validate_all
from tenfold.serve.config import ApiKeys, Copies
from tenfold.serve.spatial.analyser import SectionLimits

MEBIBYTE = 2**20
GIBIBYTE = 2**30


class SavedModel(StrictModel):
    """A fitted model with which clients may label new sections."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,100}$", description="the `model_id` of a request")
    path: str = Field(min_length=1, description="absolute path of its folder, the same on all nodes")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return _absolute(path)


class SpatialLimits(StrictModel):
    """What one client may send and ask for, and how long things are kept."""

    max_upload_bytes: int = Field(
        256 * MEBIBYTE, ge=1, description="bytes of a request's body; more is answered by 413"
    )
    upload_s: float = Field(900.0, gt=0, description="seconds that an upload may take; then 408")
    max_cells: int = Field(200_000, ge=1, description="cells of a section")
    max_genes: int = Field(60_000, ge=1, description="genes of a section")
    max_values: int = Field(400_000_000, ge=1, description="stored values of a matrix")
    max_unpacked_bytes: int = Field(8 * GIBIBYTE, ge=1, description="bytes of all arrays of a file, unpacked")
    max_epochs: int = Field(2000, ge=1, description="largest `epochs`")
    max_jobs_per_client: int = Field(4, ge=1, description="unfinished jobs of one client; more are answered by 429")
    max_jobs: int = Field(100, ge=1, description="unfinished jobs of all clients; more are answered by 429")
    predict_cells: int = Field(20_000, ge=1, description="cells that /v1/predict answers at once")
    check_s: float = Field(120.0, gt=0, description="seconds for checking an upload, for a plot or for a gene")
    predict_s: float = Field(120.0, gt=0, description="seconds for /v1/predict")
    job_s: float = Field(6 * 3600.0, gt=0, description="seconds that a job may compute")
    ttl_s: float = Field(24 * 3600.0, gt=0, description="seconds from the end of a job to the deletion of its files")
    retry_after_s: int = Field(10, ge=1, description="seconds in the Retry-After of a 429")

    def section(self, *, max_cells: int | None = None) -> SectionLimits:
        """Return what may be read into memory, with another limit on cells where one is given."""
        cells = self.max_cells if max_cells is None else min(self.max_cells, max_cells)
        return SectionLimits(cells, self.max_genes, self.max_values, self.max_unpacked_bytes)


class Jobs(StrictModel):
    """What the Ray task of a job takes from the cluster, and how it survives."""

    cpus: float = Field(1.0, gt=0, description="CPU cores of a job")
    gpus: float = Field(0.0, ge=0, description="GPUs of a job")
    memory_gb: float | None = Field(None, gt=0, description="GiB that a job reserves; default: none")
    max_attempts: int = Field(3, ge=1, description="starts of a job whose worker or node is lost")
    heartbeat_s: float = Field(5.0, gt=0, description="seconds between two signs of life of a running job")
    stale_s: float = Field(60.0, gt=0, description="seconds without one until the job's supervisor is looked after")

    @model_validator(mode="after")
    def _several_beats(self) -> Jobs:
        if self.stale_s < 3 * self.heartbeat_s:
            raise ValueError(f"stale_s = {self.stale_s:g} must be at least 3 x heartbeat_s = {3 * self.heartbeat_s:g}")
        return self


class SpatialReplicas(Copies):
    """How many copies of the HTTP side there are; the analyses do not run in them."""

    cpus: float = Field(0.5, ge=0, description="CPU cores that a copy reserves")
    processes: int = Field(2, ge=1, le=64, description="processes of a copy that read uploads and draw plots")
    memory_gb: float = Field(8.0, gt=0, description="GiB of data that one of these processes may allocate")
    max_ongoing: int = Field(64, ge=1, description="requests that a copy answers at once; more wait, or get 429")


class SpatialConfig(StrictModel):
    """The spatial application."""

    storage: str = Field(min_length=1, description="absolute path of a folder that all nodes share")
    method: str = Field(
        "gates", min_length=1, description="method that analyses sections, or module:name of an analyser of your own"
    )
    models: list[SavedModel] = Field(default_factory=list, description="saved models for /v1/predict")
    api_keys: ApiKeys | None = Field(None, description="where the clients' keys are; default: anyone may ask")
    client_header: str | None = Field(
        None,
        min_length=1,
        description="header in which your proxy writes the client's address (its last entry counts); default: the "
        "connection's address",
    )
    limits: SpatialLimits = Field(default_factory=SpatialLimits)
    jobs: Jobs = Field(default_factory=Jobs)
    replicas: SpatialReplicas = Field(default_factory=SpatialReplicas)

    @field_validator("storage")
    @classmethod
    def _absolute_storage(cls, storage: str) -> str:
        return _absolute(storage)

    @model_validator(mode="after")
    def _different_models(self) -> SpatialConfig:
        ids = [model.id for model in self.models]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"two models have the id {', '.join(twice)}; clients could not tell them apart")
        return self


def parse_spatial_config(data: dict[str, Any]) -> SpatialConfig:
    """Check the `args` of a Serve configuration file.

    Raises:
        ConfigError: all errors at once, each with key, value and what is allowed.
    """
    config, errors = validate_all(SpatialConfig, data)
    if config is None:
        raise ConfigError("the spatial application cannot be configured like this:\n" + "\n".join(errors))
    return config


def _absolute(path: str) -> str:
    # Replicas and tasks run in folders of their own.
    try:
        place = expanded(path)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if not place.is_absolute():
        raise ValueError("is not an absolute path")
    return str(place)
