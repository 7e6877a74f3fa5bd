"""Training the auto-encoder: what `fit` does, loss and gradient over tiles and ranks, recipes."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, diags
from scipy.sparse import random as random_matrix
from scipy.spatial import cKDTree
from tenfold.methods.gates import reconstruction
from tenfold.methods.gates.config import ExpressionGraph, GATESOptions, SpatialGraph
from tenfold.methods.gates.expression_graph import expression_graph
from tenfold.methods.gates.fit import (
    TileSource,
    build_trainer,
    encode,
    fit,
    losses_by_epoch,
    make_module,
    recipe,
    shape_of,
    training_options,
)
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.network import AutoEncoder, Shape
from tenfold.methods.gates.spatial_graph import spatial_graph
from tenfold.methods.gates.trainer import SpatialTrainer, local_arguments
from tenfold.platform.errors import ConfigError

BRAIN = Path(__file__).parents[4] / "shared" / "data" / "spatial" / "starmap_mpfc_3samples.h5ad"
CELLS, GENES = 80, 120
STEP = torch.tensor([0])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products gain nothing from threads, which wait for each other where tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["sparse", "dense"])
def kind(request, monkeypatch):
    """Read the expression as that of thousands of genes, or as a small panel."""
    if request.param == "sparse":
        monkeypatch.setattr(reconstruction, "DENSE_GENES", 0)
    return request.param


@pytest.fixture(scope="module")
def section():
    draw = np.random.default_rng(0)
    expression = random_matrix(CELLS, GENES, 0.2, format="csr", dtype=np.float32, random_state=0)
    expression.data = 1 + 3 * expression.data
    coordinates = draw.random((CELLS, 2))
    nearest = cKDTree(coordinates).query(coordinates, 5)[1][:, 1:]
    cells = np.repeat(np.arange(CELLS), 4)
    spatial = Graph.from_edges(cells, nearest.reshape(-1), CELLS)
    similar = Graph.from_edges(cells, draw.integers(0, CELLS, 4 * CELLS), CELLS).without_self_loops()
    return expression, (spatial, similar), coordinates


def options(**more):
    return GATESOptions(**{"hidden_dims": [16, 4], "alpha": 0.2, "epochs": 4, "learning_rate": 1e-2, **more})


def dense_loss(network, X, graphs, decay, scope, kind):
    """The loss of 3.7 with dense matrices."""
    first, last = network.weights
    M, P = X @ first, 0
    for name, share, graph in (
        ("first", 1 - network.shape.alpha, graphs[0]),
        ("second", network.shape.alpha, graphs[1]),
    ):
        if share == 0 or graph is None:
            continue
        a, b = (network.attention[f"{name}_{side}_0"] for side in ("receiver", "sender"))
        linked = torch.from_numpy(graph.to_matrix().toarray()).bool() | torch.eye(len(X), dtype=torch.bool)
        scores = torch.sigmoid((M @ a)[:, None] + (M @ b)[None, :])
        P = P + share * torch.softmax(scores.masked_fill(~linked, -math.inf), dim=1)
    hidden = torch.nn.functional.elu(P @ M)
    rebuilt = torch.nn.functional.elu(P @ (hidden @ last @ last.T)) @ first.T
    error = (X - rebuilt).square()
    penalised = [first, last] if scope == "all" else [last]
    fit_term = error.mean() if kind == "mse" else error.sum().sqrt()
    return fit_term + decay / 2 * sum(weight.square().sum() for weight in penalised)


def plain_training(section, config, seed, l2=0.0):
    """Adam with clipping, written out (3.8)."""
    expression, graphs, _ = section
    used = recipe(config)
    network = AutoEncoder(shape_of(config, GENES), seed).double()
    X = torch.from_numpy(expression.toarray()).double()
    optimizer = torch.optim.Adam(network.parameters(), lr=used.learning_rate, weight_decay=l2)
    losses = []
    for _ in range(used.epochs):
        optimizer.zero_grad()
        decay = 0.0 if l2 else config.weight_decay
        loss = dense_loss(network, X, graphs, decay, config.weight_decay_scope, used.loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return network, losses


def module_of(section, config, world_size=1):
    expression, graphs, coordinates = section
    source = TileSource(expression, graphs, config, 0, coordinates=coordinates, world_size=world_size)
    return make_module(source, config, shape_of(config, GENES), CELLS, 0).train(), source


def gradients(module, tile):
    module.zero_grad()
    loss = module(torch.tensor([tile]), STEP)["loss"]
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weight_decay": 1.0},
        {"weight_decay": 1.0, "weight_decay_scope": "last"},
        {"loss": "mse"},
        {"max_grad_norm": 0.1},
        {"method": "stagate"},
    ],
    ids=str,
)
def test_training_is_adam_on_the_dense_loss_step_for_step(section, kind, more):
    config = _without_alpha(**more) if "method" in more else options(**more)
    expression, graphs, _ = section
    network, losses = plain_training(section, config, 3)
    fitted = fit(expression, graphs, config, 3)
    assert fitted.losses == pytest.approx(losses, rel=1e-5)
    assert fitted.epochs == [1, 2, 3, 4]
    for name, weight in fitted.network.state_dict().items():
        torch.testing.assert_close(weight, network.state_dict()[name].float(), rtol=1e-3, atol=1e-4, msg=name)


def _without_alpha(**more):
    return GATESOptions(**{"hidden_dims": [16, 4], "epochs": 4, "learning_rate": 1e-2, **more})


def test_stagate_pyg_lets_adam_decay_all_parameters(section):
    config = _without_alpha(method="stagate_pyg", weight_decay=0.5)
    expression, graphs, _ = section
    network, losses = plain_training(section, config, 3, l2=0.5)
    fitted = fit(expression, graphs, config, 3)
    assert fitted.losses == pytest.approx(losses, rel=1e-5)
    vector = "attention.first_sender_0"
    torch.testing.assert_close(
        fitted.network.state_dict()[vector], network.state_dict()[vector].float(), rtol=1e-3, atol=1e-4
    )
    assert fitted.network.shape.init == "glorot_normal"


def test_recipe_fills_in_what_the_user_left_open():
    pyg = recipe(GATESOptions(method="stagate_pyg"))
    assert (pyg.epochs, pyg.learning_rate, pyg.loss) == (1000, 1e-3, "mse")
    own = recipe(GATESOptions(method="stagate_pyg", epochs=7, loss="frobenius"))
    assert (own.epochs, own.learning_rate, own.loss) == (7, 1e-3, "frobenius")
    plain = recipe(GATESOptions(method="stagate"))
    assert (plain.epochs, plain.learning_rate, plain.loss) == (500, 1e-4, "frobenius")


def test_glorot_start_reconstructs_almost_nothing_and_training_improves_it(section):
    expression, graphs, _ = section
    norm = math.sqrt(float((expression.data.astype(np.float64) ** 2).sum()))
    fitted = fit(expression, graphs, options(epochs=60), 0)
    assert fitted.losses[0] == pytest.approx(norm, rel=0.1)
    assert fitted.losses[-1] < 0.95 * fitted.losses[0]
    assert fitted.latent.shape == (CELLS, 4)
    assert fitted.latent.dtype == np.float32
    np.testing.assert_allclose(fitted.latent, encode(fitted.network, expression, graphs))


@pytest.mark.parametrize("more", [{}, {"tile_cells": 30, "fanout": [2, 2]}], ids=["whole", "tiles"])
def test_same_seed_gives_the_same_numbers_and_another_seed_others(section, more):
    expression, graphs, coordinates = section
    first, again, other = (
        fit(expression, graphs, options(**more), seed, coordinates=coordinates) for seed in (1, 1, 2)
    )
    assert first.losses == again.losses
    assert np.array_equal(first.latent, again.latent)
    assert first.losses != other.losses


def test_training_leaves_the_callers_random_numbers_alone(section):
    expression, graphs, _ = section
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    fit(expression, graphs, options(epochs=1), 5)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_progress_is_told_after_every_epoch_and_nothing_is_printed(section, capfd):
    expression, graphs, coordinates = section
    heard = []
    fitted = fit(
        expression,
        graphs,
        options(epochs=3, tile_cells=30),
        0,
        coordinates=coordinates,
        progress=lambda *one: heard.append(one),
    )
    assert [one[:2] for one in heard] == [(1, 3), (2, 3), (3, 3)]
    assert [one[2] for one in heard] == pytest.approx(fitted.losses)
    assert capfd.readouterr().out == ""


def test_what_progress_raises_stops_the_training_and_passes(section):
    expression, graphs, _ = section
    heard = []

    def progress(epoch, epochs, loss):
        heard.append(epoch)
        if epoch == 2:
            raise InterruptedError("cancelled")

    with pytest.raises(InterruptedError, match="cancelled"):
        fit(expression, graphs, options(epochs=50), 0, progress=progress)
    assert heard == [1, 2]


def test_a_single_cell_and_a_cell_without_neighbours_train(section):
    expression, _, _ = section
    alone = Graph.from_edges([], [], 1)
    assert all(map(math.isfinite, fit(expression[:1], (alone, alone), options(), 0).losses))
    nobody = Graph.from_edges([], [], CELLS)
    assert np.isfinite(fit(expression, (nobody, nobody), options(), 0).latent).all()


def test_expression_of_zeros_has_a_finite_gradient(section):
    expression, graphs, _ = section
    fitted = fit(0 * expression, graphs, options(), 0)
    assert np.isfinite(fitted.latent).all()


@pytest.mark.parametrize("loss", ["frobenius", "mse"])
def test_one_tile_of_all_cells_trains_as_the_whole_graph(section, loss):
    expression, graphs, coordinates = section
    whole = fit(expression, graphs, options(loss=loss), 0)
    tiled = fit(expression, graphs, options(loss=loss, tile_cells=CELLS), 0, coordinates=coordinates)
    assert tiled.losses == pytest.approx(whole.losses, rel=1e-6)


def test_gradients_of_all_tiles_make_up_that_of_the_whole(section, kind):
    whole, _ = module_of(section, options(loss="mse", weight_decay=0))
    tiled, source = module_of(section, options(loss="mse", weight_decay=0, tile_cells=30))
    assert len(source) == 4
    loss, gradient = gradients(whole, 0)
    parts = [gradients(tiled, tile) for tile in range(len(source))]
    sizes = [tiled._tile(tile, 0).cells.counts[0] / CELLS for tile in range(len(source))]
    assert sum(size * part[0] for size, part in zip(sizes, parts, strict=True)) == pytest.approx(loss, rel=1e-6)
    total = sum(size * part[1] for size, part in zip(sizes, parts, strict=True))
    torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6)


def test_a_tiles_norm_is_scaled_to_the_whole_section(section):
    module, _ = module_of(section, options(weight_decay=0, tile_cells=30))
    loss, gradient = gradients(module, 1)
    error = module.eval()(torch.tensor([1]), STEP)
    size = error["num_cells"]
    assert loss == pytest.approx(math.sqrt(error["squared_error"].item() * CELLS / size))
    # the gradient is that of the scaled norm: mse times genes x cells / (2 norm) x N / cells
    squares, _ = module_of(section, options(weight_decay=0, tile_cells=30, loss="mse"))
    _, other = gradients(squares, 1)
    torch.testing.assert_close(gradient, other * GENES * CELLS / (2 * loss), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("loss", ["frobenius", "mse"])
def test_averaged_gradients_of_the_ranks_are_the_gradient_of_one(section, ranks, loss, kind, monkeypatch):
    config = options(loss=loss, weight_decay=0.1)
    expected = gradients(module_of(section, config)[0], 0)
    module, source = module_of(section, config, world_size=ranks)
    assert len(source) == ranks
    with torch.no_grad():
        own = [module.eval()(torch.tensor([rank]), STEP) for rank in range(ranks)]
    total = torch.stack([torch.tensor([one["squared_error"].item(), one["num_cells"]]) for one in own]).double().sum(0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.copy_(total))
    found = [gradients(module.train(), rank) for rank in range(ranks)]
    assert [one[0] for one in found] == pytest.approx([expected[0]] * ranks, rel=1e-6)
    mean = torch.stack([one[1] for one in found]).mean(0)
    torch.testing.assert_close(mean, expected[1], rtol=1e-4, atol=1e-6)


def test_senders_are_drawn_by_step_and_all_are_there_for_evaluation(section):
    _, source = module_of(section, options(tile_cells=30, fanout=[1, 1]))
    senders = [source(0, step).cells.fused[0].senders.tolist() for step in (0, 0, 1)]
    assert senders[0] == senders[1] != senders[2]
    exact = module_of(section, options(tile_cells=30))[1](0, 0)
    assert source(0, None).cells.fused[0].senders.tolist() == exact.cells.fused[0].senders.tolist()
    assert len(exact.cells.fused[0].senders) > len(senders[0])


@pytest.mark.parametrize("more", [{}, {"tile_cells": 30, "fanout": [1, 1]}], ids=["whole", "tiles"])
def test_evaluation_reports_the_error_of_the_whole_section(section, more, tmp_path):
    expression, graphs, _ = section
    config = options(**more)
    module, source = module_of(section, config)
    trainer = SpatialTrainer(module, local_arguments(training_options(config), 0, tmp_path), source)
    found = trainer.evaluate()["eval_reconstruction_error"]
    X = torch.from_numpy(expression.toarray()).double()
    network = AutoEncoder(shape_of(config, GENES), 0).double()
    assert found == pytest.approx(dense_loss(network, X, graphs, 0.0, "all", "frobenius").item(), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size = 4"),
    ],
)
def test_workers_refuse_what_would_change_the_loss(more, named):
    context = SimpleNamespace(config={}, options=training_options(GATESOptions()).model_copy(update=more))
    with pytest.raises(ConfigError, match=named):
        build_trainer(context)


def test_losses_of_a_log_stand_at_the_epochs_that_its_steps_make_up():
    # 5 epochs of 4 tiles; a checkpoint between two reports adds an entry of its own
    log = [(10, 9.0), (12, 8.0), (20, 7.0)]
    assert losses_by_epoch(log, 5) == ([9.0, 8.0, 7.0], [2.5, 3.0, 5.0])
    assert losses_by_epoch([], 5) == ([], [])


def test_training_options_are_those_of_the_recipe():
    made = training_options(GATESOptions(method="stagate_pyg", max_grad_norm=2.0))
    assert (made.num_train_epochs, made.learning_rate, made.max_grad_norm) == (1000, 1e-3, 2.0)
    assert made.lr_scheduler_type == "constant"


def test_shape_reads_the_options():
    assert shape_of(GATESOptions(), 50) == Shape(50, (512, 30), 0.01, True, "glorot_uniform")
    stagate = shape_of(GATESOptions(method="stagate_pyg", nonlinear=False), 50)
    assert stagate == Shape(50, (512, 30), 0.0, False, "glorot_normal")


@pytest.mark.skipif(not BRAIN.is_file(), reason="needs the STARmap sections beside the repository")
def test_real_section_starts_at_its_norm_and_reaches_the_known_loss():
    import anndata

    adata = anndata.read_h5ad(BRAIN)
    adata = adata[adata.obs["sample"] == "BZ5"].copy()
    counts = csr_matrix(adata.X, dtype=np.float64)
    expression = csr_matrix(diags(1e4 / counts.sum(axis=1).A1) @ counts).log1p().astype(np.float32)  # 166 genes: all
    spatial = spatial_graph(adata.obsm["spatial"], SpatialGraph())
    similar, _ = expression_graph(expression, ExpressionGraph(k=7))
    fitted = fit(expression, (spatial, similar), GATESOptions(epochs=120, learning_rate=1e-3), 2024)
    norm = float(np.sqrt(np.square(expression.data, dtype=np.float64).sum()))
    assert norm == pytest.approx(1076, abs=1)
    assert fitted.losses[0] == pytest.approx(1036, rel=0.02)  # measured with another implementation, other seeds
    assert fitted.losses[-1] == pytest.approx(702, rel=0.02)
