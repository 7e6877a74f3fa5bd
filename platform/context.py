"""What a running method may use. A method sees this and its configuration; it never imports mlflow or ray.tune."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.platform.experiment import Compute
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tenfold.platform.models.manifest import Manifest, Parent
    from tenfold.platform.stages import Stage, StageResult
    from tenfold.platform.training.launch import TrainingJob, TrainingResult
    from tenfold.platform.tuning.trial import TrialReports

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanContext:
    """What `Method.plan` may look at: nothing has been started."""

    seed: int
    compute: Compute
    cache: Storage


@dataclass(frozen=True)
class RunContext:
    """One run: its seed, its place in storage, its tracker, and ways to put work on the cluster.

    Attributes:
        run_id: name and hash of the run.
        seed: decides every random choice of the method.
        compute: what training jobs and `map` take.
        storage: the run's own folder.
        cache: folder shared by all runs of this storage, for what several runs reuse; name entries by content digests.
        tracker: the MLflow run, for `report` and for training workers.
        trial: set in a trial of a sweep: reports go to Tune as well.
    """

    run_id: str
    method: str
    seed: int
    compute: Compute
    storage: Storage
    cache: Storage
    tracker: Tracker
    trial: TrialReports | None = None

    def report(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics of the driver to MLflow and, in a trial, those of a step to Tune.

        Training workers report by themselves; final metrics belong into the `Outcome`.
        """
        self.tracker.log_metrics(metrics, step=step)
        if self.trial is not None and step is not None:
            self.trial.report(metrics, step)

    def train(self, job: TrainingJob) -> TrainingResult:
        """Run a training job on the cluster to its end; see `tenfold.platform.training.launch.train_job`."""
        from tenfold.platform.training.launch import train_job

        return train_job(self, job)

    def stages(self, stages: Sequence[Stage], *, at_once: bool = False) -> list[StageResult]:
        """Do stages with MLflow runs of their own; see `tenfold.platform.stages.run_stages`."""
        from tenfold.platform.stages import run_stages

        return run_stages(self, stages, at_once=at_once)

    def adopt_model(self, result: StageResult) -> str:
        """Make the model of a stage in this run's folder the run's own; returns its folder relative to the storage."""
        from tenfold.platform.models.manifest import MANIFEST_NAME, Manifest

        manifest = Manifest.model_validate_json(result.storage.read_text(f"{result.outcome.model}/{MANIFEST_NAME}"))
        self._point_at(result.model_folder, manifest)
        return self.storage.relative(result.model_folder)

    def copy_model(self, folder: str, *, name: str) -> Manifest:
        """Put a copy of a model, wherever it lies, into `models/NAME` of this run's folder; returns its manifest.

        Raises:
            ModelError: it is damaged.
        """
        import tempfile

        from tenfold.platform.models.manifest import MANIFEST_NAME, verify_manifest

        target = f"models/{name}"
        with tempfile.TemporaryDirectory(prefix="tenfold-model-") as scratch:
            source = Storage(folder).download("", Path(scratch) / "model")
            manifest = verify_manifest(source).model_copy(update={"name": self.run_id})
            self.storage.delete(target)
            self.storage.upload(source, target)
        self.storage.write_text(f"{target}/{MANIFEST_NAME}", manifest.model_dump_json(indent=2) + "\n")
        self._point_at(self.storage.uri_of(target), manifest)
        return manifest

    def _point_at(self, folder: str, manifest: Manifest) -> None:
        """Tell MLflow where a model of this run is."""
        self.tracker.log_model_pointer(
            folder,
            manifest.digest,
            flavor=manifest.flavor,
            metrics=manifest.metrics,
            parents=[parent.reference for parent in manifest.parents],
        )

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        name: str,
        keys: Sequence[str] | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> list[Any]:
        """Apply `function` to independent items on the cluster; see `tenfold.platform.mapping.map_items`."""
        from tenfold.platform.mapping import map_items

        return map_items(self, function, items, name=name, keys=keys, cpus=cpus, gpus=gpus)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Keep a matplotlib figure as PNG in MLflow."""
        self.tracker.log_figure(name, figure)

    def save_model(
        self,
        checkpoint: str,
        *,
        name: str,
        flavor: str,
        metrics: Mapping[str, float],
        parents: Sequence[Parent],
        files: Sequence[str] | None = None,
    ) -> str:
        """Turn a checkpoint folder of this run into a model folder with a manifest, and tell MLflow where it is.

        Args:
            checkpoint: folder relative to the run's storage, as in `TrainingResult`.
            name: folder below `models/`.
            flavor: what kind of model it is, e.g. causal-lm.
            metrics: kept in the manifest.
            parents: models and data that it was made from.
            files: names of the files that make the model; default: those of a Hugging Face folder.

        Returns:
            The model's folder relative to the run's storage.
        """
        import shutil
        import tempfile

        from tenfold.platform.models.manifest import model_files, read_manifest, write_manifest

        target = f"models/{name}"
        with tempfile.TemporaryDirectory(prefix="tenfold-model-") as scratch:
            source = self.storage.download(checkpoint, Path(scratch) / "checkpoint")
            folder = Path(scratch) / "model"
            folder.mkdir()
            for path in model_files(source) if files is None else [source / name for name in files]:
                shutil.copyfile(path, folder / path.name)
            write_manifest(
                folder,
                flavor=flavor,
                method=self.method,
                name=self.run_id,
                parents=list(parents),
                metrics=dict(metrics),
            )
            digest = read_manifest(folder).digest
            self.storage.delete(target)
            self.storage.upload(folder, target)
        self.tracker.log_model_pointer(
            self.storage.uri_of(target),
            digest,
            flavor=flavor,
            metrics=metrics,
            parents=[parent.reference for parent in parents],
        )
        return target
