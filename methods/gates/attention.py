"""Attention over a graph's edges, and products with the sparse attention matrix (3.6, 10.1).

Legend: R receivers, C senders (the receivers come first among them), E edges by receiver, H features. Indices are
int32: that is what the sparse kernels of CPUs take.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# said by torch at the first sparse matrix of every process
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@dataclass(frozen=True)
class Edges:
    """A sparse [R, C] pattern as tensors, with its transpose for backward.

    Attributes:
        offsets: [R + 1].
        senders: [E].
        receivers: [E], ascending.
        num_senders: C.
        transposed_offsets: [C + 1].
        transposed_receivers: [E], receivers of the edges in the order of the senders.
        transposed_order: int64 [E], that order.
    """

    offsets: Tensor
    senders: Tensor
    receivers: Tensor
    num_senders: int
    transposed_offsets: Tensor
    transposed_receivers: Tensor
    transposed_order: Tensor

    @classmethod
    def build(cls, offsets: np.ndarray, senders: np.ndarray, num_senders: int, device: Any = "cpu") -> Edges:
        """Make tensors of CSR arrays; an edge may occur twice."""
        receivers = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        order = np.argsort(senders, kind="stable")
        counts = np.bincount(senders, minlength=num_senders)
        transposed = np.concatenate([[0], np.cumsum(counts)])
        return cls(
            _index(offsets, device),
            _index(senders, device),
            _index(receivers, device),
            num_senders,
            _index(transposed, device),
            _index(receivers[order], device),
            torch.from_numpy(order.astype(np.int64)).to(device),
        )


def _index(values: np.ndarray, device: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)


def weighted_sums(offsets: Tensor, columns: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """Return A B [R, H] for a CSR matrix A and dense B [C, H]; no gradient.

    `embedding_bag` is this product. On CPUs it took a half of the time of torch's CSR product (MKL), and its rows are
    summed in their order: the same numbers every time.

    Args:
        offsets: [R + 1].
        columns: [E].
        values: [E].
        dense: [C, H].
    """
    return functional.embedding_bag(
        columns, dense.detach(), offsets, mode="sum", per_sample_weights=values.detach(), include_last_offset=True
    )


def attention_weights(
    receiver_scores_R: Tensor, sender_scores_C: Tensor, receivers_E: Tensor, senders_E: Tensor
) -> Tensor:
    """Return A [E]: softmax over each receiver's senders of sigmoid(a M_i + b M_j).

    Rows sum to 1. The scores lie in (0, 1), so that exp needs no shift and no weight is more than e times another of
    its row. (The official code puts the softmax's values back on edges of another order, which transposes the matrix.)

    Args:
        receiver_scores_R: a M_i.
        sender_scores_C: b M_j.
        receivers_E: ascending; every receiver has an edge (its self loop).
        senders_E: of each edge.
    """
    receivers, senders = receivers_E.long(), senders_E.long()
    weights = torch.sigmoid(receiver_scores_R[receivers] + sender_scores_C[senders]).exp()
    sums = weights.new_zeros(len(receiver_scores_R)).index_add(0, receivers, weights)
    return weights / sums[receivers]


def _edge_dots(receivers_RH: Tensor, senders_CH: Tensor, edges: Edges) -> Tensor:
    """Return r_i . s_j [E] on the edges alone."""
    size = (len(receivers_RH), len(senders_CH))
    if len(edges.senders) > size[0] * size[1]:
        # edges that occur twice can outnumber the pairs of a few cells, which torch does not expect
        return (receivers_RH[edges.receivers] * senders_CH[edges.senders]).sum(dim=1)
    zeros = receivers_RH.new_zeros(len(edges.senders))
    pattern = torch.sparse_csr_tensor(edges.offsets, edges.senders, zeros, size=size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, receivers_RH, senders_CH.T, beta=0.0).values()


class _EdgeProduct(torch.autograd.Function):
    """values on edges x dense [C, H] -> [R, H]; the gradient of the values never has E x H numbers."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, edges: Edges) -> Tensor:
        ctx.edges = edges
        ctx.save_for_backward(values, dense)
        return weighted_sums(edges.offsets, edges.senders, values, dense)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        values, dense = ctx.saved_tensors
        edges, gradient = ctx.edges, gradient.contiguous()
        of_values = of_dense = None
        if ctx.needs_input_grad[0]:
            of_values = _edge_dots(gradient, dense, edges)
        if ctx.needs_input_grad[1]:
            values = values[edges.transposed_order]
            of_dense = weighted_sums(edges.transposed_offsets, edges.transposed_receivers, values, gradient)
        return of_values, of_dense, None


def edge_product(values_E: Tensor, dense_CH: Tensor, edges: Edges) -> Tensor:
    """Return P V, [R, H], for the matrix with `values_E` on the edges; differentiable in both."""
    return _EdgeProduct.apply(values_E, dense_CH, edges)
