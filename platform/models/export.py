"""Copying a model to a folder of its own, for people and programs that do not know tenfold."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tenfold.platform.errors import ConfigError, ModelError
from tenfold.platform.models.architectures import architecture_module, stored_type
from tenfold.platform.models.configuration import read_config
from tenfold.platform.models.folder import check_new, fetch_folder, model_files, new_folder
from tenfold.platform.models.manifest import Manifest, verify_manifest, write_manifest
from tenfold.platform.models.references import resolve
from tenfold.platform.paths import expanded

CARD = "README.md"
# Kinds of models that transformers loads from a folder.
HUGGING_FACE_FLAVORS = ("causal-lm", "moe-causal-lm", "seq2seq")


def export_model(source: str | Path, target: Path) -> Path:
    """Copy a model folder to a new place: what loads it, a model card, and a manifest.

    The source is compared with its manifest before, the copy with its own afterwards. Of a Hugging Face folder only
    what `from_pretrained` needs is taken, and configuration and tokenizer of the copy are loaded. The digest of the
    model stays the same.

    Args:
        source: a model reference, or the URI of a model folder in storage.
        target: new or empty folder.

    Returns:
        The target, absolute.

    Raises:
        ModelError: the target has content or cannot be written; the source has no manifest or is damaged.
    """
    target = expanded(target).absolute()
    check_new(target)
    with tempfile.TemporaryDirectory(prefix="tenfold-export-") as scratch:
        folder = _fetch(str(source), Path(scratch))
        manifest = verify_manifest(folder)
        files = [folder / name for name in manifest.files]
        if manifest.flavor in HUGGING_FACE_FLAVORS:
            files = model_files(folder)
        unknown = [path.name for path in files if path.name not in manifest.files]
        if unknown:
            raise ModelError(
                f"{folder}: {unknown[0]} is not in its manifest, so it cannot be checked. Remove the file"
            )
        with new_folder(target) as copy:
            for path in files:
                shutil.copyfile(path, copy / path.name)
            (copy / CARD).write_text(model_card(manifest, architecture_module(stored_type(copy))), encoding="utf-8")
            write_manifest(
                copy,
                flavor=manifest.flavor,
                method=manifest.method,
                name=manifest.name,
                parents=manifest.parents,
                metrics=manifest.metrics,
                created=manifest.created,
            )
            _check_copy(copy, manifest)
    return target


def _fetch(source: str, scratch: Path) -> Path:
    from tenfold.platform.storage import Storage

    if "://" not in source:
        return resolve(source)
    try:
        place = Storage(source)
        local = place.local_path()
        if local is None:
            local = scratch / "model"
            local.mkdir()
            fetch_folder(place, local)
        return local
    except (ConfigError, OSError) as error:
        raise ModelError(f"{source}: no model folder can be read there: {error}") from error


def _check_copy(copy: Path, original: Manifest) -> None:
    from transformers import AutoTokenizer

    written = verify_manifest(copy)
    differing = [name for name in written.files if name != CARD and written.files[name] != original.files[name]]
    if differing:
        raise ModelError(f"{copy}: {differing[0]} was not copied as it is. Check the disk and try again")
    if original.flavor not in HUGGING_FACE_FLAVORS:
        return
    read_config(copy)
    try:
        AutoTokenizer.from_pretrained(copy, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the model's tokenizer cannot be loaded: {error}. Save the model again with one") from error


def model_card(manifest: Manifest, module: str | None = None) -> str:
    """Return the text of a model's README.md: what it is, what it was made from, its metrics, how to load it.

    Args:
        manifest: of the model.
        module: what must be imported before transformers knows the model's type; None for types of its own.
    """
    parents = [
        f"- {parent.kind}: `{parent.reference}`" + (f" (sha256 {parent.digest})" if parent.digest else "")
        for parent in manifest.parents
    ]
    metrics = [f"| {name} | {value:.6g} |" for name, value in sorted(manifest.metrics.items())]
    table = ["| metric | value |", "|---|---|", *metrics] if metrics else ["None recorded."]
    lines = [
        "---",
        f"library_name: {'transformers' if manifest.flavor in HUGGING_FACE_FLAVORS else 'tenfold'}",
        f"tags: [tenfold, {manifest.method}]",
        "---",
        "",
        f"# {manifest.name}",
        "",
        f"A {manifest.flavor} made by `{manifest.method}` (tenfold {manifest.tenfold_version}), {manifest.created}.",
        "",
        "## Made from",
        "",
        *(parents or ["Nothing else."]),
        "",
        "## Metrics",
        "",
        *table,
        "",
        "## Use",
        "",
        *_use(manifest, module),
        "",
        f"`tenfold.json` has the sha256 of every file. Digest of the model: `{manifest.digest}`.",
        "",
    ]
    return "\n".join(lines)


def _use(manifest: Manifest, module: str | None) -> list[str]:
    if manifest.flavor not in HUGGING_FACE_FLAVORS:
        how = f"`tenfold methods {manifest.method}` says how."
        return [f"The method `{manifest.method}` of tenfold loads this folder; {how}"]
    loader = "AutoModelForSeq2SeqLM" if manifest.flavor == "seq2seq" else "AutoModelForCausalLM"
    return [
        *(["transformers knows this architecture when tenfold's module was imported.", ""] if module else []),
        "```python",
        *([f"import {module}"] if module else []),
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
    ]
