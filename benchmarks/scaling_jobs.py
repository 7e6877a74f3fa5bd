"""Small real trainings of the platform for benchmarks/scaling_plan.py: speed, bytes exchanged, bytes of checkpoints.

The job is plain fine-tuning of the demo's student on the demo's rows. Bytes are counted where they leave: in every
collective of torch.distributed, rank 0.
"""

import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import median
from tenfold.methods.dskd.trainer import build_trainer
from tenfold.platform.training.launch import TrainingJob
from tenfold.platform.training.worker import WorkerContext
from transformers import Trainer, TrainerCallback

STEPS, BATCH, SEED = 12, 16, 10
# How many elements a collective sends and receives for each of its argument's, before (workers - 1) / workers.
COLLECTIVES = {
    "all_reduce": (2, "tensor"),
    "reduce": (1, "tensor"),
    "broadcast": (1, "tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "all_gather_into_tensor": (1, "output_tensor"),
}


def counted_trainer(context: WorkerContext) -> Trainer:
    """Build DSKD's Trainer; rank 0 writes what each step exchanged, and the number of parameters, to `counts`."""
    counted: Counter[str] = Counter()
    for name, (factor, argument) in COLLECTIVES.items():
        counting = _counting(getattr(torch.distributed, name), name, factor, argument, counted)
        setattr(torch.distributed, name, counting)
        _replace_kept(name, counting)
    trainer = build_trainer(context)
    if context.rank == 0:
        trainer.add_callback(_Counts(Path(context.config["counts"]), counted))
    return trainer


def _counting(
    function: Callable[..., Any], name: str, factor: int, argument: str, counted: Counter[str]
) -> Callable[..., Any]:
    position = 1 if argument == "input" else 0

    @functools.wraps(function)
    def wrapper(*given: Any, **named: Any) -> Any:
        tensor = named[argument] if argument in named else given[position]
        counted[name] += factor * tensor.numel() * tensor.element_size()
        return function(*given, **named)

    return wrapper


def _replace_kept(name: str, counting: Callable[..., Any]) -> None:
    """DeepSpeed looks two of them up once and keeps them."""
    from deepspeed import comm

    backend = comm.comm.cdb
    for kept, of in (
        ("all_gather_function", "all_gather_into_tensor"),
        ("reduce_scatter_function", "reduce_scatter_tensor"),
    ):
        if of == name and backend is not None and getattr(backend, kept, None) is not None:
            setattr(backend, kept, counting)


class _Counts(TrainerCallback):
    def __init__(self, path: Path, counted: Counter[str]) -> None:
        self._path, self._counted = path, counted
        self._steps: list[dict[str, int]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Leave out what was exchanged between the steps."""
        self._counted.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._steps.append(dict(self._counted))

    def on_train_end(self, *_: Any, model: Any, **__: Any) -> None:
        parameters = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters())
        self._path.write_text(json.dumps({"parameters": parameters, "steps": self._steps}), encoding="utf-8")


def measured_job(workers: int, stage: int, bf16: bool) -> dict[str, Any]:
    """Run one training job; Ray must be connected.

    Returns:
        Row with tokens_per_s (median of steps, the first three left out), start_s, exchanged bytes of a step by
        collective, checkpoint bytes a parameter by kind of file.
    """
    from mlflow import MlflowClient
    from tenfold.platform.context import RunContext
    from tenfold.platform.experiment import Compute, load_experiment
    from tenfold.platform.storage import Storage
    from tenfold.platform.tracking import Tracker

    training = {
        "per_device_train_batch_size": BATCH // workers,
        "train_sampling_strategy": "sequential",
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "bf16": bf16,
    }
    changes = [f"config.training.{key}={json.dumps(value)}" for key, value in training.items()]
    changes += ["config.objective=sft", "config.data.max_validation_rows=16"]
    config: Any = load_experiment("dskd/demo", changes).config
    with tempfile.TemporaryDirectory(prefix="tenfold-benchmark-") as folder:
        uri, name = f"sqlite:///{folder}/mlflow.db", f"workers-{workers}-zero{stage}"
        tracker = Tracker.start(uri, "benchmark", name, spool=Path(folder) / "unsent.jsonl")
        storage, cache, counts = Storage(Path(folder) / "run"), f"{folder}/cache", Path(folder) / "counts.json"
        compute = Compute(workers=workers, cpus_per_worker=1, deepspeed=f"zero{stage}", max_failures=0)
        context = RunContext(name, "dskd", SEED, compute, storage, Storage(cache), tracker)
        payload = {
            "dskd": config.model_dump(mode="json"),
            "cache": cache,
            "alignment": "none",
            "counts": str(counts),
        }
        called = time.time()
        result = context.train(TrainingJob(counted_trainer, payload, config.training))
        tracker.finish("FINISHED")
        points = MlflowClient(uri).get_metric_history(tracker.run_id, "train/tokens_per_s")
        points.sort(key=lambda point: point.step)
        counted = json.loads(counts.read_text(encoding="utf-8"))
        sizes: Counter[str] = Counter()
        for path in result.best.files:
            sizes[_kind(path)] += storage.filesystem.get_file_info(f"{storage.root}/{result.best.path}/{path}").size
    exchanged = {key: median([step.get(key, 0) for step in counted["steps"][3:]]) for key in COLLECTIVES}
    return {
        "workers": workers,
        "stage": stage,
        "bf16": bf16,
        "parameters": counted["parameters"],
        "tokens_per_s": median([point.value for point in points[3:]]),
        "start_s": points[0].timestamp / 1000 - called,
        "exchanged": {key: value for key, value in exchanged.items() if value},
        "exchanged_bytes": sum(exchanged.values()),
        "checkpoint_bytes_per_parameter": sum(sizes.values()) / counted["parameters"],
        "checkpoint": {kind: size / counted["parameters"] for kind, size in sorted(sizes.items())},
    }


def _kind(path: str) -> str:
    """Return which part of a checkpoint a file is."""
    if path.endswith("optim_states.pt"):
        return "optimizer"
    if path.endswith("model_states.pt"):
        return "module"
    return "weights" if path.endswith(".safetensors") else "others"
