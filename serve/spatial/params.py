"""The options of a job as clients write them; checked here for form, by the analysis for sense."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from tenfold.platform.experiment import StrictModel
from tenfold.platform.validation import nearest
from tenfold.serve.errors import ApiError, FieldError

SECTION_PARTS = ("X", "obs", "var", "obsm", "obsp", "layers", "uns", "raw")
Text = Field(None, min_length=1, max_length=200)


class JobParams(StrictModel):
    """Options of one analysis; all may be left out.

    The names are those of the method's own configuration, without its sections.
    """

    method: str | None = Field(None, pattern=r"^[a-z0-9_]{1,40}$", description="gates, or a method compared with it")
    n_domains: int | Literal["auto"] | None = Field(None, description="number of domains, at least 1, or auto")
    alpha: float | None = Field(None, ge=0, le=1, description="weight of the expression graph")
    mode: Literal["spatial-similarity", "spatial-prune", "prune-similarity"] | None = Field(
        None, description="which two graphs are fused"
    )
    spatial_graph: Literal["radius", "knn", "delaunay", "existing"] | None = Field(
        None, description="which cells are neighbours in space"
    )
    radius: float | Literal["auto"] | None = Field(None, description="radius of neighbours, above 0, or auto")
    k: int | None = Field(None, ge=1, le=100, description="most similar cells in the expression graph")
    num_genes: int | None = Field(None, ge=1, description="highly variable genes")
    preprocess: bool | None = Field(None, description="false: X is log-normalised already")
    smooth_input: int | None = Field(
        None, ge=0, le=10, description="rounds of averaging over neighbours before training"
    )
    epochs: int | None = Field(None, ge=1, description="passes over the graph")
    clustering: Literal["gmm", "leiden", "louvain", "kmeans"] | None = Field(None, description="how domains are found")
    refine: Literal["none", "majority", "spagcn"] | None = Field(None, description="label refinement")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="of everything random")
    labels: str | None = Text
    layer: str | None = Text
    spatial_key: str | None = Text
    sample_key: str | None = Text
    transpose: bool | None = Field(None, description="the counts table has genes in rows")

    @model_validator(mode="after")
    def _positive(self) -> JobParams:
        if isinstance(self.n_domains, int) and self.n_domains < 1:
            raise ValueError(f"n_domains = {self.n_domains}; give at least 1, or auto")
        if isinstance(self.radius, float) and not 0 < self.radius < float("inf"):
            raise ValueError(f"radius = {self.radius:g}; give a positive number, or auto")
        return self


def parse_params(text: str, *, max_epochs: int) -> dict[str, Any]:
    """Read the form field `params`.

    Args:
        text: a JSON object, or nothing.
        max_epochs: largest `epochs`.

    Returns:
        The options that were set, with plain values.

    Raises:
        ApiError: 422, with every wrong field.
    """
    try:
        data = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise invalid([FieldError("params", f"not JSON: {error}")]) from error
    if not isinstance(data, dict):
        raise invalid([FieldError("params", f'must be a JSON object such as {{"n_domains": 7}}, not {text[:60]}')])
    try:
        params = JobParams.model_validate_json(text or "{}", strict=True)
    except ValidationError as error:
        raise invalid(_field_errors(error)) from error
    if params.epochs is not None and params.epochs > max_epochs:
        problem = f"epochs = {params.epochs}; this server allows at most {max_epochs}"
        raise invalid([FieldError("params.epochs", problem)])
    return params.model_dump(exclude_none=True)


def invalid(errors: list[FieldError]) -> ApiError:
    """Return the answer to data that cannot be used, with one entry a wrong field."""
    message = "; ".join(
        error.message if error.message.startswith(error.field) else f"{error.field}: {error.message}"
        for error in errors
    )
    return ApiError(422, message, param=errors[0].field, code="invalid_data", errors=errors)


def _field_errors(error: ValidationError) -> list[FieldError]:
    found: dict[str, str] = {}
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if detail["type"] == "extra_forbidden":
            near = nearest(name, JobParams.model_fields)
            hint = f"did you mean {near}? " if near else ""
            text = f"unknown; {hint}known are {', '.join(JobParams.model_fields)}"
        else:
            described = JobParams.model_fields[name].description if name in JobParams.model_fields else None
            got = "" if detail["type"] == "value_error" else f" = {str(detail['input'])[:60]!r}"
            text = f"{got} {detail['msg'].removeprefix('Value error, ')}".strip() + (
                f" ({described})" if described else ""
            )
        # One sentence a field: a union reports each of its branches.
        found.setdefault(f"params.{name}" if name else "params", text)
    return [FieldError(field, text) for field, text in found.items()]


def field_errors(error: Exception, files: Mapping[str, Path], field: str = "file") -> list[FieldError]:
    """Take an analyser's error apart, one problem a line, and name files as the client knows them.

    Args:
        error: its message begins each line with `FIELD: ` or, for parts of a section and options, with the field.
        files: what was sent -> stored file, whose path is none of the client's business.
        field: for lines that name none.
    """
    found = []
    for line in str(error).splitlines():
        for name, path in files.items():
            line = line.replace(str(path), name)
        named, colon, problem = line.strip().partition(": ")
        begin = re.match(r"(\w+)(\['[^']*'\])?(?=[ ,:])", line)
        if colon and re.fullmatch(r"[\w.]+(\['[^']*'\])?", named):
            found.append(FieldError(named, problem))
        elif begin and (begin[1] in SECTION_PARTS or begin[1] in JobParams.model_fields or begin[1] in files):
            found.append(FieldError(begin[0], line.strip()))
        elif line.strip():
            found.append(FieldError(field, line.strip()))
    return found or [FieldError(field, "cannot be used")]
