"""SpaGCN without histology (Hu et al., Nature Methods 2021), as a method that GATES is compared with (6.3).

Legend: N cells, G genes, d principal components, K domains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from tenfold.methods.gates.baselines import pca_embedding
from tenfold.methods.gates.communities import communities_of_number, neighbour_matrix
from tenfold.methods.gates.domains import relabel
from tenfold.methods.gates.mixture import k_means
from tenfold.methods.gates.nearest import as_coordinates, by_section
from tenfold.methods.gates.refinement import spagcn_rule
from tenfold.platform.errors import DataError
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Progress = Callable[[int, int, float], None]
NUM_COMPONENTS, MIN_CELLS, DROPPED = 50, 3, ("ERCC", "MT-")
CONTRIBUTION, CONTRIBUTION_TOLERANCE, LEAST_WEIGHT = 0.5, 0.01, 1e-4
FREEDOM = 0.2  # nu of the Student-t assignment
EPOCHS, LEARNING_RATE, REFRESH, CHANGED = 200, 0.05, 3, 0.005
START_NEIGHBOURS, START_RESTARTS = 10, 20


def spagcn(
    counts: csr_matrix,
    genes: list[str],
    coordinates: np.ndarray,
    n_domains: int,
    seed: int,
    *,
    sections: np.ndarray | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Find domains by SpaGCN: one graph convolution whose cells are drawn towards K centroids.

    Args:
        counts: raw counts, [N, G].
        genes: G names; those that start with ERCC or MT- are left out, and those seen in fewer than 3 cells.
        coordinates: [N, dimensions].
        n_domains: K in 1..N.
        seed: of the weights and the start.
        sections: section of each cell [N]; cells of different sections have no weight between them.
        progress: called with epoch, epochs and loss; what it raises stops the optimisation.

    Returns:
        Refined labels, int64 [N], 0 the largest domain. Fewer than K may be left.

    Raises:
        DataError: more domains than cells, or no gene is left.
    """
    num_cells = counts.shape[0]
    if not 1 <= n_domains <= num_cells:
        raise DataError(f"n_domains = {n_domains}: there are {num_cells} cells; give 1 to {num_cells}")
    components = pca_embedding(normalised(counts, genes), NUM_COMPONENTS, seed)
    if n_domains == 1 or not components.any():
        return np.zeros(num_cells, dtype=np.int64)
    coordinates = as_coordinates(coordinates)
    weights = spatial_weights(coordinates, CONTRIBUTION, sections)
    smoothed = torch.from_numpy(weights @ components.astype(np.float64)).float()
    labels = draw_to_centroids(smoothed, n_domains, seed, progress)
    for cells in by_section(num_cells, sections):
        labels[cells] = spagcn_rule(labels[cells], coordinates[cells], 6)
    return relabel(labels)[0]


def normalised(counts: csr_matrix, genes: list[str]) -> csr_matrix:
    """Return log(1 + counts scaled to the median total of the cells), float64, of the genes that SpaGCN reads.

    Raises:
        DataError: no gene is left.
    """
    from scipy.sparse import csr_matrix, diags

    counts = csr_matrix(counts, dtype=np.float64)
    named = np.array([not name.startswith(DROPPED) for name in genes])
    seen = np.asarray((counts > 0).sum(axis=0)).ravel()
    keep = named & (seen >= min(MIN_CELLS, counts.shape[0]))
    if not keep.any():
        raise DataError(
            f"spagcn: none of {len(genes)} genes is left: they are seen in fewer than {MIN_CELLS} cells, or their "
            f"names start with {' or '.join(DROPPED)}. Check that the counts have cells in rows"
        )
    counts = counts[:, keep]
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(np.median(totals[totals > 0]), totals, out=np.zeros_like(totals), where=totals > 0)
    return csr_matrix(diags(scale) @ counts).log1p()


def spatial_weights(coordinates: np.ndarray, contribution: float, sections: np.ndarray | None = None) -> csr_matrix:
    """Return w = exp(-d^2 / 2 l^2), with l such that the others weigh `contribution` in the mean (6.3, step 3).

    Weights below 1e-4 are left out, so the matrix is sparse: about 20 entries a cell.

    Args:
        coordinates: [N, dimensions].
        contribution: p, the mean over cells of the sum of the weights of all other cells; met within 0.01, unless
            the cells are too few, or too many at the same place.
        sections: section of each cell [N]; weights between sections are 0.

    Returns:
        float64 [N, N], 1 on the diagonal.
    """
    from scipy.sparse import csr_matrix, identity

    num_cells = len(coordinates)
    if sections is not None:  # an axis on which sections are farther apart than any distance that matters
        codes = np.unique(np.asarray(sections), return_inverse=True)[1]
        coordinates = np.column_stack([coordinates, codes * 1e4 * _extent(coordinates)])
    length, rows, columns, squares = _length_scale(coordinates, contribution)
    values = np.exp(-squares / (2 * length**2))
    return csr_matrix((values, (rows, columns)), shape=(num_cells, num_cells)) + identity(num_cells, format="csr")


def _extent(coordinates: np.ndarray) -> float:
    return float(np.ptp(coordinates, axis=0).max()) or 1.0


def _length_scale(coordinates: np.ndarray, contribution: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Return l with the pairs that weigh at least 1e-4: receivers, senders, squared distances.

    From below, l doubles until it is too large, so that pairs are never many; then it is bisected.
    """
    from scipy.spatial import cKDTree

    tree = cKDTree(coordinates)
    reach = np.sqrt(-2 * np.log(LEAST_WEIGHT))  # in units of l
    nearest = tree.query(coordinates, k=[2])[0]
    positive = nearest[(nearest > 0) & np.isfinite(nearest)]
    largest = 100 * _extent(coordinates)
    low, high = 0.0, float(np.median(positive)) / 16 if len(positive) else largest
    bracketed = False
    while True:
        length = (low + high) / 2 if bracketed else high
        pairs = tree.query_pairs(reach * length, output_type="ndarray")
        squares = ((coordinates[pairs[:, 0]] - coordinates[pairs[:, 1]]) ** 2).sum(axis=1)
        reached = 2 * np.exp(-squares / (2 * length**2)).sum() / len(coordinates)
        if abs(reached - contribution) <= CONTRIBUTION_TOLERANCE or length >= largest or high - low < 1e-9 * high:
            both = np.concatenate([pairs, pairs[:, ::-1]])
            return length, both[:, 0], both[:, 1], np.concatenate([squares, squares])
        if reached > contribution:
            high, bracketed = length, True
        elif bracketed:
            low = length
        else:
            low, high = length, 2 * length


def draw_to_centroids(smoothed: Tensor, n_domains: int, seed: int, progress: Progress | None = None) -> np.ndarray:
    """Train the convolution and the centroids, and return each cell's nearest centroid (6.3, steps 4 to 8).

    The target distribution is taken from the assignment every third epoch, and the end depends on how many labels
    still change, so the few lines below stand in place of a trainer.

    Args:
        smoothed: w E, float32 [N, d].
        n_domains: K.
        seed: of the weights and the start.
        progress: called with epoch, epochs and loss.

    Returns:
        int64 [N], in 0..K-1.
    """
    generator = torch.Generator().manual_seed(seed)
    width = smoothed.shape[1]
    weight, bias = (
        ((2 * torch.rand(shape, generator=generator) - 1) / width**0.5).requires_grad_()
        for shape in ((width, width), (width,))
    )
    with torch.no_grad():
        start = smoothed @ weight + bias
    groups = torch.from_numpy(_start(start.numpy(), n_domains, seed))
    centroids = torch.stack([start[groups == group].mean(dim=0) for group in groups.unique()]).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias, centroids], lr=LEARNING_RATE)
    labels, target = groups, torch.empty(0)
    for epoch in range(EPOCHS):
        assignment = student_t(smoothed @ weight + bias, centroids)
        if epoch % REFRESH == 0:
            target = sharpened(assignment.detach())
        previous, labels = labels, assignment.detach().argmax(dim=1)
        if epoch > 0 and epoch % REFRESH == 0 and (labels != previous).float().mean() < CHANGED:
            break
        loss = (target * (target / (assignment + 1e-6)).log()).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(epoch + 1, EPOCHS, loss.item())
    return labels.numpy()


def student_t(latent: Tensor, centroids: Tensor) -> Tensor:
    """Return q [N, K], q_ik proportional to (1 + |z_i - mu_k|^2 / nu)^-(nu + 1), rows sum to 1 (6.3, step 6)."""
    squares = (latent[:, None] - centroids).square().sum(dim=2)
    return torch.softmax(-(FREEDOM + 1) * torch.log1p(squares / FREEDOM), dim=1)


def sharpened(assignment: Tensor) -> Tensor:
    """Return the target p [N, K], p_ik proportional to q_ik^2 / sum_i q_ik, rows sum to 1 (6.3, step 6)."""
    target = assignment.square() / assignment.sum(dim=0)
    return target / target.sum(dim=1, keepdim=True)


def _start(latent: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Return Louvain communities, int64 [N]; k-means groups where no resolution gives K of them."""
    if len(latent) > 2 and number < len(latent):
        groups, _ = communities_of_number(neighbour_matrix(latent, START_NEIGHBOURS, seed), "louvain", number, seed)
        if groups.max() + 1 == number:
            return groups.astype(np.int64)
    return k_means(latent, number, seed, restarts=START_RESTARTS).astype(np.int64)
