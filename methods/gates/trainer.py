"""The Trainer of the auto-encoder: tiles in, one optimizer step for the tiles of all workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tenfold.methods.gates.module import SpatialModule
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.trainer import Trainer
from torch import Tensor, nn

Progress = Callable[[int, int, float], None]


class SpatialTrainer(Trainer):
    """Trains a `SpatialModule`.

    Args:
        module: what is trained.
        arguments: of the library.
        source: has a length, the number of tiles.
        l2: Adam's own decay of all parameters (STAGATE's port).
        own_part: every worker trains on the part of its rank in every step, instead of drawing tiles.
        progress: called after every epoch with epoch, epochs, loss.
    """

    def __init__(
        self,
        module: SpatialModule,
        arguments: transformers.TrainingArguments,
        source: Any,
        *,
        l2: float = 0.0,
        own_part: bool = False,
        progress: Progress | None = None,
    ):
        arguments.include_num_input_tokens_seen = "no"  # there are none
        rows = [{"tile": number} for number in range(len(source))]
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=_collate,
            compute_metrics=_reconstruction_error,
        )
        self._l2, self._own_part = l2, own_part
        self.remove_callback(transformers.PrinterCallback)
        if progress is not None:
            self.add_callback(_Progress(progress, module))

    optimizer: Any

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the tile's number and the step, which decides what is drawn; both stay on the host."""
        tile = inputs["tile"]
        if self._own_part and self.args.world_size > 1:
            tile = torch.tensor([self.args.process_index])
        return {"tile": tile, "step": torch.tensor([self.state.global_step])}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build Adam (3.8); its decay is 0 but for STAGATE's port."""
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(
                self.model.parameters(), lr=self.args.learning_rate, eps=1e-8, weight_decay=self._l2
            )
        return self.optimizer

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tile's squared error; the sum over tiles is all that evaluation needs."""
        with torch.no_grad():
            outputs = model(**self._prepare_inputs(inputs))
        error = outputs["squared_error"].reshape(1)
        return outputs["loss"], error, error


def _collate(rows: list[dict[str, int]]) -> dict[str, Tensor]:
    return {"tile": torch.tensor([row["tile"] for row in rows])}


def _reconstruction_error(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Return |X - X_hat|_F over the whole section (the platform reports no metric whose name ends in _loss)."""
    errors = torch.as_tensor(prediction.predictions, dtype=torch.float64)
    return {"reconstruction_error": math.sqrt(max(errors.sum().item(), 0.0))}


class _Progress(transformers.TrainerCallback):
    def __init__(self, progress: Progress, module: SpatialModule):
        self._progress, self._module = progress, module

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epochs = math.ceil(args.num_train_epochs)
        steps = self._module.losses[-(state.max_steps // epochs) :]
        self._progress(round(state.epoch), epochs, torch.stack(steps).mean().item())


def local_arguments(options: TrainingOptions, seed: int, folder: Path) -> transformers.TrainingArguments:
    """Return arguments for training in this process, on one device: nothing is reported or kept."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.num_train_epochs,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=options.max_grad_norm,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        log_level="warning",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would wrap the module in DataParallel, which splits rows
    return arguments
