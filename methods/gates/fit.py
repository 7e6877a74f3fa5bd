"""Training the auto-encoder, here or on the cluster's workers, and reading it afterwards (3.8, 10.3)."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tenfold.methods.gates.config import GATESConfig, GATESOptions
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.module import Objective, SpatialModule, TileTensors
from tenfold.methods.gates.network import AutoEncoder, Neighbourhood, Shape
from tenfold.methods.gates.prepared_files import read_prepared
from tenfold.methods.gates.reconstruction import SparseRows
from tenfold.methods.gates.tiles import Tile, cut_tile, parts_for, split_cells, whole
from tenfold.platform.errors import ConfigError, DataError
from tenfold.platform.models.randomness import seeded
from tenfold.platform.storage import Storage
from tenfold.platform.training.options import TrainingOptions

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from tenfold.methods.gates.trainer import SpatialTrainer
    from tenfold.platform.training.worker import WorkerContext

Graphs = tuple[Graph, Graph | None]


@dataclass(frozen=True)
class Fitted:
    """A trained network and what it makes of its section.

    Attributes:
        network: the auto-encoder.
        latent: float32 [N, Z].
        losses: means over the steps between two entries of `epochs`.
        epochs: training that each loss ends with, in passes over the section; where it was trained here 1, 2, ...
    """

    network: AutoEncoder
    latent: np.ndarray
    losses: list[float]
    epochs: list[float]


@dataclass(frozen=True)
class Recipe:
    """What a method trains with where the user left it open."""

    epochs: int
    learning_rate: float
    loss: str


RECIPES = {
    "gates": Recipe(500, 1e-4, "frobenius"),
    "stagate": Recipe(500, 1e-4, "frobenius"),
    # the PyTorch port; its initialisation and its decay are in `shape_of` and the Trainer (6.2)
    "stagate_pyg": Recipe(1000, 1e-3, "mse"),
}


def recipe(config: GATESOptions) -> Recipe:
    """Return the user's values, with the method's own where there are none (4, 6.2)."""
    given = {name: getattr(config, name) for name in ("epochs", "learning_rate", "loss")}
    return replace(RECIPES[config.method], **{name: value for name, value in given.items() if value is not None})


def shape_of(config: GATESOptions, num_genes: int) -> Shape:
    """Return the shape of the network that a configuration trains."""
    init = "glorot_normal" if config.method == "stagate_pyg" else "glorot_uniform"
    return Shape(num_genes, tuple(config.hidden_dims), config.fusion_weight, config.nonlinear, init)


def training_options(config: GATESOptions) -> TrainingOptions:
    """Return the options of the training job: a step is the whole graph, or a tile of every worker."""
    used = recipe(config)
    return TrainingOptions(
        num_train_epochs=used.epochs,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=used.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm,
        logging_steps=10,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=config.save_steps,
        metric_for_best="eval/reconstruction_error",
    )


class TileSource:
    """The tiles of a section, made as they are asked for; without `tile_cells` one part for each worker.

    Args:
        expression: float32 CSR [N, G].
        graphs: first and second, without self loops; with alpha = 0 only the first is read.
        config: GATES' options.
        seed: of the senders that are drawn.
        coordinates: [N, 2 or 3]; needed where there is more than one tile.
        sections: [N] numbers, or None.
        device: where tensors go.
        world_size: workers.
    """

    def __init__(
        self,
        expression: csr_matrix,
        graphs: Graphs,
        config: GATESOptions,
        seed: int,
        *,
        coordinates: np.ndarray | None = None,
        sections: np.ndarray | None = None,
        device: Any = "cpu",
        world_size: int = 1,
    ):
        if not expression.has_canonical_format:  # |X|^2 is summed over stored values
            expression = expression.copy()
            expression.sum_duplicates()
        self._expression, self._device = expression, device
        self._graphs = [graph.with_self_loops() for graph in fused(graphs, config.fusion_weight)]
        self._hops = shape_of(config, expression.shape[1]).hops
        self._fanout = config.fanout if config.tile_cells else None
        self._seed = seed
        self._cores = self._cut(config.tile_cells, world_size, coordinates, sections)
        self._kept: dict[int, TileTensors] = {}
        self._keep_all = not config.tile_cells

    def _cut(
        self, size: int | None, world_size: int, coordinates: np.ndarray | None, sections: np.ndarray | None
    ) -> list[np.ndarray]:
        number = self._expression.shape[0]
        if size is None and world_size == 1:
            return [np.arange(number)]
        places = np.arange(number)[:, None] if coordinates is None else coordinates
        if size is None:
            return parts_for(places, world_size, sections)
        return split_cells(places, size, sections)

    def __len__(self) -> int:
        return len(self._cores)

    def __call__(self, number: int, step: int | None) -> TileTensors:
        """Return a tile; with fanout its senders are drawn for every step, None takes them all."""
        if number in self._kept:
            return self._kept[number]
        if len(self._cores) == 1:
            tile = whole(self._graphs, self._hops)
        elif self._fanout is not None and step is not None:
            generator = np.random.default_rng([self._seed, number, step])
            tile = cut_tile(self._graphs, self._cores[number], self._hops, fanout=self._fanout, generator=generator)
        else:
            tile = cut_tile(self._graphs, self._cores[number], self._hops)
        made = tensors_of(self._expression, tile, self._device)
        if self._keep_all:
            self._kept[number] = made
        return made


def tensors_of(expression: csr_matrix, tile: Tile, device: Any = "cpu") -> TileTensors:
    """Make a tile's tensors."""
    number = expression.shape[0]
    # a tile may reach all cells in another order
    is_whole = len(tile.cells) == number and bool((tile.cells == np.arange(number)).all())
    rows = expression if is_whole else expression[tile.cells]
    core = rows[: tile.counts[0]]
    squared = float(np.square(core.data, dtype=np.float64).sum())
    return TileTensors(SparseRows.build(rows, device), Neighbourhood.build(tile, device), squared)


def make_module(source: TileSource, config: GATESOptions, shape: Shape, num_cells: int, seed: int) -> SpatialModule:
    """Return what is trained."""
    used = recipe(config)
    # STAGATE's port lets Adam decay all parameters instead
    decay = 0.0 if config.method == "stagate_pyg" else config.weight_decay
    objective = Objective(used.loss, decay, config.weight_decay_scope, num_cells, shape.num_genes)
    return SpatialModule(AutoEncoder(shape, seed), objective, source)


def fit(
    expression: csr_matrix,
    graphs: Graphs,
    config: GATESOptions,
    seed: int,
    *,
    coordinates: np.ndarray | None = None,
    sections: np.ndarray | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Fitted:
    """Train the auto-encoder in this process.

    Args:
        expression: float32 CSR [N, G].
        graphs: first and second graph, without self loops.
        config: GATES' options.
        seed: of the initialisation; the same seed gives the same numbers on the same machine and threads.
        coordinates: [N, 2 or 3], for tiles.
        sections: [N] numbers, or None.
        progress: called after every epoch with epoch, epochs, loss; what it raises stops the training and passes.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, looks for one
    from tenfold.methods.gates.trainer import SpatialTrainer, local_arguments

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = TileSource(expression, graphs, config, seed, coordinates=coordinates, sections=sections, device=device)
    module = make_module(source, config, shape_of(config, expression.shape[1]), expression.shape[0], seed)
    with tempfile.TemporaryDirectory(prefix="tenfold-gates-") as scratch, _own_randomness(seed):
        trainer = SpatialTrainer(
            module,
            local_arguments(training_options(config), seed, Path(scratch)),
            source,
            l2=_l2(config),
            progress=progress,
        )
        trainer.train()
    epochs = recipe(config).epochs
    losses = torch.stack(module.losses).reshape(epochs, -1).mean(dim=1).tolist()
    network = module.exported.cpu().eval()
    by_epoch = [float(epoch) for epoch in range(1, epochs + 1)]
    return Fitted(network, encode(network, expression, graphs), losses, by_epoch)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Give the caller's random numbers back: the Trainer seeds Python's and NumPy's too, `seeded` only torch's."""
    states = random.getstate(), np.random.get_state()
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def losses_by_epoch(log: Sequence[tuple[int, float]], epochs: int) -> tuple[list[float], list[float]]:
    """Return the losses of a training job's log, and how many epochs had been trained at each.

    Args:
        log: (step, mean loss since the entry before), from a training that went to its end: its last step is that of
            the last epoch.
        epochs: passes over the section.
    """
    steps = log[-1][0] if log else 0
    return [loss for _, loss in log], [step * epochs / steps for step, _ in log]


def _l2(config: GATESOptions) -> float:
    return config.weight_decay if config.method == "stagate_pyg" else 0.0


def build_trainer(context: WorkerContext) -> SpatialTrainer:
    """Build the Trainer on a worker: every worker has a part of the section, with the cells it receives from.

    Data parallelism is plain (DeepSpeed ZeRO-0): the network has a million and a half parameters.

    `context.config` has the configuration under `gates`, and where the prepared section is under `cache` and `folder`.

    Raises:
        ConfigError: steps over several tiles of a worker: the norm of (3.7) is no sum over them.
    """
    from tenfold.methods.gates.trainer import SpatialTrainer

    if context.options.gradient_accumulation_steps != 1 or context.options.per_device_train_batch_size != 1:
        raise ConfigError(
            f"a step is one tile of every worker; gradient_accumulation_steps = "
            f"{context.options.gradient_accumulation_steps} and per_device_train_batch_size = "
            f"{context.options.per_device_train_batch_size} must be 1. Choose config.tile_cells instead"
        )
    config = GATESConfig.model_validate(context.config["gates"])
    scratch = Path(context.arguments.output_dir)
    prepared = read_prepared(Storage(context.config["cache"]).download(context.config["folder"], scratch / "section"))
    source = TileSource(
        prepared.expression,
        prepared.graphs,
        config,
        context.seed,
        coordinates=prepared.coordinates,
        sections=prepared.sections,
        device=context.arguments.device,
        world_size=context.world_size,
    )
    shape = shape_of(config, prepared.expression.shape[1])
    module = make_module(source, config, shape, prepared.expression.shape[0], context.seed)
    return SpatialTrainer(module, context.arguments, source, l2=_l2(config), own_part=not config.tile_cells)


def _tiles(
    expression: csr_matrix, graphs: Sequence[Graph], hops: int, cells_at_once: int | None
) -> Iterator[tuple[np.ndarray, TileTensors]]:
    looped = [graph.with_self_loops() for graph in graphs]
    number = expression.shape[0]
    if cells_at_once is None or cells_at_once >= number:
        yield np.arange(number), tensors_of(expression, whole(looped, hops))
        return
    for start in range(0, number, cells_at_once):
        core = np.arange(start, min(start + cells_at_once, number))
        yield core, tensors_of(expression, cut_tile(looped, core, hops))


@torch.no_grad()
def encode(
    network: AutoEncoder, expression: csr_matrix, graphs: Graphs, *, cells_at_once: int | None = None
) -> np.ndarray:
    """Return the embedding of all cells, float32 [N, Z], from full neighbourhoods.

    Args:
        network: trained.
        expression: float32 CSR [N, G].
        graphs: first and second, without self loops.
        cells_at_once: cells that are embedded at once, with those that they read; None: all. Changes no value.
    """
    hops = network.shape.hops // 2
    latent = np.empty((expression.shape[0], network.shape.hidden_dims[-1]), dtype=np.float32)
    for core, tile in _tiles(expression, fused(graphs, network.shape.alpha), hops, cells_at_once):
        latent[core] = network.encode(tile.expression, tile.cells).float().numpy()
    return latent


def fused(graphs: Graphs, alpha: float) -> list[Graph]:
    """Return the graphs that a network fuses: with alpha = 0 the first alone.

    Raises:
        DataError: the second one is missing.
    """
    if alpha == 0:
        return [graphs[0]]
    if graphs[1] is None:
        raise DataError(f"alpha = {alpha} fuses two graphs, but there is only one. Give the second, or use alpha = 0")
    return [graphs[0], graphs[1]]
