"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from tenfold.platform.errors import ConfigError


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~user` replaced by that home folder.

    Raises:
        ConfigError: this machine knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ConfigError(f"{path}: this machine knows no home folder for {user}. Write the whole path") from error
