"""Models that MLflow knows: `runs:/ID` and `models:/NAME@ALIAS`, kept there as a pointer or as a whole folder."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from tenfold.platform.errors import ModelError, TrackingError
from tenfold.platform.models.cache import build_once, cache_folder
from tenfold.platform.models.conversion import damage
from tenfold.platform.models.folder import CONFIG
from tenfold.platform.models.manifest import MANIFEST_NAME
from tenfold.platform.models.remote import model_at
from tenfold.platform.tracking_store import absolute_uri, check_tracking, one_line, sqlite_path, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

SCHEMES = ("runs:/", "models:/")
POINTER = "pointer.json"
RUN = re.compile(r"runs:/([^/]+)(?:/(.+))?")
MODEL = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


def fetch(reference: str, tracking_uri: str | None = None) -> Path:
    """Return a local folder with a model that MLflow knows.

    A pointer is followed to the folder it names, which must have the digest it says. What is not on a local disk is
    downloaded into the cache, whole or not at all.

    Args:
        reference: `runs:/RUN_ID` (its artifact folder `model`), `runs:/RUN_ID/ARTIFACT_FOLDER`, `models:/NAME@ALIAS`
            or `models:/NAME/VERSION`.
        tracking_uri: of MLflow; default: the one this process uses.

    Raises:
        ModelError: MLflow cannot be used or has no such model, or its files are missing or differ.
    """
    import mlflow

    given = tracking_uri or mlflow.get_tracking_uri()
    uri = absolute_uri(given, Path.cwd())
    shown = f"{reference} (MLflow at {without_password(uri)})"
    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        raise ModelError(f"{shown}: there is no such database. Point tracking.uri at the store that knows the model")
    try:
        check_tracking(uri)
        artifacts = _artifact_uri(mlflow.MlflowClient(uri), reference)
        folder = _local(artifacts) or _downloaded(artifacts, uri)
    except TrackingError as error:
        raise ModelError(f"{shown}: {error}") from error
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise ModelError(
            f"{shown}: {one_line(error)}. Check the id or name, and that tracking.uri is the store that knows it"
        ) from error
    if (folder / POINTER).is_file():
        return _follow(folder / POINTER, shown)
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{shown}: {artifacts} has neither {POINTER} nor {CONFIG}. The run kept no model, or not as a model folder"
        )
    return folder


def _artifact_uri(client: MlflowClient, reference: str) -> str:
    run = RUN.fullmatch(reference)
    if run:
        return f"{client.get_run(run[1]).info.artifact_uri}/{run[2] or 'model'}"
    model = MODEL.fullmatch(reference)
    if not model:
        raise ModelError(
            f"{reference}: write runs:/RUN_ID, runs:/RUN_ID/FOLDER, models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    name, alias, version = model.groups()
    if alias is not None:
        version = client.get_model_version_by_alias(name, alias).version
    uri = client.get_model_version_download_uri(name, str(version))
    return _artifact_uri(client, uri) if RUN.fullmatch(uri) else uri


def _local(artifacts: str) -> Path | None:
    parts = urlparse(artifacts)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(artifacts)


def _downloaded(artifacts: str, tracking_uri: str) -> Path:
    """Download an artifact folder: only its pointer where it has one."""
    import mlflow
    from mlflow.artifacts import download_artifacts

    listed = {Path(item.path).name: item.file_size for item in _list(artifacts, tracking_uri)}
    if not listed:
        raise mlflow.exceptions.MlflowException(f"{artifacts} is empty")
    with tempfile.TemporaryDirectory(prefix="tenfold-mlflow-") as scratch:
        # The manifest has the digests of all other files; it and the sizes tell one version from another.
        small = {}
        for name in (POINTER, MANIFEST_NAME, CONFIG):
            if name in listed:
                download_artifacts(f"{artifacts}/{name}", dst_path=scratch, tracking_uri=tracking_uri)
                small[name] = (Path(scratch) / name).read_text(encoding="utf-8")
    identity = json.dumps([artifacts, listed, small], sort_keys=True)
    target = cache_folder() / "mlflow" / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        if POINTER in small:
            (folder / POINTER).write_text(small[POINTER], encoding="utf-8")
            return
        logger.info("downloading %s from MLflow to %s", artifacts, target)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for item in Path(download_artifacts(artifacts, dst_path=scratch, tracking_uri=tracking_uri)).iterdir():
                shutil.move(item, folder / item.name)

    return build_once(target, build, lambda folder: damage(folder) if (folder / MANIFEST_NAME).is_file() else None)


def _list(artifacts: str, tracking_uri: str) -> list[Any]:
    from mlflow.artifacts import list_artifacts

    return list_artifacts(artifacts, tracking_uri=tracking_uri)


def _follow(pointer: Path, shown: str) -> Path:
    """Return the folder that a pointer names.

    Raises:
        ModelError: the pointer is damaged, the folder is gone, or another model is there by now.
    """
    try:
        content = json.loads(pointer.read_text(encoding="utf-8"))
        uri, digest = content["uri"], content["digest"]
        if not (isinstance(uri, str) and uri and isinstance(digest, str) and digest):
            raise ValueError("uri and digest must be text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{shown}: {pointer} is damaged: {error!r}. Log the model again") from error
    return model_at(uri, digest, shown)
