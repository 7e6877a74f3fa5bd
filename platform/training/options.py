"""The training section of a method's configuration: TrainingArguments' own names, checked before anything starts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from tenfold.platform.experiment import StrictModel

Count = Annotated[int, Field(lt=2**31)]  # larger ones overflow in torch


class TrainingOptions(StrictModel):
    """Options of one training job. Names, meaning and defaults are those of `transformers.TrainingArguments`.

    The seed comes from the experiment, the devices and DeepSpeed from its `compute` section.
    """

    num_train_epochs: float = Field(3.0, gt=0, le=1e6, description="passes over the training rows")
    max_steps: Count = Field(-1, ge=-1, description="optimizer steps; overrides the epochs when > 0")
    per_device_train_batch_size: Count = Field(8, ge=1, description="rows a worker takes in one forward pass")
    per_device_eval_batch_size: Count = Field(16, ge=1, description="rows a worker evaluates at once")
    gradient_accumulation_steps: Count = Field(1, ge=1, description="forward passes a worker adds up in one step")
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of AdamW")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "cosine_to_floor"
    ] = Field(
        "linear",
        description="schedule; cosine_with_min_lr ends at a tenth of the peak, cosine_to_floor anneals every "
        "parameter group to 1e-7 without warm-up",
    )
    warmup_steps: float = Field(0, ge=0, description="steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = Field(0.0, ge=0, description="AdamW decay of all parameters with two or more dimensions")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW beta 2")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0 does not clip")
    bf16: bool | Literal["auto"] = Field(
        False, description="train in bfloat16; auto: where this hardware computes in it, said in the plan"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward to save memory")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        "random", description="order of rows; group_by_length puts rows of like length together"
    )
    dataloader_num_workers: Count = Field(0, ge=0, description="loader processes a worker")
    logging_steps: Count = Field(10, ge=1, description="steps between two reports of training metrics")
    eval_strategy: Literal["no", "steps", "epoch"] = Field("epoch", description="when to evaluate; always at the end")
    eval_steps: Count | None = Field(None, ge=1, description="steps between evaluations, with eval_strategy steps")
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch", description="when to keep a checkpoint; always at the end"
    )
    save_steps: Count = Field(500, ge=1, description="steps between checkpoints, with save_strategy steps")
    save_total_limit: Count = Field(2, ge=1, description="newest checkpoints that are kept, besides the best one")
    metric_for_best: str = Field(
        "eval/nll",
        pattern="^eval/.",
        description="the metric of evaluation, eval/NAME, by which a checkpoint is the best; smaller is better",
    )

    @model_validator(mode="after")
    def _steps_are_given(self) -> TrainingOptions:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ValueError("eval_strategy steps needs eval_steps")
        if self.eval_strategy != self.save_strategy and "no" not in (self.eval_strategy, self.save_strategy):
            raise ValueError("eval_strategy and save_strategy must be equal where both are on")
        if self.max_steps == 0:
            raise ValueError("max_steps must be -1 (use the epochs) or at least 1")
        return self

    def use_bf16(self) -> bool:
        """Say whether training uses bfloat16 on this machine.

        Raises:
            ConfigError: bf16 is asked for where the hardware only emulates it.
        """
        from tenfold.platform.errors import ConfigError
        from tenfold.platform.hardware import supports_bf16

        if self.bf16 == "auto":
            return supports_bf16()
        if self.bf16 and not supports_bf16():
            raise ConfigError("config.training.bf16 = true: this hardware has no bfloat16 units; use false or auto")
        return bool(self.bf16)

    def steps(self, rows: int, workers: int) -> int:
        """Return the optimizer steps for `rows` training rows on `workers` ranks."""
        import math

        if self.max_steps > 0:
            return self.max_steps
        batches = math.ceil(math.ceil(rows / workers) / self.per_device_train_batch_size)
        return math.ceil(self.num_train_epochs * max(math.ceil(batches / self.gradient_accumulation_steps), 1))

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of TrainingArguments that these options decide."""
        values = self.model_dump(exclude={"bf16", "lr_scheduler_type", "metric_for_best", "save_total_limit"})
        if not values["gradient_checkpointing"]:
            del values["gradient_checkpointing"]
        return {**values, "bf16": self.use_bf16()}
