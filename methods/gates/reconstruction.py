"""The squared error of the reconstruction without an [N, G] tensor (10.1).

The decoder's last layer is linear and tied, X_hat = D W_0^T, and M = X W_0, so that
|X - X_hat|^2 = |X|^2 - 2 <M, D> + <D^T D, W_0^T W_0>.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tenfold.methods.gates.attention import weighted_sums
from torch import Tensor

BLOCK_ROWS = 8192
TRANSPOSED_ROWS = 512  # rows of g that stay in a core's cache while X^T g is summed
# where a dense X is quicker (2 cores, H = 512): many nonzeros, or a small panel of genes
DENSE_SHARE = 0.4
DENSE_GENES = 200

Arrays = tuple[Tensor, Tensor, Tensor]  # offsets and columns, int32, and values


@dataclass(frozen=True)
class SparseRows:
    """Expression of some cells as tensors, with its transpose for backward.

    Attributes:
        shape: n, G.
        dense: [n, G] where that is quicker; None otherwise.
        rows: CSR arrays; None where X is dense.
        transposed: CSR arrays of the transpose of every `TRANSPOSED_ROWS` rows; empty where X is dense.
    """

    shape: tuple[int, int]
    dense: Tensor | None
    rows: Arrays | None
    transposed: tuple[Arrays, ...]

    @classmethod
    def build(cls, expression: Any, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> SparseRows:
        """Make tensors of a scipy CSR matrix [n, G]."""
        size = expression.shape
        if expression.nnz > DENSE_SHARE * size[0] * size[1] or size[1] <= DENSE_GENES:
            return cls(size, torch.from_numpy(expression.toarray()).to(device, dtype), None, ())
        blocks = [expression[start : start + TRANSPOSED_ROWS].tocsc() for start in range(0, size[0], TRANSPOSED_ROWS)]
        transposed = tuple(_arrays(block, device, dtype) for block in blocks)
        return cls(size, None, _arrays(expression, device, dtype), transposed)

    def times(self, weight_GH: Tensor) -> Tensor:
        """Return X W [n, H]; the gradient of W is X^T g."""
        if self.dense is not None:
            return self.dense @ weight_GH
        return _SparseProduct.apply(weight_GH, self)


def _arrays(matrix: Any, device: Any, dtype: torch.dtype) -> Arrays:
    """Return the arrays of a compressed scipy matrix as tensors, on a CPU uncopied where they have the right type."""
    offsets, columns = (np.asarray(part, dtype=np.int32) for part in (matrix.indptr, matrix.indices))
    return (
        torch.from_numpy(offsets).to(device),
        torch.from_numpy(columns).to(device),
        torch.from_numpy(matrix.data).to(device, dtype),
    )


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, expression: SparseRows) -> Tensor:
        ctx.transposed, ctx.num_genes = expression.transposed, len(weight)
        assert expression.rows is not None
        return weighted_sums(*expression.rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        gradient = gradient.contiguous()
        total = gradient.new_zeros(ctx.num_genes, gradient.shape[1])
        for block, arrays in enumerate(ctx.transposed):
            start = block * TRANSPOSED_ROWS
            total += weighted_sums(*arrays, gradient[start : start + TRANSPOSED_ROWS])
        return total, None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, decoded: Tensor, weight: Tensor, squared_norm: float) -> Tensor:
        # sums in float64: the three terms nearly cancel
        width = decoded.shape[1]
        inner = torch.zeros((), dtype=torch.float64, device=decoded.device)
        gram = torch.zeros(width, width, dtype=torch.float64, device=decoded.device)
        for start in range(0, len(decoded), BLOCK_ROWS):
            block = decoded[start : start + BLOCK_ROWS]
            inner += (first[start : start + BLOCK_ROWS] * block).sum(dtype=torch.float64)
            gram += (block.T @ block).double()
        weights = weight.T @ weight
        ctx.save_for_backward(first, decoded, weight, gram.to(decoded.dtype), weights)
        return squared_norm - 2 * inner + (gram * weights.double()).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        first, decoded, weight, gram, weights = ctx.saved_tensors
        factor = 2 * gradient.to(decoded.dtype)
        of_decoded = torch.addmm(first, decoded, weights, beta=-1).mul_(factor)
        return -factor * decoded, of_decoded, factor * (weight @ gram), None


def squared_error(
    first_nH: Tensor, decoded_nH: Tensor, weight_GH: Tensor, squared_norm: float, core_nG: Tensor | None = None
) -> Tensor:
    """Return |X - D W_0^T|^2 over some cells, float64 scalar; differentiable in D, W_0 and M.

    With a dense X of fewer than 2/3 H genes the plain formula is cheaper (6 n G H operations against 4 n H^2).

    Args:
        first_nH: M = X W_0 of these cells; only read by the identity.
        decoded_nH: D.
        weight_GH: W_0.
        squared_norm: |X|^2.
        core_nG: X itself, where it is at hand.
    """
    num_genes, width = weight_GH.shape
    if core_nG is not None and 3 * num_genes < 2 * width:
        return (core_nG - decoded_nH @ weight_GH.T).square().sum(dtype=torch.float64)
    return _SquaredError.apply(first_nH, decoded_nH, weight_GH, squared_norm)
