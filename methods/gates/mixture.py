"""Gaussian mixture with one covariance for all components, from several starts (3.9): in place of R's mclust "EEE".

Legend: N cells, Z width of the embedding, d columns that are clustered, K components.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tenfold.platform.errors import ModelError

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

WARD_ROWS = 2000  # mclust starts from as many
REGULARISATION = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
MAX_ITERATIONS, TOLERANCE = 500, 1e-5  # scikit-learn's own 1e-3 stops far too early on these data


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture; all arrays float64 but `order`.

    Attributes:
        weights: [K], positive, sum 1.
        means: [K, Z].
        precision: [Z, Z], inverse of the covariance that all components share; singular where only principal
            components were clustered.
        order: int64 [K], label of each component.
    """

    weights: np.ndarray
    means: np.ndarray
    precision: np.ndarray
    order: np.ndarray

    def predict(self, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the label of the likeliest component, int64 [N], and its posterior probability, float64 [N].

        The shared covariance makes the log posterior linear in the embedding: what all components have in common
        cancels.

        Args:
            latent: [N, Z] floats.

        Raises:
            ModelError: the embedding has another width than the mixture.
        """
        if latent.ndim != 2 or latent.shape[1] != self.means.shape[1]:
            raise ModelError(
                f"the embedding is {latent.shape}, the mixture was fitted to {self.means.shape[1]} columns; "
                "encode the cells with the network that the mixture belongs to"
            )
        centre = self.weights @ self.means  # a large common offset would cost digits
        means = self.means - centre
        directions = means @ self.precision
        scores = (np.asarray(latent, dtype=np.float64) - centre) @ directions.T
        scores += np.log(self.weights) - 0.5 * (directions * means).sum(axis=1)
        best = scores.argmax(axis=1)
        scores -= scores[np.arange(len(best)), best][:, None]
        return self.order[best], 1.0 / np.exp(scores).sum(axis=1)

    def save(self, path: Path | str) -> None:
        """Write the mixture as .npz, without pickle."""
        with open(path, "wb") as file:
            np.savez(file, weights=self.weights, means=self.means, precision=self.precision, order=self.order)

    @classmethod
    def load(cls, path: Path | str) -> Mixture:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            ModelError: the file is missing or damaged, or its arrays do not make a mixture.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values = [np.asarray(arrays[name], dtype=np.float64) for name in ("weights", "means", "precision")]
                order = np.asarray(arrays["order"], dtype=np.int64)
        except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ModelError(f"{path}: no mixture can be read: {error}. Save or copy it again") from error
        weights, means, precision = values
        number, width = means.shape if means.ndim == 2 else (0, 0)
        fits = (
            number > 0
            and weights.shape == (number,)
            and precision.shape == (width, width)
            and np.array_equal(np.sort(order), np.arange(number))
            and all(np.isfinite(value).all() for value in values)
            and (weights > 0).all()
        )
        if not fits:
            raise ModelError(
                f"{path}: weights {weights.shape}, means {means.shape}, precision {precision.shape} and order "
                f"{order.shape} do not make a mixture. Save or copy it again"
            )
        return cls(weights, means, precision, order)


@dataclass(frozen=True)
class Basis:
    """What the mixtures of one embedding share, whatever their K (3.9, steps 1 to 3).

    Attributes:
        centre: [Z], mean of the embedding.
        directions: [Z, d], the columns that are clustered: all, or the first principal components of few cells.
        values: [N, d] = (embedding - centre) @ directions.
        transformed: Q [N, r], mclust's "SVD" transform of the standardised columns.
        rows: cells that the trees are about, int64 [n].
        trees: Ward trees (scipy linkages) of Q and of the standardised columns; none for a single cell.
    """

    centre: np.ndarray
    directions: np.ndarray
    values: np.ndarray
    transformed: np.ndarray
    rows: np.ndarray
    trees: tuple[np.ndarray, ...]


def prepare_basis(latent: np.ndarray, seed: int) -> Basis:
    """Compute what all mixtures of an embedding share: columns, transform and Ward trees.

    Args:
        latent: [N, Z] finite floats.
        seed: of the draw of the cells for the trees, above 2000 cells.
    """
    from scipy.cluster.hierarchy import linkage

    latent = np.asarray(latent, dtype=np.float64)
    num_cells, width = latent.shape
    centre = latent.mean(axis=0)
    values, directions = latent - centre, np.eye(width)
    values[:, np.ptp(latent, axis=0) == 0] = 0.0  # not the rounding of the mean
    if num_cells < 30 * width:  # too few cells for a full covariance
        keep = min(max(2, num_cells // 30), num_cells, width)
        directions = np.linalg.svd(values, full_matrices=False)[2][:keep].T
        values = values @ directions
    deviations = values.std(axis=0, ddof=1) if num_cells > 1 else np.zeros(values.shape[1])
    varying = deviations > 1e-10 * deviations.max(initial=0.0)
    if not varying.any():
        standardised = transformed = np.zeros((num_cells, 1))
    else:
        standardised = values[:, varying] / deviations[varying]
        left, singular, _ = np.linalg.svd(standardised, full_matrices=False)
        transformed = left * np.sqrt(singular)
    rows = np.arange(num_cells)
    if num_cells > WARD_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(num_cells, WARD_ROWS, replace=False))
    starts = (transformed, standardised) if num_cells > 1 else ()
    trees = tuple(linkage(start[rows], method="ward") for start in starts)
    return Basis(centre, directions, values, transformed, rows, trees)


def fit_mixture(basis: Basis, num_components: int, seed: int) -> tuple[Mixture | None, float, list[str]]:
    """Fit K components from three starts and keep the likeliest fit (3.9, steps 3 to 6).

    One BLAS thread: the products are small, and on a busy machine several threads wait for each other (measured: 20
    to 40 times slower).

    Args:
        basis: of an embedding with N cells.
        num_components: K in 1..N.
        seed: of k-means and of EM.

    Returns:
        The mixture over the embedding's Z columns (component i has label i), its mean log-likelihood over the d
        columns that were clustered, and notes. The mixture is None where EM failed from every start.
    """
    from threadpoolctl import threadpool_limits

    if num_components == 1:
        return _single_component(basis)
    best, best_score, notes = None, -np.inf, []
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EM's iterations and of k-means on repeated points: noted below
        for rows, groups in _start_partitions(basis, num_components, seed):
            fitted = _expectation_maximisation(basis.values, rows, groups, seed)
            if fitted is not None and fitted[1] > best_score + 1e-9:
                best, best_score = fitted
    if best is None:
        return None, -np.inf, ["EM failed from every start"]
    if not best.converged_:
        notes.append(f"the Gaussian mixture had not converged after {MAX_ITERATIONS} iterations")
    return _in_embedding(basis, best.weights_, best.means_, best.precisions_), best_score, notes


def bic(score: float, num_cells: float, num_columns: int, num_components: int) -> float:
    """Return the Bayesian information criterion of a tied mixture from its mean log-likelihood (3.9).

    Args:
        score: mean log-likelihood.
        num_cells: independent cells that the mean is worth.
        num_columns: d.
        num_components: K.
    """
    free = num_components * num_columns + num_components - 1 + num_columns * (num_columns + 1) // 2
    return float(-2 * num_cells * score + free * np.log(num_cells))


def k_means(values: np.ndarray, num_groups: int, seed: int, *, restarts: int = 10) -> np.ndarray:
    """Return k-means groups, integers [N]; fewer than asked for where too few values differ."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer distinct values than groups
        groups = KMeans(num_groups, n_init=restarts, random_state=seed).fit_predict(values)
    return np.unique(groups, return_inverse=True)[1]


def _start_partitions(basis: Basis, number: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (cells, their groups 0..K-1): Ward of Q, Ward of the standardised columns, k-means of Q."""
    from scipy.cluster.hierarchy import cut_tree

    for tree in basis.trees:
        if number <= len(basis.rows):
            yield basis.rows, cut_tree(tree, n_clusters=number)[:, 0]
    groups = k_means(basis.transformed, number, seed)
    if groups.max() + 1 == number:  # fewer where too few cells differ
        yield np.arange(len(groups)), groups


def _expectation_maximisation(
    values: np.ndarray, rows: np.ndarray, groups: np.ndarray, seed: int
) -> tuple[GaussianMixture, float] | None:
    """Run EM on all cells from a partition of some; returns (fitted, mean log-likelihood), None where it fails."""
    from sklearn.mixture import GaussianMixture

    counts = np.bincount(groups)
    membership = np.eye(len(counts))[groups]
    means = membership.T @ values[rows] / counts[:, None]
    residuals = values[rows] - means[groups]
    covariance = residuals.T @ residuals / len(rows) + REGULARISATION[0] * np.eye(values.shape[1])
    for regularisation in REGULARISATION:
        mixture = GaussianMixture(
            len(counts),
            covariance_type="tied",
            means_init=means,
            weights_init=counts / len(rows),
            precisions_init=np.linalg.inv(covariance),
            reg_covar=regularisation,
            max_iter=MAX_ITERATIONS,
            tol=TOLERANCE,
            random_state=seed,
        )
        try:
            mixture.fit(values)
            return mixture, float(mixture.score(values))
        except ValueError:  # ill-conditioned covariance
            continue
    return None


def _single_component(basis: Basis) -> tuple[Mixture, float, list[str]]:
    """Return the one Gaussian of all cells: no EM, and a single cell is enough."""
    num_cells, width = basis.values.shape
    covariance = basis.values.T @ basis.values / num_cells + REGULARISATION[0] * np.eye(width)
    precision = np.linalg.inv(covariance)
    mahalanobis = ((basis.values @ precision) * basis.values).sum() / num_cells
    score = -0.5 * (width * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + mahalanobis)
    return _in_embedding(basis, np.ones(1), np.zeros((1, width)), precision), float(score), []


def _in_embedding(basis: Basis, weights: np.ndarray, means: np.ndarray, precision: np.ndarray) -> Mixture:
    """Return a mixture of the clustered columns as one of the embedding; distances along other directions are 0."""
    directions = basis.directions
    return Mixture(
        np.asarray(weights, dtype=np.float64),
        basis.centre + means @ directions.T,
        directions @ precision @ directions.T,
        np.arange(len(weights)),
    )
