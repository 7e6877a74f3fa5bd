"""Layered tissue with known domains, whose counts look like measured ones."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

_BLOCK_VALUES = 4_000_000  # cells x genes that are drawn at once
_NUM_TYPES = 6
_DOMAIN_FOLD = 1.0  # log of the factor on a domain's marker genes
_TYPE_FOLD = 1.3  # log of the factor on a cell type's marker genes: louder than the domain, as in real tissue


def synthetic_section(
    num_cells: int, num_genes: int = 3000, num_domains: int = 7, seed: int = 0, *, density: float = 0.09
) -> anndata.AnnData:
    """Make a section of wavy layers; cells lie on a jittered square lattice of pitch 1.

    A cell's counts are geometric, that is negative binomial with dispersion 1; their mean is depth x gene x markers
    of the domain x markers of the cell type. The cell types are the same mixture in all layers and louder than the
    layers, so that expression alone mostly finds types, and neighbours have to be averaged to find layers.

    Args:
        num_cells: N.
        num_genes: G.
        num_domains: layers, of widths that differ by up to a factor of 2.
        seed: of everything that is random.
        density: share of the counts that are not 0, about.

    Returns:
        `X` float32 CSR [N, G] of whole numbers, `obs["domain"]`, `obs["cell_type"]`, `obsm["spatial"]` float64 [N, 2].

    Raises:
        ValueError: a number below 1, or more domains than cells.
    """
    if min(num_cells, num_genes, num_domains) < 1 or num_domains > num_cells:
        raise ValueError(
            f"{num_cells} cells, {num_genes} genes, {num_domains} domains: need 1 or more, domains <= cells"
        )
    generator = np.random.default_rng(seed)
    positions = _positions(num_cells, generator)
    domain = _layers(positions, num_domains, generator)
    cell_type = generator.integers(_NUM_TYPES, size=num_cells)
    profiles = _profiles(num_genes, num_domains, density, generator)
    depth = generator.lognormal(0.0, 0.3, size=num_cells).astype(np.float32)
    counts = _counts(profiles, domain * _NUM_TYPES + cell_type, depth, generator)
    obs = pd.DataFrame(
        {
            "domain": pd.Categorical.from_codes(domain, [f"layer{index + 1}" for index in range(num_domains)]),
            "cell_type": pd.Categorical.from_codes(cell_type, [f"type{index + 1}" for index in range(_NUM_TYPES)]),
        },
        index=[f"cell{index}" for index in range(num_cells)],
    )
    section = anndata.AnnData(
        X=counts, obs=obs, var=pd.DataFrame(index=[f"gene{index}" for index in range(num_genes)])
    )
    section.obsm["spatial"] = positions
    return section


def _positions(num_cells: int, generator: np.random.Generator) -> np.ndarray:
    """Return float64 [N, 2]: a square lattice with a few holes, every cell moved by up to 0.3."""
    side = int(np.ceil(np.sqrt(num_cells)))
    places = np.sort(generator.permutation(side * side)[:num_cells])
    lattice = np.stack([places % side, places // side], axis=1).astype(np.float64)
    return lattice + generator.uniform(-0.3, 0.3, size=lattice.shape)


def _layers(positions: np.ndarray, num_domains: int, generator: np.random.Generator) -> np.ndarray:
    """Return the layer of each cell, int64 [N]: by its rank along y after a wave along x; none is empty."""
    side = np.ptp(positions, axis=0).max() + 1.0
    height = positions[:, 1] + 0.08 * side * np.sin(2 * np.pi * positions[:, 0] / side)
    widths = generator.uniform(1.0, 2.0, size=num_domains)
    spare = len(positions) - num_domains  # each layer has one cell, the others follow the widths
    ends = np.arange(1, num_domains) + np.floor(np.cumsum(widths / widths.sum())[:-1] * spare)
    ranks = np.empty(len(positions), dtype=np.int64)
    ranks[np.argsort(height, kind="stable")] = np.arange(len(positions))
    return np.searchsorted(ends, ranks, side="right")


def _profiles(num_genes: int, num_domains: int, density: float, generator: np.random.Generator) -> np.ndarray:
    """Return mean counts at depth 1 by (domain, type) and gene: float32 [K * types, G]."""
    base = generator.lognormal(0.0, 1.0, size=num_genes)
    domains = _markers(num_domains, num_genes, _DOMAIN_FOLD, generator)
    types = _markers(_NUM_TYPES, num_genes, _TYPE_FOLD, generator)
    means = base * np.exp(domains[:, None] + types[None]).reshape(-1, num_genes)
    low, high = -20.0, 20.0  # logarithm of the scale at which a share `density` is not 0
    for _ in range(60):
        middle = (low + high) / 2
        scaled = means * np.exp(middle)
        low, high = (middle, high) if np.mean(scaled / (1 + scaled)) < density else (low, middle)
    return (means * np.exp(low)).astype(np.float32)


def _markers(groups: int, num_genes: int, fold: float, generator: np.random.Generator) -> np.ndarray:
    """Return log factors [groups, G]: a tenth of the genes, at least one, is raised in each group."""
    effect = np.zeros((groups, num_genes))
    for group in range(groups):
        effect[group, generator.permutation(num_genes)[: max(1, num_genes // 10)]] = fold
    return effect


def _counts(
    profiles: np.ndarray, group: np.ndarray, depth: np.ndarray, generator: np.random.Generator
) -> sp.csr_matrix:
    """Draw counts, float32 CSR [N, G], in blocks of cells.

    A geometric count with mean m is 0 with probability 1 / (1 + m); given that it is not, it is geometric on 1, 2, ...
    with success probability 1 / (1 + m). So only the counts that are not 0 are drawn and stored.
    """
    num_cells, num_genes = len(group), profiles.shape[1]
    rows = max(1, _BLOCK_VALUES // num_genes)
    data, indices, lengths = [], [], []
    for start in range(0, num_cells, rows):
        mean = profiles[group[start : start + rows]] * depth[start : start + rows, None]
        there = generator.random(mean.shape, dtype=np.float32) * (1 + mean) < mean
        row, column = np.nonzero(there)
        lengths.append(np.bincount(row, minlength=len(mean)))
        indices.append(column.astype(np.int32))
        data.append(_positive_geometric(mean[there], generator))
    pointers = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    values, columns = np.concatenate(data), np.concatenate(indices)
    return sp.csr_matrix((values, columns, pointers), shape=(num_cells, num_genes))


def _positive_geometric(mean: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw from the geometric distribution on 1, 2, ... with mean 1 + mean by inversion: float32, same shape."""
    failure = np.log(mean / (1 + mean))
    uniform = 1 - generator.random(mean.shape, dtype=np.float32)  # in (0, 1]
    return 1 + np.floor(np.log(uniform) / failure)
