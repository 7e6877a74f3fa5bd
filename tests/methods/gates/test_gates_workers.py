"""The auto-encoder trained by two Ray workers with DeepSpeed: losses and weights are those of one process."""

import numpy as np
import pytest
import torch
from scipy.sparse import random as random_matrix
from scipy.spatial import cKDTree
from tenfold.methods.gates.config import GATESConfig
from tenfold.methods.gates.fit import build_trainer, fit, training_options
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.network import AutoEncoder
from tenfold.methods.gates.prepared_files import write_prepared
from tenfold.methods.gates.preparing import Prepared
from tenfold.platform import cluster
from tenfold.platform.context import RunContext
from tenfold.platform.experiment import Compute
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Tracker
from tenfold.platform.training.curves import training_log
from tenfold.platform.training.launch import TrainingJob

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CELLS, SEED = 90, 4


@pytest.fixture(scope="module")
def section():
    draw = np.random.default_rng(0)
    expression = random_matrix(CELLS, 300, 0.1, format="csr", dtype=np.float32, random_state=0)
    coordinates = draw.random((CELLS, 2))
    nearest = cKDTree(coordinates).query(coordinates, 5)[1][:, 1:]
    cells = np.repeat(np.arange(CELLS), 4)
    spatial = Graph.from_edges(cells, nearest.reshape(-1), CELLS)
    similar = Graph.from_edges(cells, draw.integers(0, CELLS, 4 * CELLS), CELLS).without_self_loops()
    genes, kept = [f"gene{i}" for i in range(300)], np.ones(CELLS, dtype=bool)
    return Prepared(expression, genes, kept, coordinates, None, spatial, (spatial, similar), {}, [])


def test_two_workers_train_what_one_process_trains_and_report_the_error(section, tmp_path):
    options = {"hidden_dims": [16, 4], "alpha": 0.2, "epochs": 4, "save_steps": 2, "learning_rate": 1e-2}
    config = GATESConfig.model_validate({"sections": [{"path": "synthetic:90"}], **options})
    alone = fit(section.expression, section.graphs, config, SEED)
    storage, cache = Storage(tmp_path / "run"), Storage(tmp_path / "cache")
    write_prepared(tmp_path / "cache" / "section", section)
    spool = tmp_path / "spool.jsonl"
    tracker = Tracker.start(f"sqlite:///{tmp_path / 'mlflow.db'}", "gates", "workers", spool=spool)
    compute = Compute(workers=2, deepspeed="zero0", max_failures=0)
    context = RunContext("gates-workers", "gates", SEED, compute, storage, cache, tracker)
    payload = {"gates": config.model_dump(mode="json", exclude_unset=True), "cache": cache.uri, "folder": "section"}
    job = TrainingJob(
        build_trainer, payload, training_options(config).model_copy(update={"logging_steps": 1}), name="train"
    )
    cluster.connect(num_cpus=2, include_dashboard=False)
    try:
        result = context.train(job)
    finally:
        cluster.shutdown()
        tracker.finish("FINISHED")
    losses = [value for _, value in training_log(storage, "train/train")["train/loss"]]
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    assert result.best.step == 4
    network = AutoEncoder.from_pretrained(storage.download(result.best.path, tmp_path / "checkpoint"))
    assert network.shape == alone.network.shape
    for name, weight in alone.network.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    # after the last step: what a fifth would start with
    config = config.model_copy(update={"epochs": 5, "weight_decay": 0.0})
    fifth = fit(section.expression, section.graphs, config, SEED).losses[4]
    assert result.best.metrics["eval/reconstruction_error"] == pytest.approx(fifth, rel=1e-3)
