"""transformers.Trainer with what every method here needs: exact token means, plain checkpoints, logged statistics."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file, save_file
from tenfold.platform.models.adapters import merged_weights
from tenfold.platform.models.saving import without_tied_copies
from tenfold.platform.training.rows import EvenRows, LengthGroups
from tenfold.platform.training.trial_step import forget_trial_step
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

COSINE_FLOOR = 1e-7
BUFFERS, GROUPS = "buffers.safetensors", "optimizer_groups.json"
UNIVERSAL = "latest_universal"  # DeepSpeed's mark of a checkpoint that fits any number of workers


class Trainer(transformers.Trainer):
    """Trains a `TrainedModule`.

    * The loss is the exact mean over the label tokens of the global batch, whatever the ranks, the accumulation or the
      lengths (transformers divides by the gathered count; the module returns a sum over it).
    * Checkpoints hold the exported model in Hugging Face form, an adapter merged into it, beside DeepSpeed's state,
      which leaves out frozen weights.
    * Evaluation gathers numbers per row (`evaluated`), so that metrics do not depend on batches or ranks.

    Args:
        cosine_floor: anneal every parameter group along a cosine to 1e-7 instead of `args.lr_scheduler_type`.
        projector_learning_rate: learning rate of the parameters outside the exported model; None: the common one.

    Attributes:
        evaluated: what the module returns in eval mode for each row, [B] each; `compute_metrics` gets them as columns.
        shares: numbers of workers that share the rows of an epoch all divide it (`sizes.shares`); None for a job that
            always has the same number. The platform sets it.
    """

    evaluated: ClassVar[tuple[str, ...]] = ("nll", "num_labels")
    shares: int | None = None
    planned_accumulation: int | None = None

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *args: Any, cosine_floor: bool = False, projector_learning_rate: float | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._cosine_floor = cosine_floor
        self._projector_learning_rate = projector_learning_rate
        self._sums: dict[str, list[Tensor]] = {}
        self._order: LengthGroups | EvenRows | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss; keep the module's statistics for the next report."""
        self.model.micro_batches = self.args.world_size * self.current_gradient_accumulation_steps
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name, (total, count) in outputs["statistics"].items():
            self._sums.setdefault(name, []).append(torch.stack([total.detach().float(), count.detach().float()]))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the statistics since the last report, summed over all ranks."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            local = torch.stack([torch.stack(self._sums[name]).sum(0) for name in names])
            gathered = self.accelerator.reduce(local.to(self.args.device), reduction="sum")
            for name, (total, count) in zip(names, gathered.tolist(), strict=True):
                logs[name] = total / count if count else math.nan
            self._sums = {}
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW: no decay on one-dimensional parameters, projectors with their own learning rate.

        An adapter consists of matrices: its parameters are one group, with decay (DSKD, arXiv 2406.17328).
        """
        if self.optimizer is None:
            projectors = {id(parameter) for parameter in self.model.projector_parameters()}
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            body = [parameter for parameter in trained if id(parameter) not in projectors]
            # ds_shape: the true shape of a parameter that ZeRO-3 has sharded into one dimension
            matrices = [p for p in body if len(getattr(p, "ds_shape", p.shape)) > 1]
            vectors = [p for p in body if len(getattr(p, "ds_shape", p.shape)) <= 1]
            decay, rate = self.args.weight_decay, self.args.learning_rate
            groups = [
                {"params": matrices, "weight_decay": decay, "lr": rate},
                {"params": vectors, "weight_decay": 0.0, "lr": rate},
                {
                    "params": [parameter for parameter in trained if id(parameter) in projectors],
                    "weight_decay": decay,
                    "lr": self._projector_learning_rate or rate,
                },
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule; `cosine_floor` takes each group's own rate down to the absolute floor 1e-7."""
        # transformers calls this when the optimizer is DeepSpeed's, and before it loads a checkpoint
        forget_trial_step(getattr(self.optimizer, "optimizer", None))
        if self.lr_scheduler is None and self._cosine_floor:
            self.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer or self.optimizer, T_max=num_training_steps, eta_min=COSINE_FLOOR
            )
            self._created_lr_scheduler = True
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> Any:
        """Return the batches of this rank."""
        loader: Any = super().get_train_dataloader()
        if self._order is not None:
            # accelerate then tells it the epoch also where it skips the first batches
            loader.set_sampler(self._order)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return an order of rows that depends on seed and epoch alone, whatever the number of workers."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        order = super()._get_train_sampler(train_dataset)
        if isinstance(order, LengthGroupedSampler):
            group = self.args.train_batch_size * (self.planned_accumulation or self.args.gradient_accumulation_steps)
            order = self._order = LengthGroups(order.lengths, group, self.args.data_seed or 0)
        if self.shares is None or order is None:
            return order
        if isinstance(order, RandomSampler):
            # what accelerate makes of it where it finds it unwrapped
            order = SeedableRandomSampler(rows, data_seed=self.args.data_seed)
        self._order = EvenRows(order, self.args.train_batch_size * self.shares)
        return self._order

    def _prepare_input(self, data: Any) -> Any:
        """Move a tensor to the device in its own dtype: with bf16 transformers would round counts and targets."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss, [B, number of `evaluated`], [B] placeholder): all that `compute_metrics` needs."""
        with torch.no_grad():
            outputs = model(**self._prepare_inputs(inputs))
        columns = torch.stack([outputs[name].float() for name in self.evaluated], dim=1)
        return outputs["loss"].detach().mean(), columns, columns[:, 0]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Have DeepSpeed leave frozen weights out of its state: a resumed run loads them where they came from.

        What it leaves out itself when it resumes with another number of workers is kept beside it: buffers, and what
        parameter groups differ in (under ZeRO-3 it gives all groups the first one's learning rate and decay).
        """
        engine: Any = self.model_wrapped
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            del engine.save_checkpoint  # the class's own again
        if self.args.should_save:
            groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            (Path(output_dir) / GROUPS).write_text(json.dumps(groups, default=float), encoding="utf-8")
            buffers = {name: buffer.contiguous() for name, buffer in self._kept_buffers().items()}
            save_file(buffers, Path(output_dir) / BUFFERS)

    def _kept_buffers(self) -> dict[str, Tensor]:
        kept = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """After DeepSpeed has loaded a checkpoint that another number of workers wrote, load what it leaves out."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (Path(checkpoint) / UNIVERSAL).exists():
            return
        found = load_file(Path(checkpoint) / BUFFERS)
        for name, buffer in self._kept_buffers().items():
            buffer.copy_(found[name])
        kept = json.loads((Path(checkpoint) / GROUPS).read_text(encoding="utf-8"))
        for group, values in zip(self.optimizer.param_groups, kept, strict=True):
            group.update({k: tuple(value) if isinstance(value, list) else value for k, value in values.items()})
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                # under ZeRO-3 all groups get the same tensor, which each of them would count up in every step
                state["step"] = state["step"].clone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on with the rank's own random numbers; a rank that has none in the checkpoint starts others."""
        if checkpoint is None:
            return
        rank, several = self.args.process_index, self.args.world_size > 1
        if (Path(checkpoint) / (f"rng_state_{rank}.pth" if several else "rng_state.pth")).exists():
            super()._load_rng_state(checkpoint)
            return
        text = f"{self.args.seed} {self.state.global_step} {rank}"
        transformers.set_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the exported model alone, in Hugging Face form; DeepSpeed's files beside it hold the rest."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "exported."
        weights = state_dict if state_dict is not None else self.model.state_dict()
        kept = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        model = self.model.exported
        model.save_pretrained(folder, state_dict=without_tied_copies(model, merged_weights(model, kept)))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


def perplexity_metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Return `nll` (nats per label token) and `perplexity` from the pairs that `prediction_step` gathered."""
    pairs = torch.as_tensor(prediction.predictions, dtype=torch.float64)
    total, count = pairs[:, 0].sum().item(), pairs[:, 1].sum().item()
    nll = total / count if count else math.nan
    return {"nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf}
