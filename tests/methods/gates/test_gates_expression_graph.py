"""Neighbours in expression: all pairs in float64 by loops, ties, copies and empty cells."""

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, vstack
from tenfold.methods.gates.config import ExpressionGraph, Preprocessing
from tenfold.methods.gates.expression_graph import approximate_neighbours, exact_neighbours, expression_graph
from tenfold.methods.gates.nearest_expression import most_similar, reorder

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "spatial"
SIMILARITIES = ["cosine", "euclidean", "pearson"]
X = csr_matrix(np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32))


def expression(number=60, genes=25, seed=0, density=0.4):
    draw = np.random.default_rng(seed)
    values = draw.gamma(2.0, size=(number, genes)) * (draw.random((number, genes)) < density)
    values[:, 0] += 0.1
    return csr_matrix(values.astype(np.float32))


def similarity_of(a, b, similarity):
    if similarity == "euclidean":
        return -np.sqrt(((a - b) ** 2).sum())
    if similarity == "pearson":
        a, b = a - a.mean(), b - b.mean()
    return a @ b / np.sqrt((a @ a) * (b @ b))


def neighbours_slowly(values, k, similarity):
    """The k most similar other cells of each; of equal ones the smaller number."""
    dense = values.toarray().astype(np.float64)
    found = []
    for i, own in enumerate(dense):
        scores = [(-round(similarity_of(own, other, similarity), 12), j) for j, other in enumerate(dense) if j != i]
        found.append([j for _, j in sorted(scores)[:k]])
    return np.array(found)


def pairs(graph):
    return set(zip(graph.receivers.tolist(), graph.senders.tolist(), strict=True))


def test_the_worked_example_takes_the_smaller_number_of_two_equally_similar_cells():
    graph, how = expression_graph(X, ExpressionGraph(k=1))
    assert pairs(graph) == {(0, 2), (1, 2), (2, 0)}
    assert how == "cosine, exact"


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("block_rows", [7, 20, 2048])
def test_exact_neighbours_are_those_of_all_pairs_whatever_the_block(similarity, block_rows):
    values = expression()
    expected = neighbours_slowly(values, 5, similarity)
    np.testing.assert_array_equal(exact_neighbours(values, 5, similarity), expected)
    found = reorder(values, most_similar(values, 5, similarity, block_rows), 5, similarity)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_cell_with_copies_lists_them_and_never_itself(similarity):
    # the official code takes the first of the sorted list for the cell itself
    base = expression(30)
    values = vstack([base, base[[3]], base, base[[3]]]).tocsr()
    found = exact_neighbours(values, 4, similarity)
    np.testing.assert_array_equal(found, neighbours_slowly(values, 4, similarity))
    assert not (found == np.arange(62)[:, None]).any()
    assert found[3][:3].tolist() == [30, 34, 61]
    graph, _ = expression_graph(values, ExpressionGraph(k=4, similarity=similarity))
    assert set(np.diff(graph.offsets)) == {4}


@pytest.mark.parametrize("block_rows", [16, 100, 2048])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_of_many_copies_those_with_the_smallest_numbers_are_taken(similarity, block_rows):
    # equal rows do not have equal products in float32: the place of a row in a block decides the last digits
    values = vstack([expression(1, 300)] * 150).tocsr()
    found = reorder(values, most_similar(values, 3, similarity, block_rows), 3, similarity)
    np.testing.assert_array_equal(found, [[j for j in range(150) if j != i][:3] for i in range(150)])


def test_every_cell_has_k_neighbours_where_there_are_more_cells():
    graph, _ = expression_graph(expression(), ExpressionGraph(k=7))
    assert graph.num_edges == 7 * 60
    assert all(i != j for i, j in pairs(graph))


@pytest.mark.parametrize("similarity", ["cosine", "pearson"])
def test_cells_without_expression_list_nobody_and_are_not_listed(similarity):
    values = expression().tolil()
    values[[0, 13, 59]] = 0
    graph, _ = expression_graph(values.tocsr(), ExpressionGraph(k=5, similarity=similarity))
    rest = np.setdiff1d(np.arange(60), [0, 13, 59])
    alone, _ = expression_graph(expression()[rest], ExpressionGraph(k=5, similarity=similarity))
    assert pairs(graph) == {(rest[i], rest[j]) for i, j in pairs(alone)}


def test_cells_without_expression_are_near_each_other_by_distance():
    values = expression().tolil()
    values[[0, 13]] = 0
    graph, _ = expression_graph(values.tocsr(), ExpressionGraph(k=1, similarity="euclidean"))
    assert {(0, 13), (13, 0)} <= pairs(graph)


def test_a_cell_in_which_all_genes_are_alike_has_no_correlation():
    values = np.array([[1, 1, 1], [1, 2, 3], [2, 1, 0], [1, 2, 4]], dtype=np.float32)
    graph, _ = expression_graph(csr_matrix(values), ExpressionGraph(k=1, similarity="pearson"))
    assert pairs(graph) == {(1, 3), (3, 1), (2, 3)}


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_a_few_cells_list_all_others(number, caplog):
    with caplog.at_level(logging.WARNING):
        graph, _ = expression_graph(expression(number), ExpressionGraph(k=6))
    assert pairs(graph) == {(i, j) for i in range(number) for j in range(number) if i != j}
    assert (f"only {number} cells" in caplog.text) == (number > 0)


def test_reverse_is_the_official_orientation_with_hubs_and_lonely_cells():
    own, _ = expression_graph(expression(), ExpressionGraph(k=3))
    reverse, _ = expression_graph(expression(), ExpressionGraph(k=3, direction="reverse"))
    both, _ = expression_graph(expression(), ExpressionGraph(k=3, symmetrize=True))
    assert pairs(reverse) == {(j, i) for i, j in pairs(own)}
    assert set(np.diff(own.offsets)) == {3}
    assert len(set(np.diff(reverse.offsets))) > 1
    assert pairs(both) == pairs(own) | pairs(reverse)


def test_sections_are_linked_unless_each_has_neighbours_of_its_own():
    values, sections = expression(), np.arange(60) % 2
    together, _ = expression_graph(values, ExpressionGraph(k=4), sections=sections)
    apart, _ = expression_graph(values, ExpressionGraph(k=4, scope="section"), sections=sections)
    assert any(sections[i] != sections[j] for i, j in pairs(together))
    for section in (0, 1):
        cells = np.flatnonzero(sections == section)
        alone, _ = expression_graph(values[cells], ExpressionGraph(k=4))
        assert {(i, j) for i, j in pairs(apart) if sections[i] == section} == {
            (cells[i], cells[j]) for i, j in pairs(alone)
        }
    assert apart.num_edges == 240


def test_a_permutation_of_cells_permutes_the_graph_and_one_of_genes_changes_nothing():
    values, draw = expression(), np.random.default_rng(5)
    order = draw.permutation(60)
    graph, _ = expression_graph(values, ExpressionGraph())
    permuted, _ = expression_graph(values[order], ExpressionGraph())
    assert {(order[i], order[j]) for i, j in pairs(permuted)} == pairs(graph)
    shuffled, _ = expression_graph(values[:, draw.permutation(25)], ExpressionGraph())
    assert pairs(shuffled) == pairs(graph)


def test_the_expression_is_not_changed():
    values = expression()
    before = values.copy()
    expression_graph(values, ExpressionGraph(similarity="euclidean"))
    assert (values != before).nnz == 0


def test_far_from_the_origin_distances_are_as_exact_as_near_it():
    values = expression(40)
    moved = csr_matrix(values.toarray() + np.float32(1000))
    np.testing.assert_array_equal(exact_neighbours(moved, 3, "euclidean"), neighbours_slowly(moved, 3, "euclidean"))


@pytest.mark.slow  # the index is compiled first
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_the_index_finds_most_of_the_most_similar_cells(similarity):
    values = expression(400, 30, density=0.3)
    options = ExpressionGraph(k=6, similarity=similarity, exact_up_to=399)
    graph, how = expression_graph(values, options, seed=1)
    exact, _ = expression_graph(values, ExpressionGraph(k=6, similarity=similarity))
    assert how == f"{similarity}, pynndescent on 50 components"
    assert all(i != j for i, j in pairs(graph))
    assert len(pairs(graph) & pairs(exact)) > 0.9 * exact.num_edges
    assert pairs(expression_graph(values, options, seed=1)[0]) == pairs(graph)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_memory_grows_with_cells_and_not_with_pairs(similarity):
    values = expression(3000, 40)
    tracemalloc.start()
    most_similar(values, 5, similarity, block_rows=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # all pairs would be 36e6


@pytest.mark.slow
def test_the_index_never_lists_the_cell_itself_where_there_are_copies():
    values = vstack([expression(150)] * 2).tocsr()
    found = approximate_neighbours(values, 3, "cosine", 0)
    assert not (found == np.arange(300)[:, None]).any()
    assert (found[:, 0] == (np.arange(300) + 150) % 300).mean() > 0.95


def test_neighbours_in_a_real_section_are_those_of_all_pairs():
    from anndata import read_h5ad
    from tenfold.methods.gates.preprocessing import preprocess

    path = DATA / "starmap_mpfc_3samples.h5ad"
    if not path.is_file():
        pytest.skip("needs ../shared/data/spatial/starmap_mpfc_3samples.h5ad")
    adata = read_h5ad(path)
    values = preprocess(adata[adata.obs["sample"] == "BZ5"], Preprocessing()).expression
    dense = values.toarray().astype(np.float64)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    similar = (dense @ dense.T).round(12)
    np.fill_diagonal(similar, -1)
    expected = np.argsort(-similar, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(exact_neighbours(values, 7, "cosine"), expected)
