"""The squared error without a cells x genes tensor, against the plain one in float64."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_matrix
from tenfold.methods.gates import reconstruction
from tenfold.methods.gates.reconstruction import SparseRows, squared_error


def expression(cells, genes, share=0.1, seed=0):
    made = random_matrix(cells, genes, share, format="csr", dtype=np.float32, random_state=seed)
    made.data = 1 + 3 * made.data
    return made


def state(cells, genes, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    decoded = torch.randn(cells, width, generator=generator, dtype=dtype)
    weight = 0.1 * torch.randn(genes, width, generator=generator, dtype=dtype)
    return decoded, weight


def error_and_gradients(function, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    value.backward()
    return value.item(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("genes", "width"), [(300, 20), (300, 600), (50, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity_gives_value_and_gradients_of_the_plain_error(genes, width, dtype, monkeypatch):
    monkeypatch.setattr(reconstruction, "BLOCK_ROWS", 16)
    X = expression(70, genes)
    rows, plain = SparseRows.build(X, dtype=dtype), torch.from_numpy(X.toarray()).double()
    decoded, weight = state(70, genes, width)
    expected = error_and_gradients(lambda d, w: (plain - d @ w.T).square().sum(), decoded, weight)
    norm = float((X.data.astype(np.float64) ** 2).sum())

    def identity(d, w):
        return squared_error(rows.times(w), d, w, norm)

    found = error_and_gradients(identity, decoded.to(dtype), weight.to(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_error_is_precise_where_the_three_terms_nearly_cancel():
    generator = torch.Generator().manual_seed(0)
    decoded, weight = torch.rand(200, 6, generator=generator), torch.rand(300, 6, generator=generator)
    X = csr_matrix((decoded @ weight.T).numpy() * (1 + 1e-3 * np.random.default_rng(0).normal(size=(200, 300))))
    plain = torch.from_numpy(X.toarray()).double()
    expected = (plain - decoded.double() @ weight.double().T).square().sum().item()
    first = (plain @ weight.double()).float()
    found = squared_error(first, decoded, weight, float((plain**2).sum())).item()
    assert expected < 2e-6 * (plain**2).sum()
    assert found == pytest.approx(expected, rel=0.1)  # rounding of 1e-7 in terms a million times larger


def test_small_dense_panel_takes_the_plain_formula_with_the_same_result():
    X = expression(40, 12, share=0.6)
    rows = SparseRows.build(X, dtype=torch.float64)
    decoded, weight = state(40, 12, 20)
    norm = float((X.data.astype(np.float64) ** 2).sum())
    by_core = error_and_gradients(
        lambda d, w: squared_error(rows.times(w), d, w, norm, core_nG=rows.dense), decoded, weight
    )
    by_identity = error_and_gradients(lambda d, w: squared_error(rows.times(w), d, w, norm), decoded, weight)
    assert by_core[0] == pytest.approx(by_identity[0], rel=1e-12)
    torch.testing.assert_close(by_core[1], by_identity[1])
    # the plain formula reads neither the norm nor M
    assert squared_error(torch.zeros(40, 20), decoded, weight, 0.0, rows.dense).item() == pytest.approx(by_core[0])


def test_large_dense_panel_takes_the_identity():
    decoded, weight = state(5, 300, 4)
    zeros = torch.zeros(5, 300, dtype=torch.float64)
    with_wrong_norm = squared_error(torch.zeros(5, 4, dtype=torch.float64), decoded, weight, 7.0, zeros)
    assert with_wrong_norm.item() == pytest.approx(7.0 + (decoded @ weight.T).square().sum().item())


@pytest.mark.parametrize(("cells", "genes", "share", "is_dense"), [
    (30, 300, 0.1, False),
    (30, 300, 0.6, True),
    (30, 100, 0.1, True),
    (1100, 300, 0.05, False),  # three blocks of the transpose
])  # fmt: skip
def test_product_with_the_weights_and_its_gradient_are_the_dense_ones(cells, genes, share, is_dense):
    X = expression(cells, genes, share)
    rows = SparseRows.build(X, dtype=torch.float64)
    assert (rows.dense is not None) == is_dense
    _, weight = state(1, genes, 3)
    out = torch.randn(cells, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain = torch.from_numpy(X.toarray()).double()
    weight.requires_grad_()
    found = rows.times(weight)
    (found * out).sum().backward()
    torch.testing.assert_close(found, plain @ weight)
    torch.testing.assert_close(weight.grad, plain.T @ out)


def test_sparse_expression_is_not_copied_and_never_made_dense(monkeypatch):
    X = expression(600, 300, 0.05)
    monkeypatch.setattr(csr_matrix, "toarray", lambda *_: pytest.fail("made dense"))
    rows = SparseRows.build(X)
    assert rows.rows[2].data_ptr() == X.data.ctypes.data


def test_cells_without_any_counts_are_rows_of_zeros():
    X = csr_matrix((3, 300), dtype=np.float32)
    weight = torch.ones(300, 2, requires_grad=True)
    found = SparseRows.build(X).times(weight)
    found.sum().backward()
    assert found.tolist() == [[0, 0]] * 3
    assert not weight.grad.any()
