"""Home folders in paths."""

from pathlib import Path

import pytest
from tenfold.platform.data.config import DataSource
from tenfold.platform.data.readers import read_rows
from tenfold.platform.errors import ConfigError
from tenfold.platform.models.references import locate
from tenfold.platform.paths import expanded
from tenfold.platform.storage import Storage
from tenfold.platform.tracking_store import absolute_uri

NOBODY = "~nobody-of-this-name/x"


def test_tilde_becomes_the_users_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert expanded("~/runs") == Path("/home/ada/runs")
    assert expanded("runs/~x") == Path("runs/~x")


@pytest.mark.parametrize(
    "use",
    [
        expanded,
        locate,
        Storage,
        lambda path: absolute_uri(f"sqlite:///{path}.db", Path("/base")),
        lambda path: absolute_uri(path, Path("/base")),
        lambda path: list(read_rows(DataSource(path=f"{path}.jsonl"))),
    ],
    ids=["path", "model", "storage", "tracking database", "tracking folder", "data"],
)
def test_unknown_user_is_one_sentence_wherever_a_path_is_given(use):
    with pytest.raises(ConfigError, match="no home folder for ~nobody-of-this-name"):
        use(NOBODY)
