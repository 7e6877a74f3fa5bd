"""From an embedding to spatial domains (3.9).

Legend: N cells, Z width of the embedding, K domains.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tenfold.methods.gates.communities import communities, communities_of_number, neighbour_matrix
from tenfold.methods.gates.config import Clustering
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.mixture import Mixture, bic, fit_mixture, k_means, prepare_basis
from tenfold.platform.errors import DataError

__all__ = ["Domains", "Mixture", "best_number", "find_domains", "relabel", "tied_mixture"]

BIC_CELLS = 5000  # each of up to 19 numbers of domains is fitted from three starts
CELLS_PER_DOMAIN = 10  # with fewer, the likelihood grows without bound and BIC takes as many domains as it may
NEIGHBOURS = 15  # of leiden and louvain


@dataclass(frozen=True)
class Domains:
    """The domain of each cell.

    Attributes:
        labels: int64 [N]; 0 is the largest domain, ties go to the one with the smallest cell number.
        probability: float64 [N], posterior of the label; 1 for methods without one.
        mixture: what labels new cells; None for other methods than the mixture.
        notes: what a user should know, as sentences.
    """

    labels: np.ndarray
    probability: np.ndarray
    mixture: Mixture | None
    notes: list[str]

    @property
    def num_domains(self) -> int:
        """Number of domains that have a cell."""
        return len(np.unique(self.labels))


def find_domains(
    latent: np.ndarray,
    options: Clustering,
    n_domains: int | Literal["auto"],
    seed: int,
    neighbours: Graph | None = None,
) -> Domains:
    """Group cells by their embedding.

    Args:
        latent: [N, Z] floats, finite, N at least 1.
        options: kind and, for leiden and louvain, resolution: where given, n_domains is not read.
        n_domains: K; auto: the least BIC of tied mixtures.
        seed: of all that is random.
        neighbours: in space, of the N cells; auto counts cells that resemble their neighbours as fewer.

    Raises:
        DataError: more domains than cells, or an embedding that is empty or not finite.
    """
    if options.kind in ("leiden", "louvain") and options.resolution is not None:
        _check(latent, 1)
        return _communities(latent, options, len(latent), seed)
    number = best_number(latent, seed, neighbours) if n_domains == "auto" else n_domains
    notes = []
    if n_domains == "auto":
        sample = f" of {BIC_CELLS} cells drawn at random" if len(latent) > BIC_CELLS else ""
        notes = [f"{number} domains have the least BIC{sample}"]
    _check(latent, number)
    if options.kind == "gmm":
        found = tied_mixture(latent, number, seed)
    elif options.kind == "kmeans":
        found = _plain(k_means(np.asarray(latent, dtype=np.float64), number, seed), [], number)
    else:
        found = _communities(latent, options, number, seed)
    return dataclasses.replace(found, notes=[*notes, *found.notes])


def tied_mixture(latent: np.ndarray, n_domains: int, seed: int) -> Domains:
    """Find K domains with the multi-start tied Gaussian mixture of 3.9.

    Args:
        latent: [N, Z] floats, finite.
        n_domains: K in 1..N; components that no cell belongs to are left out of the labels, with a note.
        seed: of k-means, and of the draw of the cells that Ward's trees are about.

    Raises:
        DataError: more domains than cells, or an embedding that is empty or not finite.
    """
    _check(latent, n_domains)
    basis = prepare_basis(latent, seed)
    mixture, _, notes = fit_mixture(basis, n_domains, seed)
    if mixture is None:
        notes = [*notes, "domains are k-means groups, without probabilities"]
        return _plain(k_means(basis.transformed, n_domains, seed), notes, n_domains)
    components, probability = mixture.predict(latent)
    labels, order = relabel(components, n_domains)
    mixture = dataclasses.replace(mixture, order=order)
    return Domains(labels, probability, mixture, [*notes, *_missing(labels, n_domains)])


def best_number(latent: np.ndarray, seed: int, neighbours: Graph | None = None, low: int = 2, high: int = 20) -> int:
    """Return the number of components in low..high with the least BIC (3.9).

    At most as many as leave 10 cells to each (ours), and on a sample of 5000 cells where there are more (ours). BIC
    takes cells as independent, which an embedding that averages over neighbours makes untrue: N cells say as much as
    N / (1 + c) independent ones, c the correlation of a cell with its neighbours, summed over them (ours; without it
    the most components that are allowed nearly always win).

    Args:
        latent: [N, Z] finite floats.
        seed: of the mixtures and the sample.
        neighbours: in space, of the N cells; None takes the cells as independent.
        low: least number.
        high: greatest number.

    Raises:
        DataError: an embedding that is empty or not finite.
    """
    _check(latent, 1)
    sample = latent
    if len(latent) > BIC_CELLS:
        sample = latent[np.random.default_rng(seed).choice(len(latent), BIC_CELLS, replace=False)]
    high = min(high, max(low, len(sample) // CELLS_PER_DOMAIN), len(sample))
    basis = prepare_basis(sample, seed)
    fits = {number: fit_mixture(basis, number, seed) for number in range(low, high + 1)}
    if not fits:
        return 1
    cells, finest = float(len(sample)), fits[high][0]
    if neighbours is not None and finest is not None:
        # a cell of the sample has as many of its neighbours there as the sample has of all cells
        cells /= 1 + correlation_with_neighbours(latent, finest, neighbours) * len(sample) / len(latent)
    return min(fits, key=lambda number: bic(fits[number][1], cells, basis.values.shape[1], number))


def correlation_with_neighbours(latent: np.ndarray, mixture: Mixture, neighbours: Graph) -> float:
    """Return the correlation of a cell's residual with those of its neighbours, summed over them; 0 where negative.

    Residuals are what remains of the embedding within a component, whitened by the mixture's covariance.

    Args:
        latent: [N, Z].
        mixture: component i has label i. The finest that is considered leaves least of the domains in the residuals.
        neighbours: of the N cells.
    """
    residuals = latent - mixture.means[mixture.predict(latent)[0]]
    whitened = residuals @ mixture.precision
    own = (residuals * whitened).sum()
    shared = (residuals * (neighbours.to_matrix() @ whitened)).sum()
    return max(float(shared / own), 0.0) if own > 0 else 0.0


def relabel(groups: np.ndarray, num_groups: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Number groups by decreasing size; ties: the group with the smallest cell number first.

    Args:
        groups: integers >= 0, [N].
        num_groups: groups that there could be; empty ones come last.

    Returns:
        Labels int64 [N], and the label of each group int64 [num_groups].
    """
    counts = np.bincount(groups, minlength=num_groups or 0)
    first = np.full(len(counts), len(groups))
    np.minimum.at(first, groups, np.arange(len(groups)))
    order = np.empty(len(counts), dtype=np.int64)
    order[np.lexsort((first, -counts))] = np.arange(len(counts))
    return order[groups], order


def _communities(latent: np.ndarray, options: Clustering, number: int, seed: int) -> Domains:
    """Return the communities of the neighbour graph at the given resolution, or as many as asked for."""
    if (options.resolution is None and number in (1, len(latent))) or len(latent) < 3:
        groups = np.zeros(len(latent), dtype=np.int64) if number == 1 else np.arange(len(latent))
        return _plain(groups, [], number)
    matrix = neighbour_matrix(latent, NEIGHBOURS, seed)
    kind: Literal["leiden", "louvain"] = "leiden" if options.kind == "leiden" else "louvain"
    if options.resolution is not None:
        return _plain(communities(matrix, kind, options.resolution, seed), [], None)
    groups, resolution = communities_of_number(matrix, kind, number, seed)
    return _plain(groups, [f"{kind} at resolution {resolution:.4g}"], number)


def _plain(groups: np.ndarray, notes: list[str], number: int | None) -> Domains:
    labels, _ = relabel(groups)
    return Domains(labels, np.ones(len(labels)), None, [*notes, *_missing(labels, number)])


def _missing(labels: np.ndarray, number: int | None) -> list[str]:
    found = len(np.unique(labels))
    return [] if number is None or found == number else [f"{found} domains were found, {number} were asked for"]


def _check(latent: np.ndarray, number: int) -> None:
    if latent.ndim != 2 or not latent.size:
        raise DataError(f"the embedding is {latent.shape}; needs at least one cell and one column")
    if not 1 <= number <= len(latent):
        raise DataError(f"n_domains = {number}: there are {len(latent)} cells; give 1 to {len(latent)}")
    bad = np.flatnonzero(~np.isfinite(latent).all(axis=1))
    if len(bad):
        raise DataError(
            f"the embedding of {len(bad)} cells is not finite (first: cell {bad[0]}). Look at the counts of these "
            "cells, or train with a smaller learning rate"
        )
