"""The auto-encoder against the worked example (9.2), a dense reference in float64 and its invariants (9.1)."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from tenfold.methods.gates import reconstruction
from tenfold.methods.gates.fit import encode
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.network import AutoEncoder, Neighbourhood, Shape
from tenfold.methods.gates.readout import attention_matrices, reconstruct
from tenfold.methods.gates.reconstruction import SparseRows, squared_error
from tenfold.methods.gates.tiles import cut_tile, whole
from tenfold.platform.errors import ModelError

CELLS, GENES = 60, 7


@pytest.fixture(autouse=True)
def sparse_expression(monkeypatch):
    """Small as it is, the expression is read as that of thousands of genes."""
    monkeypatch.setattr(reconstruction, "DENSE_GENES", 0)
    monkeypatch.setattr(reconstruction, "DENSE_SHARE", 1)
    monkeypatch.setattr(reconstruction, "TRANSPOSED_ROWS", 16)


def graph_of(lists):
    receivers = [i for i, senders in enumerate(lists) for _ in senders]
    return Graph.from_edges(np.array(receivers), np.array([j for senders in lists for j in senders]), len(lists))


def random_graph(cells, degree, seed):
    draw = np.random.default_rng(seed)
    receivers, senders = np.repeat(np.arange(cells), degree), draw.integers(0, cells, cells * degree)
    return Graph.from_edges(receivers, senders, cells).without_self_loops()


@pytest.fixture
def graphs():
    return random_graph(CELLS, 3, 1), random_graph(CELLS, 2, 2)


@pytest.fixture
def expression():
    draw = np.random.default_rng(3)
    return csr_matrix(draw.random((CELLS, GENES)) * (draw.random((CELLS, GENES)) < 0.4), dtype=np.float32)


def network_of(dims=(5, 3), alpha=0.3, seed=0, **more):
    return AutoEncoder(Shape(GENES, tuple(dims), alpha, **more), seed).double()


def tensors(expression, graphs, hops, cores=None):
    looped = [graph.with_self_loops() for graph in graphs if graph is not None]
    tile = whole(looped, hops) if cores is None else cut_tile(looped, cores, hops)
    return SparseRows.build(expression[tile.cells], dtype=torch.float64), Neighbourhood.build(tile)


def reference(network, X, graphs):
    """Section 3.6 with dense matrices."""
    alpha, elu = network.shape.alpha, torch.nn.functional.elu if network.shape.nonlinear else lambda x: x
    shares = [("first", 1 - alpha, graphs[0])] + ([("second", alpha, graphs[1])] if alpha > 0 else [])
    hidden, mixing = X, []
    for layer, weight in enumerate(network.weights[:-1]):
        M = hidden @ weight
        P = torch.zeros(len(X), len(X), dtype=X.dtype)
        for name, share, graph in shares:
            a, b = (network.attention[f"{name}_{side}_{layer}"] for side in ("receiver", "sender"))
            scores = torch.sigmoid((M @ a)[:, None] + (M @ b)[None, :])
            linked = torch.from_numpy(graph.to_matrix().toarray()).bool() | torch.eye(len(X), dtype=torch.bool)
            P = P + share * torch.softmax(scores.masked_fill(~linked, -math.inf), dim=1)
        mixing.append(P)
        hidden = elu(P @ M)
    latent = hidden = hidden @ network.weights[-1]
    for layer in range(len(mixing), 0, -1):
        hidden = elu(mixing[layer - 1] @ (hidden @ network.weights[layer].T))
    return latent, hidden @ network.weights[0].T


def worked(alpha):
    network = AutoEncoder(Shape(2, (2, 1), alpha)).double()
    values = {
        "weights.0": [[0.5, -0.5], [0.25, 1]],
        "weights.1": [[1.0], [-0.5]],
        "attention.first_receiver_0": [0.2, -0.4],
        "attention.first_sender_0": [0.6, 0.3],
        "attention.second_receiver_0": [-0.3, 0.5],
        "attention.second_sender_0": [0.1, 0.7],
    }
    own = network.state_dict()
    network.load_state_dict({name: torch.tensor(v).double() for name, v in values.items() if name in own})
    return network


WORKED_X = csr_matrix(np.array([[1.0, 0], [0, 1], [1, 1]]))
WORKED_GRAPHS = graph_of([[1], [0, 2], [1]]), graph_of([[2], [2], [0]])


@pytest.mark.parametrize(
    ("alpha", "latent", "rebuilt", "norm", "mse"),
    [
        (
            0.0,
            [0.232872, 0.325336, 0.131646],
            [[0.205814, -0.060769], [0.168322, -0.050864], [0.166985, -0.050502]],
            1.887999,
            0.594090,
        ),
        (
            0.4,
            [0.385373, 0.240782, 0.324525],
            [[0.239117, -0.069133], [0.220907, -0.064610], [0.227457, -0.066251]],
            1.870729,
            0.583271,
        ),
    ],
)
def test_forward_pass_is_the_worked_example(alpha, latent, rebuilt, norm, mse):
    network = worked(alpha)
    rows, cells = tensors(WORKED_X, WORKED_GRAPHS if alpha else (WORKED_GRAPHS[0], None), 2)
    found, decoded, first = network(rows, cells)
    assert found.flatten().tolist() == pytest.approx(latent, abs=1e-6)
    assert (decoded @ network.weights[0].T).tolist() == [pytest.approx(row, abs=1e-6) for row in rebuilt]
    assert first.tolist() == [[0.5, -0.5], [0.25, 1.0], [0.75, 0.5]]
    error = squared_error(first, decoded, network.weights[0], 4.0)
    assert math.sqrt(error.item()) == pytest.approx(norm, abs=1e-6)
    assert error.item() / 6 == pytest.approx(mse, abs=1e-6)


def test_attention_matrices_are_those_of_the_worked_example():
    first, second = attention_matrices(worked(0.4).float(), WORKED_X.astype(np.float32), WORKED_GRAPHS)
    expected = [[0.482872, 0.517128, 0], [0.312871, 0.337175, 0.349954], [0, 0.491139, 0.508861]]
    assert first.toarray().tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    expected = [[0.456501, 0, 0.543499], [0, 0.514732, 0.485268], [0.455379, 0, 0.544621]]
    assert second.toarray().tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


@pytest.mark.parametrize("dims", [(5, 3), (5, 4, 3), (5, 4, 3, 2)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("nonlinear", [True, False])
def test_network_and_gradients_are_those_of_dense_matrices(dims, alpha, nonlinear, expression, graphs):
    network = network_of(dims, alpha, nonlinear=nonlinear)
    X = torch.from_numpy(expression.toarray()).double()
    latent, rebuilt = reference(network, X, graphs)
    expected = torch.autograd.grad((X - rebuilt).square().sum(), list(network.parameters()), allow_unused=True)
    rows, cells = tensors(expression, graphs if alpha else (graphs[0], None), network.shape.hops)
    found, decoded, first = network(rows, cells)
    torch.testing.assert_close(found, latent)
    torch.testing.assert_close(decoded @ network.weights[0].T, rebuilt)
    error = squared_error(first, decoded, network.weights[0], float((X**2).sum()))
    gradients = torch.autograd.grad(error, list(network.parameters()))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if other is None else other)


@pytest.mark.parametrize("dims", [(5, 3), (5, 4, 3)])
def test_a_tile_gives_its_core_what_the_whole_gives(dims, expression, graphs):
    network = network_of(dims)
    rows, cells = tensors(expression, graphs, network.shape.hops)
    latent, decoded, first = network(rows, cells)
    cores = np.array([3, 40, 17, 18])
    rows, cells = tensors(expression, graphs, network.shape.hops, cores)
    assert cells.counts[0] == 4
    for found, expected in zip(network(rows, cells), (latent, decoded, first), strict=True):
        torch.testing.assert_close(found, expected[cores])


def test_with_alpha_0_the_second_graph_and_its_parameters_do_not_exist(expression, graphs):
    network = network_of(alpha=0.0)
    assert not [name for name in network.state_dict() if "second" in name]
    assert sum(p.numel() for p in AutoEncoder(Shape(3000, alpha=0.0)).parameters()) == 1_552_384
    assert sum(p.numel() for p in AutoEncoder(Shape(3000, alpha=0.01)).parameters()) == 1_553_408
    network = network.float()
    assert np.array_equal(
        encode(network, expression, graphs), encode(network, expression, (graphs[0], graphs[1].reversed()))
    )


def test_with_alpha_1_the_first_graph_changes_nothing(expression, graphs):
    network = network_of(alpha=1.0).float()
    other = encode(network, expression, (graphs[0].reversed(), graphs[1]))
    np.testing.assert_allclose(encode(network, expression, graphs), other, atol=1e-6)


def test_permuted_cells_give_the_permuted_embedding(expression, graphs):
    network = network_of().float()
    order = np.random.default_rng(5).permutation(CELLS)
    permuted = tuple(Graph.from_matrix(graph.to_matrix()[order][:, order]) for graph in graphs)
    np.testing.assert_allclose(
        encode(network, expression[order], permuted), encode(network, expression, graphs)[order], atol=1e-5
    )


def test_permuted_genes_with_permuted_weights_give_the_same_embedding(expression, graphs):
    network, other = network_of().float(), network_of().float()
    order = np.random.default_rng(5).permutation(GENES)
    with torch.no_grad():
        other.weights[0].copy_(network.weights[0][order])
    np.testing.assert_allclose(
        encode(other, expression[:, order].tocsr(), graphs), encode(network, expression, graphs), atol=1e-5
    )


@pytest.mark.parametrize("cells_at_once", [1, 7, CELLS - 1, CELLS, 1000])
@pytest.mark.parametrize("dims", [(5, 3), (5, 4, 3)])
def test_embedding_by_pieces_is_that_of_the_whole(cells_at_once, dims, expression, graphs):
    network = network_of(dims).float()
    found = encode(network, expression, graphs, cells_at_once=cells_at_once)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, encode(network, expression, graphs), atol=1e-5)


def test_attention_matrices_have_rows_of_sum_1_on_graph_and_diagonal(expression, graphs):
    found = attention_matrices(network_of().float(), expression, graphs)
    for matrix, graph in zip(found, graphs, strict=True):
        assert matrix.data.min() > 0
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
        support = (graph.to_matrix().toarray() > 0) | np.eye(CELLS, dtype=bool)
        assert np.array_equal(matrix.toarray() > 0, support)
    assert attention_matrices(network_of(alpha=0.0).float(), expression, graphs)[1] is None


def test_reconstruction_is_the_decoded_expression_cut_off_at_zero(expression, graphs):
    network = network_of()
    with torch.no_grad():
        _, expected = reference(network, torch.from_numpy(expression.toarray()).double(), graphs)
    found = reconstruct(network.float(), expression, graphs)
    assert (expected < 0).any()
    np.testing.assert_allclose(found, expected.clamp(min=0), atol=1e-5)


def test_a_single_cell_is_embedded():
    network = network_of().float()
    alone = Graph.from_edges([], [], 1)
    latent = encode(network, csr_matrix(np.ones((1, GENES), dtype=np.float32)), (alone, alone))
    assert np.isfinite(latent).all()


@pytest.mark.parametrize(("init", "spread"), [("glorot_uniform", math.sqrt(2)), ("glorot_normal", 2.0)])
def test_initialisation_is_glorots(init, spread):
    network = AutoEncoder(Shape(3000, (512, 30), 0.01, True, init), 0)
    for name, fans in {"weights.0": 3512, "weights.1": 542, "attention.first_sender_0": 513}.items():
        values = network.state_dict()[name]
        # a uniform one has the variance l^2 / 3 = 2 / fans, the normal one gain^2 times that
        assert values.std().item() == pytest.approx(spread / math.sqrt(fans), rel=0.1)
        limit = math.sqrt(6 / fans)
        if init == "glorot_uniform":
            assert 0.98 * limit < values.abs().max().item() < 1.000001 * limit


def test_initialisation_depends_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (AutoEncoder(Shape(GENES), seed).weights[0] for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_saved_network_gives_the_same_embedding(tmp_path, expression, graphs):
    network = network_of((5, 4, 3), nonlinear=False).float()
    network.save_pretrained(tmp_path)
    loaded = AutoEncoder.from_pretrained(tmp_path)
    assert loaded.shape == network.shape
    assert np.array_equal(encode(loaded, expression, graphs), encode(network, expression, graphs))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_saved_weights_are_those_of_the_given_state(tmp_path):
    network = network_of().float()
    network.save_pretrained(tmp_path, {name: value + 1 for name, value in network.state_dict().items()})
    loaded = AutoEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.weights[0], network.weights[0] + 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "gates", "hidden_dims": [5, 3]}'),
        lambda folder: (folder / "config.json").write_text(
            '{"model_type": "gates", "num_genes": 8, "hidden_dims": [5, 3]}'
        ),
    ],
)
def test_damaged_folder_is_refused_by_name(tmp_path, damage):
    network_of().float().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=str(tmp_path)):
        AutoEncoder.from_pretrained(tmp_path)
