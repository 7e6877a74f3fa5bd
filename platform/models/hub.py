"""Models of the Hugging Face hub: safetensors, configuration and tokenizer files, nothing that is unpickled."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from tenfold.platform.errors import ModelError

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Folders hold other formats; consolidated files hold the same weights a second time.
IGNORED = ("*/*", "consolidated*")


def download(
    name: str,
    *,
    revision: str | None = None,
    weights: bool = True,
    code: bool = False,
    endpoint: str | None = None,
) -> Path:
    """Return the local copy of a hub model, downloading what is missing.

    huggingface_hub downloads each file under another name, goes on where it was interrupted, and gives no snapshot
    of which it knows that files are missing.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; default main.
        weights: also the safetensors files.
        code: also Python files.
        endpoint: address of another hub.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached and no whole copy is in its cache.
    """
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    shown = name if revision is None else f"{name} (revision {revision})"
    logger.debug("looking for %s on the Hugging Face hub", shown)
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED), endpoint=endpoint
        )
    except Exception as error:
        # Errors of the network library in use come through as well.
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{shown}: not usable from the Hugging Face hub: {type(error).__name__}: {reason} "
            f"Check the name, the network and HF_HUB_OFFLINE; a private or gated model needs HF_TOKEN. Offline, "
            f"give a local folder"
        ) from error
    return Path(folder)
