"""What a trained network says of its cells besides the embedding, on request (3.11, 10.4).

Legend: N cells that were kept, G genes that the network reads, N_all cells of the section.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tenfold.methods.gates.analysis import over_all_cells
from tenfold.methods.gates.fit import Graphs, fused, tensors_of
from tenfold.methods.gates.tiles import whole

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix
    from tenfold.methods.gates.network import AutoEncoder
    from tenfold.methods.gates.preparing import Prepared

BLOCK_ROWS = 2048  # rows of a reconstruction that exist at once


@torch.no_grad()
def attention_matrices(
    network: AutoEncoder, expression: csr_matrix, graphs: Graphs
) -> tuple[csr_matrix, csr_matrix | None]:
    """Return the first layer's attention on each graph as CSR [N, N]; rows are receivers and sum to 1."""
    from scipy.sparse import csr_matrix as csr

    looped = [graph.with_self_loops() for graph in fused(graphs, network.shape.alpha)]
    tile = tensors_of(expression, whole(looped, network.shape.hops))
    values = network.attention_values(tile.expression, tile.cells)
    size = (expression.shape[0],) * 2
    made = [
        csr((value.numpy(), graph.senders, graph.offsets), shape=size)
        for value, graph in zip(values, looped, strict=True)
    ]
    return made[0], made[1] if len(made) > 1 else None


@torch.no_grad()
def reconstruct(network: AutoEncoder, expression: csr_matrix, graphs: Graphs) -> np.ndarray:
    """Return the denoised expression max(X_hat, 0), float32 [N, G] (3.11); only this result is N x G."""
    looped = [graph.with_self_loops() for graph in fused(graphs, network.shape.alpha)]
    tile = tensors_of(expression, whole(looped, network.shape.hops))
    _, decoded, _ = network(tile.expression, tile.cells)
    result = np.empty(expression.shape, dtype=np.float32)
    for start in range(0, len(decoded), BLOCK_ROWS):
        block = decoded[start : start + BLOCK_ROWS] @ network.weights[0].T
        result[start : start + BLOCK_ROWS] = block.clamp_(min=0).numpy()
    return result


def write_denoised(adata: AnnData, prepared: Prepared, network: AutoEncoder, *, key: str = "gates") -> None:
    """Put the denoised expression into `obsm["gates_denoised"]`, float32 [N_all, G]; NaN for cells that were dropped.

    Its columns are `uns["gates"]["genes"]`. It is no layer: a layer has all genes of the section, the network may read
    fewer.
    """
    denoised = np.full((adata.n_obs, len(prepared.genes)), np.nan, dtype=np.float32)
    denoised[prepared.kept] = reconstruct(network, prepared.expression, prepared.graphs)
    adata.obsm[f"{key}_denoised"] = denoised


def write_attention(adata: AnnData, prepared: Prepared, network: AutoEncoder, *, key: str = "gates") -> None:
    """Put the first layer's attention into `obsp`, CSR float32 [N_all, N_all]; empty rows for dropped cells.

    Rows are receivers and sum to 1, the cell itself included. The matrices are named after their graphs:
    `gates_spatial_attention`, `gates_expression_attention` and, in the modes that prune, `gates_pruned_attention`.
    """
    found = attention_matrices(network, prepared.expression, prepared.graphs)
    for name, matrix in zip(graph_names(prepared), found, strict=True):
        if matrix is not None:
            adata.obsp[f"{key}_{name}_attention"] = over_all_cells(matrix, prepared.kept)


def graph_names(prepared: Prepared) -> tuple[str, str]:
    """Return what the two graphs are that the network fuses (3.5); without a second one its name means nothing."""
    pruned, similar = ("pruned" in prepared.statistics), ("expression" in prepared.statistics)
    return "pruned" if pruned and similar else "spatial", "expression" if similar else "pruned"
