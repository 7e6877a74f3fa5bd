"""What the application asks of an analysis: it checks sections, runs jobs, and answers questions about results.

The application knows no method. It loads one by name and calls `spatial_analyser()` on it, once in each process that
needs it: in the processes of a replica (`check`, `gene`, `genes`, `plot`, `describe_model`, `predict`) and in the Ray
task of a job (`run`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tenfold.platform.errors import ConfigError
from tenfold.platform.method import load_method

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[dict[str, Any]], None]

RESULT_FILES = {"json": "result.json", "csv": "domains.csv", "npz": "embedding.npz", "h5ad": "result.h5ad"}
VIEW_FILE = "view.npz"


class Cancelled(Exception):
    """Raised by `progress` inside of `run`: stop at once and let it pass."""


@dataclass(frozen=True)
class SectionLimits:
    """What may be read into memory; compared with the sizes in a file's header before anything is read.

    Attributes:
        max_cells: rows of the counts.
        max_genes: columns of the counts.
        max_values: values stored in one matrix; cells x genes where it is dense.
        max_bytes: all arrays together, unpacked.
    """

    max_cells: int
    max_genes: int
    max_values: int
    max_bytes: int


class SpatialAnalyser(Protocol):
    """An analysis of tissue sections.

    `files` names what a client sent: either `file` (.h5ad), or `counts` (.csv, .tsv, .npz or .mtx) and `coordinates`
    and perhaps `labels`, and for .mtx `barcodes` and `features` (.csv, .tsv). File names are the application's own,
    their endings the client's; all lie in one folder. Nothing in them is trusted.

    `params` are the set fields of `tenfold.serve.spatial.params.JobParams`, with JSON's types, checked one by one;
    what is not in it takes the analysis' default.
    """

    def check(self, files: Mapping[str, Path], params: Mapping[str, Any], limits: SectionLimits) -> dict[str, Any]:
        """Find out whether `run` would accept this, before arrays are read where headers say enough.

        Returns:
            Plain data for people: `n_obs`, `n_vars`, `notes` (list of sentences) and what else is worth knowing.

        Raises:
            DataError: it would not. One problem a line, each beginning with what is wrong: `file: ...`, `X holds ...`,
                `obsm['spatial'] is ...`, `n_domains = ...`. The path of a file stands for its name.
        """
        ...

    def run(self, files: Mapping[str, Path], params: Mapping[str, Any], folder: Path, progress: Progress) -> None:
        """Do the whole analysis, in a Ray task. May be called again from the start after a lost worker.

        Writes into the empty `folder`: result.json, domains.csv (header, cell ids in the first column), result.h5ad,
        embedding.npz where the method has an embedding, and for the page view.npz: `x`, `y` float32 [N] (sections side
        by side), `domain` int16 [N] (0 is the first, -1 none), `probability` float32 [N] and, where there are any,
        `refined` int16 [N], `umap` float32 [N, 2], and `y_up`, true where the y axis points up (else down, as in
        images). Rows are in the order of domains.csv. No array is of dtype object.

        Args:
            files: what the client sent.
            params: as above.
            folder: where results go.
            progress: called as often as there is news, with `stage` (a word for people) and while training `epoch`,
                `epochs`, `loss`; cheap.

        Raises:
            DataError: the section cannot be analysed; same form as in `check`.
            Cancelled: from `progress`.
        """
        ...

    def genes(self, folder: Path) -> list[str]:
        """Return the genes by which `gene` and `plot` can colour the results in a folder."""
        ...

    def gene(self, folder: Path, name: str) -> np.ndarray:
        """Return the expression of a gene, float32 [N] in the order of view.npz.

        Raises:
            DataError: no such gene; names the nearest.
        """
        ...

    def plot(self, folder: Path, color: str, size: float | None, dpi: int) -> bytes:
        """Draw the tissue as a PNG, coloured by `domain`, `refined`, `truth` or a gene.

        Args:
            folder: results of `run`.
            color: what the colours show.
            size: points; None chooses by the number of spots.
            dpi: dots per inch.

        Raises:
            DataError: nothing of this name can be shown; names the nearest.
        """
        ...

    def describe_model(self, model_folder: Path) -> dict[str, Any]:
        """Return what a client should know about a saved model (method, number of domains and genes), as plain data.

        Raises:
            ModelError: the folder holds no such model.
        """
        ...

    def predict(self, files: Mapping[str, Path], model_folder: Path, params: Mapping[str, Any]) -> dict[str, Any]:
        """Assign domains with a saved model, without training.

        `check` has accepted the files with a limit on cells before this is called. The form of the answer is that of
        result.json.

        Raises:
            DataError: the section does not fit the model.
        """
        ...


def load_analyser(method: str) -> SpatialAnalyser:
    """Load the analysis by the configured name.

    Args:
        method: a name of the method table, or `module:name` of a class or function that returns an analyser.

    Raises:
        ConfigError: there is none of this name, or the method does not analyse sections.
    """
    if ":" in method:
        module, _, attribute = method.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"method = {method!r}: cannot be loaded: {error}. Give module:name of a class"
            ) from error
    make = getattr(load_method(method), "spatial_analyser", None)
    if make is None:
        raise ConfigError(f"method = {method!r}: does not analyse tissue sections; use gates")
    return make()
