"""Model folders in run storage: on a local disk as they are, from elsewhere copied once into the cache."""

from __future__ import annotations

import logging
from pathlib import Path

from tenfold.platform.errors import ConfigError, ModelError
from tenfold.platform.models.cache import build_once, cache_folder
from tenfold.platform.models.conversion import damage
from tenfold.platform.models.folder import fetch_folder
from tenfold.platform.models.manifest import MANIFEST_NAME, Manifest, model_digest
from tenfold.platform.storage import Storage
from tenfold.platform.tracking_store import one_line

logger = logging.getLogger(__name__)


def model_at(uri: str, digest: str | None = None, shown: str | None = None) -> Path:
    """Return a local folder with the model at an address.

    Args:
        uri: a folder, or s3://, gs://, ...: whatever `Storage` reaches.
        digest: that the model must have; default: what its manifest says.
        shown: what messages call it.

    Raises:
        ModelError: nothing is there, it cannot be read, or another model is there by now.
    """
    shown = shown or uri
    try:
        place = Storage(uri)
        local = place.local_path()
        if local is None:
            digest = digest or Manifest.model_validate_json(place.read_text(MANIFEST_NAME)).digest
            target = cache_folder() / "remote" / digest[:16]
            return build_once(target, lambda folder: _copy(place, digest, folder, shown), damage)
    except (ConfigError, OSError, ValueError) as error:
        raise ModelError(f"{shown}: its files are at {uri}, which cannot be read: {one_line(error)}") from error
    if not local.is_dir():
        raise ModelError(f"{shown}: its files were at {uri}, where there is no folder now. Restore it, or run again")
    if digest is not None:
        _check(local, digest, shown)
    return local


def _copy(place: Storage, digest: str, folder: Path, shown: str) -> None:
    logger.info("downloading %s to the cache", place.uri)
    fetch_folder(place, folder)
    _check(folder, digest, shown)


def _check(folder: Path, digest: str, shown: str) -> None:
    found = model_digest(folder)
    if found != digest:
        raise ModelError(
            f"{shown}: the model at {folder} has sha256 {found[:12]}, the pointer says {digest[:12]}. The files were "
            f"replaced since: restore them, or log the model again"
        )
